"""The adapter for DeepSpeed engines with ZeRO stages 1 and 2, dense or with expert parallelism."""

from __future__ import annotations

from moc.adapters.deepspeed.hooks import Hooks, refuse_attached
from moc.adapters.deepspeed.identity import plain_json
from moc.adapters.deepspeed.state import DeepSpeedState, Stateful

__all__ = ["DeepSpeedState", "Hooks", "Stateful", "plain_json", "refuse_attached"]
