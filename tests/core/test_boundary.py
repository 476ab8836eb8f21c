"""Boundaries of several ranks side by side: what all of them learn, and what follows for their snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moc.boundary import Boundaries, Choice
from moc.errors import CoordinationError
from moc.plan.rotation import even_rotation
from moc.plan.turns import Chosen, Turns
from moc.snapshot.seal import PERSIST
from moc.snapshot.snapshotter import Begun, Setbacks

LAYERS, EXPERTS, K = 2, 5, 2


@dataclass
class Round:
    """Maxima over ranks that come one after the other."""

    size: int
    given: list[Sequence[int]] = field(default_factory=list)
    is_cut: bool = False


@dataclass
class LockstepWorld:
    """World of one rank in a test that calls its ranks in order; only the maximum is there."""

    rank: int
    round: Round
    pending: list[Sequence[int]] | None = None

    @property
    def size(self) -> int:
        return self.round.size

    def all_gather(self, payload: bytes) -> list[bytes]:
        raise NotImplementedError

    def broadcast(self, payload: bytes | None) -> bytes:
        raise NotImplementedError

    def start_max(self, values: Sequence[int]) -> None:
        if self.rank == 0:
            self.round.given = []
        self.round.given.append(values)
        self.pending = self.round.given

    def finish_max(self) -> tuple[int, ...] | None:
        if self.round.is_cut:
            raise CoordinationError("a rank was away")
        given, self.pending = self.pending, None
        return None if given is None else tuple(max(column) for column in zip(*given, strict=True))


class Rank:
    """What one rank's snapshotter would do: the step of each expert in its newest record, and its setbacks."""

    def __init__(self, world: LockstepWorld, *, k: int | None, snapshot_every: int, persist_every: int) -> None:
        self.turns = Turns(even_rotation(LAYERS, EXPERTS, 1), k=k, every=snapshot_every)
        self.boundaries = Boundaries(world, self.turns, persist_every=persist_every)
        self.steps: np.ndarray | None = None
        self.sealed_step = -1
        self.failed = self.lost_saves = self.widened = 0

    def pass_boundary(self, step: int, fate: str, *, is_asked: bool = False) -> tuple[bool, Choice | None]:
        is_terminating = self.boundaries.learn()
        choice = None if is_terminating else self.boundaries.choose(step)
        begun = Begun.STARTED if choice is not None and fate != "missed" else Begun.NO_SLOT
        setbacks = self.setbacks
        if choice is not None and begun is Begun.STARTED:
            self._copy(step, choice, is_failing=fate == "failed")
            setbacks = Setbacks(failed=setbacks.failed, lost_saves=setbacks.lost_saves, widened=self.widened)
        # A copy that fails does so behind the boundary, as late as possible.
        self.boundaries.tell(choice, begun, setbacks, is_asked_to_terminate=is_asked)
        return is_terminating, choice

    @property
    def setbacks(self) -> Setbacks:
        return Setbacks(failed=self.failed, lost_saves=self.lost_saves, widened=self.widened)

    def _copy(self, step: int, choice: Choice, *, is_failing: bool) -> None:
        wanted: Chosen = self.turns.everything() if choice.experts is None else choice.experts
        copied = wanted if self.steps is not None else self.turns.everything()
        self.widened += not np.array_equal(wanted, copied)
        if is_failing:
            self.failed += 1
            self.lost_saves += bool(choice.flags & PERSIST)
            return
        self.steps = np.where(copied, step, 0 if self.steps is None else self.steps)
        self.sealed_step = step


def ranks_of(
    size: int, *, k: int | None = K, snapshot_every: int = 1, persist_every: int = 0
) -> tuple[Round, list[Rank]]:
    joint = Round(size)
    settings = {"snapshot_every": snapshot_every, "persist_every": persist_every}
    return joint, [Rank(LockstepWorld(rank, joint), k=k, **settings) for rank in range(size)]


fates = st.sampled_from(["sealed", "sealed", "sealed", "missed", "failed"])


@given(
    snapshot_every=st.integers(1, 3),
    rows=st.lists(st.lists(fates, min_size=2, max_size=2), min_size=1, max_size=25),
)
def test_ranks_choose_alike_and_their_slices_of_an_expert_are_of_one_step(
    snapshot_every: int, rows: list[list[str]]
) -> None:
    """Missed snapshots leave no trace in the next one; after a copy that failed it may take two boundaries more."""
    _, ranks = ranks_of(2, snapshot_every=snapshot_every)
    failed_at = -10
    for step, row in enumerate(rows):
        choices = [rank.pass_boundary(step, fate)[1] for rank, fate in zip(ranks, row, strict=True)]
        experts = [None if choice is None else choice.experts for choice in choices]
        assert (experts[0] is None) == (experts[1] is None)
        if experts[0] is None or experts[1] is None:
            continue
        assert np.array_equal(experts[0], experts[1])
        if "failed" in row:
            failed_at = step
        is_settled = step - failed_at >= 2 * snapshot_every and step - failed_at >= 2
        if is_settled and all(rank.sealed_step == step for rank in ranks):
            assert ranks[0].steps is not None
            assert ranks[1].steps is not None
            assert np.array_equal(ranks[0].steps, ranks[1].steps), (step, rows)


