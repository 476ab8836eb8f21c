"""Retention: the pure choice, and the two-phase deletion interrupted after every operation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.errors import StoreUnavailableError
from moc.format.keys import CheckpointName
from moc.format.manifest import Manifest, Parent
from moc.gc import Retention
from moc.plan.retention import CheckpointFact, dropped
from moc.state import Expert
from moc.store.memory import MemoryStore
from moc.trace import Trace
from moc.verify import verify_checkpoint
from tests.support.repository import Model, RepositoryBuilder

facts = st.lists(
    st.builds(
        CheckpointFact,
        name=st.builds(
            CheckpointName,
            run=st.just("r"),
            incarnation=st.integers(1, 3),
            step=st.integers(0, 12),
            attempt=st.sampled_from(("00000000", "01000000")),
        ),
        is_on_chain=st.booleans(),
        is_finite=st.booleans(),
    ),
    max_size=10,
    unique_by=lambda fact: fact.name,
)


@given(facts, st.integers(1, 4), st.integers(0, 5))
def test_what_is_kept(rows: list[CheckpointFact], keep_last: int, keep_every: int) -> None:
    gone = set(dropped(rows, keep_last=keep_last, keep_every=keep_every))
    assert list(dropped(rows[::-1], keep_last=keep_last, keep_every=keep_every)) == sorted(gone)
    chain = sorted((fact for fact in rows if fact.is_on_chain), key=lambda fact: fact.name)
    assert not gone & {fact.name for fact in chain[-keep_last:]}
    finite = [fact.name for fact in chain if fact.is_finite]
    assert not finite or finite[-1] not in gone
    for fact in chain:
        if keep_every and fact.name.step % keep_every == 0:
            assert fact.name not in gone
    for fact in rows:
        newer = [other for other in chain if other.name.incarnation > fact.name.incarnation]
        if not fact.is_on_chain and len(newer) < keep_last:
            assert fact.name not in gone
    # Nothing more is kept than has a reason.
    allowed = keep_last + 1 + sum(1 for f in chain if keep_every and f.name.step % keep_every == 0)
    assert sum(fact.is_on_chain and fact.name not in gone for fact in rows) <= allowed


class DyingStore(MemoryStore):
    """A memory store whose process dies at the `left`-th operation that changes something: before it, or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None
        self.is_after = False

    def put(self, key: str, segments: Sequence[memoryview], *, create_only: bool = False) -> None:
        self._before()
        super().put(key, segments, create_only=create_only)
        self._after()

    def delete(self, key: str) -> None:
        self._before()
        super().delete(key)
        self._after()

    def _before(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left <= 0 and not self.is_after:
                raise StoreUnavailableError("dead")

    def _after(self) -> None:
        if self.left is not None and self.left <= 0:
            raise StoreUnavailableError("dead")


SMALL = Model(world_size=1, moe_layers=1, experts=2, hidden=4, dense=(("embed.weight", (5, 4)),))


def _retention(builder: RepositoryBuilder, incarnation: int) -> Retention:
    return Retention(
        builder.repository, run=builder.run, incarnation=incarnation, keep_last=2, keep_every=0, trace=Trace()
    )


def _next(builder: RepositoryBuilder, last: Manifest, number: int, step: int, *, is_partial: bool) -> Manifest:
    """Commit a step, whole or with one of the two experts."""
    if not is_partial:
        return builder.commit(number, step)
    return builder.commit(number, step, base=last, written={Expert(layer=0, index=step % 2): step})


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("is_new_life", [False, True])
@pytest.mark.parametrize("is_partial", [False, True])
def test_a_death_between_any_two_operations_of_retention(is_after: bool, is_new_life: bool, is_partial: bool) -> None:
    for fatal in range(1, 60):
        store = DyingStore()
        builder = RepositoryBuilder(store, model=SMALL)
        builder.begin(1)
        retention = _retention(builder, 1)
        last = builder.commit(1, 1)
        retention.after_commit()
        for step in (2, 3):
            last = _next(builder, last, 1, step, is_partial=is_partial)
            retention.after_commit()
        last = _next(builder, last, 1, 4, is_partial=is_partial)
        store.left, store.is_after = fatal, is_after
        try:
            retention.after_commit()
            is_over = True
        except StoreUnavailableError:
            is_over = False
        store.left = None
        names = [checkpoint.name for checkpoint in builder.repository.checkpoints()]
        assert [name.step for name in names][-2:] == [3, 4]
        for name in names:
            assert verify_checkpoint(builder.repository, name, read_data_fraction=1.0).is_sound

        # The next agent, of this life or of the next, ends in the same place.
        number = 1
        if is_new_life:
            parent = names[-1]
            number = 2
            builder.begin(2, parent=Parent(incarnation=1, step=parent.step, attempt=parent.attempt))
        successor = _retention(builder, number)
        for step in (5, 6, 7):
            last = _next(builder, last, number, step, is_partial=is_partial)
            successor.after_commit()
            for checkpoint in builder.repository.checkpoints():
                assert verify_checkpoint(builder.repository, checkpoint.name, read_data_fraction=1.0).is_sound
        names = [checkpoint.name for checkpoint in builder.repository.checkpoints()]
        assert [name.step for name in names] == [6, 7]
        named = {row.key for name in names for row in builder.repository.read_manifest(name).objects}
        stored = {entry.key for entry in builder.repository.objects()}
        assert named <= stored
        assert stored - named <= set(builder.repository.read_victims(builder.run, number)), (
            f"garbage after fatal={fatal}"
        )
        if is_over:
            assert fatal > 4
            return
    raise AssertionError("retention has more operations than this test tries")
