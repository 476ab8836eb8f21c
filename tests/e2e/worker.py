"""One rank of an end-to-end world: trains a case, plain or with a manager, or runs named behaviours.

Writes one JSON line per event.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch.distributed as dist
import torch.nn.functional as F

from moc import CheckpointManager, Config
from moc.status import Status
from tests.e2e.engines import VOCABULARY, Average, Loader, build, digests
from tests.e2e.matrix import Case
from tests.support.ranks import join_world

__all__ = ["Note", "Training", "main", "open_note"]

SKIPPED_STEPS = (5, 45)  # one before the kill, one after it
Note = Callable[..., None]


def main(spec: Mapping[str, Any]) -> None:
    """Join the world and do what the specification says."""
    note = open_note(Path(spec["record"]))
    deepspeed.logger.setLevel("ERROR")
    join_world(spec)
    if "behaviours" in spec:
        from tests.e2e import behaviours, interference

        behaviours.run(spec, note, {**behaviours.BEHAVIOURS, **interference.BEHAVIOURS})
        return
    train_case(spec, note)


def open_note(path: Path) -> Note:
    """Return a function that appends one event; a line is there whole or not at all, whenever the process is killed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(event: str, **fields: object) -> None:
        os.write(descriptor, json.dumps({"event": event, "rank": int(os.environ["RANK"]), **fields}).encode() + b"\n")

    return note


class Training:
    """An engine, its data and its averages, and the loop over steps."""

    def __init__(self, case: Case, *, seed: int, note: Note | None = None) -> None:
        self.case, self._note = case, note
        self.engine = build(case, seed)
        self.loader = Loader(case.accumulation)
        self.average = Average(self.engine) if case.boundary == "step" else None
        self.losses: list[list[str]] = []

    @property
    def stateful(self) -> dict[str, object]:
        average = {} if self.average is None else {"average": self.average}
        return {"loader": self.loader, **average}

    def run(
        self, last_step: int, end_step: Callable[[], None] = lambda: None, status: Callable[[], Status] | None = None
    ) -> None:
        """Train until this step; `end_step` is called at the end of each, after everything that belongs to it."""
        engine = self.engine
        while engine.global_steps < last_step:
            step = engine.global_steps + 1
            ids, batches = self.loader.next_step()
            losses = []
            for turn, tokens in enumerate(batches):
                logits = engine(tokens)
                loss = F.cross_entropy(logits.view(-1, VOCABULARY).float(), tokens.view(-1))
                loss = loss * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
                losses.append(loss.item().hex())
                if self.case.skips and step in SKIPPED_STEPS and dist.get_rank() == 0:
                    loss = loss * float("nan")
                engine.backward(loss)
                if turn + 1 == len(batches) and self._note is not None:
                    committed = None if status is None else status().last_committed_step
                    # Before the update: every state that can be recovered has its line.
                    self._note("step", step=step, losses=losses, ids=ids, committed=committed, time=time.monotonic())
                engine.step()
            self.losses.append(losses)
            if self.average is not None:
                self.average.update()
            end_step()

    def digests(self) -> dict[str, str]:
        return digests(self.engine, self.loader, self.average)


def train_case(spec: Mapping[str, Any], note: Note) -> None:
    """Train a case to its last step: undisturbed without any manager, or in a life with one.

    steps: the last step; where it is recovered, at least `further` steps more.
    """
    case = Case(**spec["case"])
    training = Training(case, seed=spec["seed"], note=note)
    if not spec["is_attached"]:
        training.run(spec["steps"])
        note("final", digests=training.digests(), skipped=training.engine.skipped_steps)
        return
    manager = CheckpointManager.attach(
        training.engine,
        storage=spec["storage"],
        config=Config(
            persist_every=spec["persist_every"], timeout_s=spec.get("timeout_s", 60.0), **spec.get("config", {})
        ),
        stateful=training.stateful,
        runtime_dir=Path(spec["runtime"]),
    )
    report = manager.recovery
    last_step = max(spec["steps"], manager.resume_step + spec.get("further", 0))
    note(
        "attached",
        last_step=last_step,
        step=manager.resume_step,
        source=None if report is None else report.source,
        notes=[] if report is None else list(report.notes),
        rejected=[] if report is None else [str(row) for row in report.rejected],
        incarnation=manager.incarnation,
        used=training.loader.used,
        experts=[] if report is None else [[r.expert.index, r.level, r.step] for r in report.experts],
        plt=None if report is None else report.plt,
        digests=training.digests() if spec.get("is_watched") else None,
    )

    def end_step() -> None:
        if spec.get("is_watched"):
            note("state", step=training.engine.global_steps, digests=training.digests())
        if case.boundary == "step":
            manager.step()

    training.run(last_step, end_step, manager.status)
    note(
        "final",
        digests=training.digests(),
        skipped=training.engine.skipped_steps,
        boundary=manager.status().boundary,
        sealed=manager.status().snapshots.sealed,
        snapshots_skipped=manager.status().snapshots.skipped,
    )
    manager.detach()
