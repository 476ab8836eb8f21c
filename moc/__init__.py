"""Fault tolerance for mixture-of-experts training on DeepSpeed.

    from moc import CheckpointManager, Config

    manager = CheckpointManager.attach(engine, storage="s3://bucket/run-7", config=Config(persist_every=50),
    stateful={"loader": loader}) for batch in loader:
        loss = engine(batch); engine.backward(loss); engine.step()
        manager.step()
    manager.detach()

Names are loaded when first used, so that the agent and `moc ls` start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moc.config import Config as Config
    from moc.errors import MocError as MocError
    from moc.manager import CheckpointManager as CheckpointManager

__all__ = ["CheckpointManager", "Config", "MocError", "__version__"]
__version__ = "0.1.0"

_HOMES = {"CheckpointManager": "moc.manager", "Config": "moc.config", "MocError": "moc.errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
