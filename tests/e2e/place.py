"""Where one behaviour takes place: a repository of its own, and attaching to it as a user would."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moc import CheckpointManager, Config
from moc.repository import Repository
from moc.store.open import open_store
from tests.adapters.refusals import expect
from tests.e2e.worker import Training

__all__ = ["Place"]


class Place:
    """A repository of its own for one behaviour."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.folder, self.storage, self.runtime = folder, folder / "repository", runtime

    def attach(self, training: Training, **options: Any) -> CheckpointManager:
        """Attach as a user would, to this place unless told otherwise."""
        return self.attach_engine(training.engine, **{"stateful": training.stateful, **options})

    def attach_engine(self, engine: Any, **options: Any) -> CheckpointManager:
        usual = {
            "storage": self.storage,
            "config": Config(persist_every=100, timeout_s=60.0),
            "runtime_dir": self.runtime,
        }
        return CheckpointManager.attach(engine, **{**usual, **options})

    def refuse(self, kind: type, words: str, engine: Any, **options: Any) -> None:
        """Expect an error on attach, and an engine that is as it was."""
        before, handler = dict(engine.__dict__), signal.getsignal(signal.SIGTERM)
        expect(kind, words, lambda: self.attach_engine(engine, **options))
        assert engine.__dict__ == before
        assert signal.getsignal(signal.SIGTERM) == handler

    def stack_files(self, run: str) -> list[Path]:
        """Return the files to which this process would write its stacks."""
        return list(self.runtime.glob(f"{run}/stacks-*-{os.getpid()}-*.txt"))

    def incarnations(self) -> list[tuple[int, str]]:
        """Return (number, reason) of every life in the repository."""
        repository = Repository(open_store(str(self.storage)))
        try:
            return [(record.number, record.reason) for record in repository.incarnations()[0]]
        finally:
            repository.close()

    def committed(self) -> list[int]:
        """Return the steps of the checkpoints. Collective: of a detach only rank 0 waits for the last save."""
        dist.barrier()
        repository = Repository(open_store(str(self.storage)))
        try:
            return sorted(checkpoint.name.step for checkpoint in repository.checkpoints())
        finally:
            repository.close()