@given(missed=st.integers(1, 20), rank=st.integers(0, 2))
def test_what_one_rank_has_missed_is_copied_by_all_at_the_next_snapshot(missed: int, rank: int) -> None:
    _, ranks = ranks_of(3)
    for step in range(missed + 3):
        owed = ranks[0].turns.window(missed) if missed else ranks[0].turns.everything()
        chosen = [r.pass_boundary(step, "missed" if (step, r) == (missed, ranks[rank]) else "sealed")[1] for r in ranks]
        for choice in chosen:
            assert choice is not None
            assert choice.experts is not None
            if step == missed + 1:
                assert np.array_equal(choice.experts, ranks[0].turns.window(step) | owed)
            elif step:
                assert np.array_equal(choice.experts, ranks[0].turns.window(step))


def test_the_first_snapshot_of_a_life_and_the_one_after_a_failed_copy_hold_everything() -> None:
    _, ranks = ranks_of(2)
    sizes = []
    for step in range(8):
        if step == 5:
            for rank in ranks:
                rank.boundaries.begin_life()
                rank.failed = 0  # a new snapshotter counts anew
        fate = ("failed", "sealed") if step == 1 else ("sealed", "sealed")
        choices = [rank.pass_boundary(step, of_rank)[1] for rank, of_rank in zip(ranks, fate, strict=True)]
        assert all(choice is not None and choice.experts is not None for choice in choices)
        sizes.append([int(choice.experts.sum()) for choice in choices if choice and choice.experts is not None])

    one, every = LAYERS * K, LAYERS * EXPERTS
    assert sizes == [[n, n] for n in (every, one, one, every, one, every, one, one)]


def test_a_flagged_snapshot_that_is_missed_or_lost_is_made_up_for() -> None:
    for fate, step_made in (("missed", 5), ("failed", 6)):
        _, ranks = ranks_of(2, persist_every=4)
        flagged = []
        for step in range(1, 10):
            choices = [
                rank.pass_boundary(step, fate if rank is ranks[1] and step == 4 else "sealed")[1] for rank in ranks
            ]
            assert {bool(choice and choice.flags & PERSIST) for choice in choices} in ({True}, {False})
            flagged += [step] if choices[0] is not None and choices[0].flags & PERSIST else []
        assert flagged == [4, step_made, 8]


def test_all_ranks_hear_of_sigterm_one_boundary_later() -> None:
    _, ranks = ranks_of(2)
    heard = [
        [rank.pass_boundary(step, "sealed", is_asked=rank is ranks[1] and step == 3)[0] for rank in ranks]
        for step in range(6)
    ]

    assert heard == [[False, False]] * 4 + [[True, True]] + [[False, False]]


def test_ranks_that_do_not_agree_any_more_copy_everything() -> None:
    joint, ranks = ranks_of(2)
    for step in range(6):
        joint.is_cut = step >= 3
        choices = [rank.pass_boundary(step, "sealed")[1] for rank in ranks]
        for choice in choices:
            assert choice is not None
            assert (choice.experts is None) == (step >= 3)


def test_a_boundary_called_again_in_a_step_owes_nothing_and_flags_nothing() -> None:
    _, ranks = ranks_of(1, persist_every=1)
    for step in range(1, 6):
        first = ranks[0].pass_boundary(step, "sealed")[1]
        again = [ranks[0].pass_boundary(step, "missed")[1] for _ in range(2)]  # refused between micro-batches
        assert first is not None
        assert first.experts is not None
        assert first.flags == PERSIST
        assert int(first.experts.sum()) == LAYERS * (EXPERTS if step == 1 else K)
        assert [choice.flags for choice in again if choice] == [0, 0]


def test_what_is_owed_survives_a_boundary_that_is_called_again() -> None:
    _, ranks = ranks_of(2)
    for step in range(5):
        fates = ["sealed", "missed" if step == 3 else "sealed"]
        choices = [rank.pass_boundary(step, fate)[1] for rank, fate in zip(ranks, fates, strict=True)]
        for rank in ranks:
            rank.pass_boundary(step, "missed")  # refused between micro-batches, after all ranks have learned
        for choice in choices if step == 4 else ():
            assert choice is not None
            assert choice.experts is not None
            assert np.array_equal(choice.experts, ranks[0].turns.window(4) | ranks[0].turns.window(3))


def test_without_a_k_everything_is_copied_always() -> None:
    _, ranks = ranks_of(2, k=None)
    for step in range(4):
        for rank in ranks:
            choice = rank.pass_boundary(step, "sealed" if step else "missed")[1]
            assert choice == Choice(flags=0, experts=None, is_repeat=False)
