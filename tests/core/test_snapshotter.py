"""The snapshotter on a real arena."""

from __future__ import annotations

from moc.host import SystemHost
from moc.plan.layout import arrange_arena
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.snapshotter import Begun, Snapshotter
from moc.trace import Trace
from tests.support.plain import PlainState


def test_after_its_end_no_snapshot_begins_that_the_next_update_would_wait_for() -> None:
    state = PlainState(0, 1)
    descriptor = {"versions": 2, "catalogs": [state.catalog.to_json()]}
    layout = arrange_arena((state.catalog,), versions=2, descriptor_bytes=descriptor_room(descriptor))
    arena = Arena.create(descriptor, layout, name="closed")
    snapshotter = Snapshotter(
        state,
        arena,
        rank=0,
        run="run-7",
        incarnation=1,
        digest="0" * 16,
        on_sealed=lambda _step: None,
        host=SystemHost(),
        trace=Trace(),
    )
    assert snapshotter.begin(1, flags=0, attempt="00abcdef") is Begun.STARTED
    snapshotter.close()

    assert snapshotter.begin(2, flags=0, attempt="00abcdef") is Begun.FAILED
    assert snapshotter.wait_copied() == 0.0
    assert [record.step for record in arena.seals(0).values()] == [1]
    arena.close()
