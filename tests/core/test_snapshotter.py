"""The snapshotter on a real arena."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.host import SystemHost
from moc.plan.layout import arrange_arena
from moc.plan.rotation import even_rotation
from moc.plan.turns import Turns
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import EXPLICIT, PERSIST
from moc.snapshot.snapshotter import Begun, Setbacks, Snapshotter
from moc.trace import Trace
from tests.support.plain import PlainState

DEADLINE_S = 30.0
LAYERS, EXPERTS = 2, 4

Bytes = Mapping[str, bytes]


class FragileState(PlainState):
    """A small state whose copies fail half-way when they are told to."""

    is_failing = False

    def copy_shards(self, targets: array[int], crcs: array[int]) -> None:
        if self.is_failing:
            half = array("Q", [target if i % 2 else 0 for i, target in enumerate(targets)])
            super().copy_shards(half, crcs)
            raise OSError("the device is gone")
        super().copy_shards(targets, crcs)

    def content(self) -> Bytes:
        return {shard.name: value.tobytes() for shard, value in zip(self._shards, self.values, strict=True)}


@contextmanager
def snapshotting(
    *, versions: int, k: int | None = None, every: int = 1
) -> Iterator[tuple[FragileState, Arena, Snapshotter, Turns]]:
    state = FragileState(0, 1, layers=LAYERS, experts=EXPERTS, dense_elements=7, expert_elements=5)
    descriptor = {"versions": versions, "catalogs": [state.catalog.to_json()]}
    layout = arrange_arena((state.catalog,), versions=versions, descriptor_bytes=descriptor_room(descriptor))
    arena = Arena.create(descriptor, layout, name="test")
    turns = Turns(even_rotation(LAYERS, EXPERTS, 1), k=k, every=every)
    snapshotter = Snapshotter(
        state,
        arena,
        rank=0,
        run="run-7",
        incarnation=1,
        digest="0" * 16,
        turns=turns,
        on_sealed=lambda _step: None,
        host=SystemHost(),
        trace=Trace(),
    )
    try:
        yield state, arena, snapshotter, turns
    finally:
        snapshotter.close()
        arena.close()


def assert_holds_what_it_says(arena: Arena, history: Mapping[int, Bytes]) -> None:
    """Every unit of every sealed record has the bytes that the state had at the step that the record names."""
    for record in arena.seals(0).values():
        arena.check(record)
        offsets = arena.shard_offsets(0, record.slots)
        unit_of_shard = [u for u, unit in enumerate(arena.rank_layout(0).units) for _ in range(unit.count)]
        for shard, offset, unit in zip(arena.catalog(0).shards, offsets, unit_of_shard, strict=True):
            with arena.view(offset, shard.size_bytes) as view:
                assert bytes(view) == history[record.steps[unit]][shard.name], (record.step, shard.name)


def test_after_its_end_no_snapshot_begins_that_the_next_update_would_wait_for() -> None:
    with snapshotting(versions=2) as (_, arena, snapshotter, _):
        assert snapshotter.begin(1, flags=0, attempt="00abcdef") is Begun.STARTED
        snapshotter.close()

        assert snapshotter.begin(2, flags=0, attempt="00abcdef") is Begun.FAILED
        assert snapshotter.wait_copied() == 0.0
        assert [record.step for record in arena.seals(0).values()] == [1]


def test_a_snapshot_copies_the_chosen_experts_and_keeps_the_others() -> None:
    with snapshotting(versions=3, k=1) as (state, arena, snapshotter, turns):
        history = {}
        for step in (1, 2):
            state.advance()
            history[step] = state.content()
            chosen = turns.everything() if step == 1 else turns.window(step)
            assert snapshotter.begin(step, flags=0, attempt="00abcdef", experts=chosen) is Begun.STARTED
            assert snapshotter.wait_finished(DEADLINE_S)

        first, second = sorted(arena.seals(0).values(), key=lambda record: record.step)
        chosen = turns.window(2)
        assert list(first.steps) == [1] * (1 + LAYERS * EXPERTS)
        assert list(second.steps) == [2] + [2 if is_chosen else 1 for is_chosen in chosen]
        assert [old == new for old, new in zip(first.slots, second.slots, strict=True)] == [False, *~chosen]
        assert_holds_what_it_says(arena, history)
        assert snapshotter.setbacks == Setbacks()


def test_without_a_base_every_expert_is_copied_and_the_others_are_told() -> None:
    with snapshotting(versions=3, k=1) as (state, arena, snapshotter, turns):
        state.advance()
        assert snapshotter.begin(1, flags=0, attempt="00abcdef", experts=turns.window(1)) is Begun.STARTED
        assert snapshotter.wait_finished(DEADLINE_S)

        assert list(arena.seals(0)[0].steps) == [1] * (1 + LAYERS * EXPERTS)
        assert snapshotter.setbacks == Setbacks(widened=1)


def test_a_failed_copy_of_a_save_is_told_unless_somebody_waits_for_it() -> None:
    with snapshotting(versions=2) as (state, _, snapshotter, _):
        state.is_failing = True
        for step, flags in enumerate((0, PERSIST, PERSIST | EXPLICIT), start=1):
            assert snapshotter.begin(step, flags=flags, attempt="00abcdef") is Begun.STARTED
            assert snapshotter.wait_finished(DEADLINE_S)

        assert snapshotter.setbacks == Setbacks(failed=3, lost_saves=1)


def test_with_two_versions_a_freed_base_does_not_end_the_snapshots() -> None:
    """The global record holds one slot of each expert, the base, which another rank has missed, the other one."""
    with snapshotting(versions=2, k=1) as (state, arena, snapshotter, turns):
        history = {}

        def take(step: int, *, free: int | None) -> Begun:
            state.advance()
            history[step] = state.content()
            begun = snapshotter.begin(step, flags=0, attempt="00abcdef", experts=turns.window(0))
            assert snapshotter.wait_finished(DEADLINE_S)
            for index, record in list(arena.seals(0).items()):
                if record.step == free:
                    arena.free(0, index)
            return begun

        assert take(1, free=None) is Begun.STARTED
        for step in (2, 3, 4):  # each is given up by the agent, since another rank has skipped it
            assert take(step, free=step) is Begun.STARTED
        assert take(5, free=None) is Begun.STARTED

        assert sorted(record.step for record in arena.seals(0).values()) == [1, 5]
        assert_holds_what_it_says(arena, history)


@settings(max_examples=60, deadline=None)
@given(
    versions=st.integers(2, 4),
    turns_taken=st.lists(
        st.tuples(
            st.lists(st.booleans(), min_size=LAYERS * EXPERTS, max_size=LAYERS * EXPERTS),
            st.sampled_from(["sealed", "sealed", "sealed", "failed", "refused"]),
            st.sets(st.integers(0, 3), max_size=2),
        ),
        max_size=14,
    ),
)
def test_records_hold_what_they_say_whatever_is_chosen_freed_or_fails(
    versions: int, turns_taken: list[tuple[list[bool], str, set[int]]]
) -> None:
    with snapshotting(versions=versions) as (state, arena, snapshotter, _):
        history = {}
        for step, (chosen, fate, freed) in enumerate(turns_taken, start=1):
            state.advance()
            history[step] = state.content()
            state.is_failing, state.is_between = fate == "failed", fate == "refused"
            is_full = all(not arena.is_free(0, index) for index in range(versions))

            begun = snapshotter.begin(step, flags=0, attempt="00abcdef", experts=np.array(chosen))
            assert snapshotter.wait_finished(DEADLINE_S)

            expected = Begun.NO_SLOT if is_full else Begun.FAILED if fate == "refused" else Begun.STARTED
            assert begun is expected
            if begun is Begun.STARTED and fate == "sealed":
                record = next(record for record in arena.seals(0).values() if record.step == step)
                is_fresh = [of_unit == step for of_unit in record.steps[1:]]
                assert all(fresh for fresh, wanted in zip(is_fresh, chosen, strict=True) if wanted)
            assert_holds_what_it_says(arena, history)
            for index in sorted(freed & set(arena.seals(0))):
                arena.free(0, index)
