"""What is global when snapshots have replicas, and what is left to send."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moc.plan.replication import global_moment, settled_step

moments = st.builds(lambda step: (step, f"00{step:06d}"), st.integers(1, 6))
duties = st.dictionaries(st.integers(0, 3), st.sets(moments))


@given(st.sets(moments), duties)
def test_the_global_moment_is_one_to_which_every_node_has_done_its_duty(complete, done) -> None:  # type: ignore[no-untyped-def]
    found = global_moment(complete, done, nodes=range(4))

    def is_global(moment: tuple[int, str]) -> bool:
        return moment in complete and all(moment in done.get(node, ()) for node in range(4))

    assert found == max(filter(is_global, complete), default=None)


@given(st.sets(moments), duties, st.integers(0, 3), moments)
def test_more_news_never_takes_the_global_moment_back(complete, done, node, moment) -> None:  # type: ignore[no-untyped-def]
    before = global_moment(complete, done, nodes=range(4))
    told = {**done, node: {*done.get(node, ()), moment}}

    for after in (
        global_moment(complete, told, nodes=range(4)),
        global_moment({*complete, moment}, done, nodes=range(4)),
    ):
        assert before is None or (after is not None and after >= before)


@given(st.sets(moments), st.lists(st.none() | st.integers(0, 9), max_size=3))
def test_nothing_up_to_the_settled_step_is_outstanding(outstanding, passed) -> None:  # type: ignore[no-untyped-def]
    settled = settled_step(outstanding, passed=passed)

    reached = -1 if settled is None else settled
    assert all(step > reached for step, _ in outstanding)
    assert all(reached <= (-1 if step is None else step) for step in passed)
    if passed and None not in passed and not outstanding:
        assert settled == min(passed)
