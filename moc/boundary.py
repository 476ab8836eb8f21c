"""What the ranks agree on at every boundary, and what follows for its snapshot: whether it is flagged to be persisted,
and which experts it copies.

A boundary takes the result of the one before (`learn`), begins its snapshot (`choose`), and starts the next maximum
over what each rank has to say (`tell`). So at every boundary all ranks know what became of the last one's snapshot
anywhere, and choose alike. A copy that fails later than its own boundary is told at the next.

What one rank has missed is *owed*: a flagged snapshot makes the next one flagged; missed experts are copied next time
by all ranks, since otherwise their slices would be of different steps. Where the ranks may differ in more than one
snapshot (a copy failed, a base was lost), and in a life's first snapshot, all experts are owed. Once the ranks do not
agree any more, every snapshot holds all.

Where snapshots have replicas, one is flagged to be replicated as soon as no node has anything left of the one before:
so all nodes replicate the same ones, as many as they can.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from moc.errors import CoordinationError
from moc.plan.turns import Chosen, Turns
from moc.snapshot.seal import PERSIST, REPLICATE
from moc.snapshot.snapshotter import Begun, Setbacks
from moc.training import World

__all__ = ["Boundaries", "Choice"]

log = logging.getLogger(__name__)

TERMINATE, MISSED_SAVE, MISSED, UNEVEN, REPLICATING = range(5)  # indices in what ranks agree on at every boundary


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a boundary's snapshot is: the flags of its seal, and its experts (None: all).

    `is_repeat` says that the boundary was called once more in a step, as by a loop for its micro-batches.
    """

    flags: int
    experts: Chosen | None
    is_repeat: bool


class Boundaries:
    """The boundaries of one rank. Thread: the training thread.

    All ranks call the methods in the same order, `learn`, `choose`, `tell`; nothing here raises or waits for long.
    """

    def __init__(self, world: World, turns: Turns, *, persist_every: int, has_replicas: bool = False) -> None:
        """`turns` has the interval of the snapshots; `persist_every` is a multiple of it, 0 for never."""
        self._has_replicas = has_replicas
        self._world, self._turns, self._persist_every = world, turns, persist_every
        self._agrees, self._owes_save, self._ended_step = True, False, -1
        self._chosen = turns.nothing()  # by the newest snapshot
        self.begin_life()

    def begin_life(self) -> None:
        """Forget what was of the former life: its copies, and the counts of its snapshotter."""
        self._owed = self._turns.everything()
        self._seen = Setbacks()
        self._may_replicate, self._replicated_step = False, -1
        self._is_uneven = False

    def learn(self) -> bool:
        """Take the result of the last boundary's agreement; return whether to terminate."""
        if not self._agrees:
            return False
        try:
            agreed = self._world.finish_max()
        except CoordinationError as error:
            self._give_up(error)
            return False
        if agreed is None:
            return False
        self._owes_save |= agreed[MISSED_SAVE] > 0
        if agreed[MISSED]:
            self._owed |= self._chosen
        if agreed[UNEVEN]:
            self._owed[:] = True
        self._may_replicate = self._has_replicas and not agreed[REPLICATING]
        return agreed[TERMINATE] > 0

    def choose(self, step: int) -> Choice | None:
        """Return what to snapshot at the end of a step, None for nothing."""
        is_repeat, self._ended_step = step == self._ended_step, step
        if step % self._turns.every:
            return None
        is_due = self._persist_every > 0 and step % self._persist_every == 0
        is_persisted = (is_due or self._owes_save) and not is_repeat
        self._owes_save &= is_repeat
        flags = PERSIST if is_persisted else 0
        if self._may_replicate and not is_repeat:
            flags, self._replicated_step, self._may_replicate = flags | REPLICATE, step, False
        return Choice(flags=flags, experts=self._experts(step, is_repeat), is_repeat=is_repeat)

    def tell(
        self,
        choice: Choice | None,
        begun: Begun,
        setbacks: Setbacks,
        *,
        is_asked_to_terminate: bool,
        settled_step: int | None = None,
    ) -> None:
        """Begin the agreement on what this rank says; `begun` is what became of the choice, and up to `settled_step`
        nothing is left to replicate on this node.
        """
        if not self._agrees:
            return
        is_missed = choice is not None and begun is not Begun.STARTED and not choice.is_repeat
        is_save = is_missed and choice is not None and bool(choice.flags & PERSIST)
        values = {
            TERMINATE: is_asked_to_terminate,
            MISSED_SAVE: is_save or setbacks.lost_saves > self._seen.lost_saves,
            MISSED: is_missed,
            UNEVEN: self._is_uneven or (setbacks.failed, setbacks.widened) != (self._seen.failed, self._seen.widened),
            REPLICATING: self._replicated_step > (-1 if settled_step is None else settled_step),
        }
        try:
            self._world.start_max([int(values[index]) for index in sorted(values)])
        except CoordinationError as error:
            self._give_up(error)
        self._seen, self._is_uneven = setbacks, False

    def note_failed_save(self) -> None:
        """Say that this rank has no snapshot where another may have one, outside the boundaries."""
        self._is_uneven = True

    def _experts(self, step: int, is_repeat: bool) -> Chosen | None:
        if self._turns.is_whole or not self._agrees:
            return None
        experts = self._turns.window(step) | self._owed
        if not is_repeat:  # it would hold the same bytes; if it is refused, as between micro-batches, nothing is lost
            self._chosen, self._owed = experts, self._turns.nothing()
        return experts

    def _give_up(self, error: CoordinationError) -> None:
        # A rank was away for longer than the timeout. Snapshots need no agreement.
        log.warning("ranks do not agree on SIGTERM, missed snapshots and replicas any more: %s", error)
        self._agrees = self._may_replicate = False
