"""The one place that knows moc: attach, and the same small interface when checkpointing is switched off."""

import dataclasses
import os
from typing import Any, Protocol

from torch import Tensor

from moc_train.config import CheckpointConfig

__all__ = ["Checkpointing", "attach"]

# Keys of the section that are not settings of moc.Config.
ATTACH_KEYS = frozenset({"enabled", "storage", "restore", "run_id"})


class Checkpointing(Protocol):
    """What the training loop needs."""

    resume_step: int
    incarnation: int

    def register_routing(self, layer: int, counts: Tensor) -> None:
        """Say how many of this rank's tokens each expert of a MoE layer has got in this step."""

    def step(self) -> None:
        """Mark the boundary of the user's step."""

    def stall_ms(self) -> float:
        """Return how long the last weight update waited for a snapshot."""

    def report(self) -> str | None:
        """Return what the recovery at the start of this incarnation did, or None for a fresh start."""

    def detach(self) -> None:
        """Finish outstanding saves and let go of the engine."""


class NoCheckpointing:
    """Every life is the first one."""

    resume_step = 0
    incarnation = 1

    def register_routing(self, layer: int, counts: Tensor) -> None:
        return

    def step(self) -> None:
        return

    def stall_ms(self) -> float:
        return 0.0

    def report(self) -> str | None:
        return None

    def detach(self) -> None:
        return


class MocCheckpointing:
    """A `moc.CheckpointManager` attached to the engine."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.resume_step = int(manager.resume_step)
        self.incarnation = int(manager.incarnation)

    def register_routing(self, layer: int, counts: Tensor) -> None:
        self._manager.register_routing(layer, counts)

    def step(self) -> None:
        self._manager.step()

    def stall_ms(self) -> float:
        return float(self._manager.status().stall_ms_last or 0.0)

    def report(self) -> str | None:
        return None if self._manager.recovery is None else str(self._manager.recovery)

    def detach(self) -> None:
        self._manager.detach()


def attach(
    config: CheckpointConfig, engine: Any, *, stateful: dict[str, Any], fingerprint: dict[str, Any]
) -> Checkpointing:
    """Attach moc to the engine, which restores the state to go on from; collective."""
    if not config.enabled:
        return NoCheckpointing()
    from moc import CheckpointManager, Config

    given = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    settings = {key: value for key, value in given.items() if key not in ATTACH_KEYS and value is not None}
    manager = CheckpointManager.attach(
        engine,
        storage=config.storage or os.environ.get("MOC_STORAGE") or "checkpoints",
        config=Config(**settings),
        trace_dir=os.environ.get("MOC_TRACE"),
        stateful=stateful,
        # A restarted job goes on from where it was, whatever its first start had asked for.
        restore=config.restore if int(os.environ.get("MOC_LIFE", "1")) == 1 else "auto",
        fingerprint=fingerprint,
        run_id=config.run_id,
    )
    return MocCheckpointing(manager)
