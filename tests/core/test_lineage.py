"""Lineage: what is on the chain, and in which order it is tried."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from moc.format.manifest import Incarnation, Parent
from moc.plan.lineage import (
    MEMORY,
    STORAGE,
    Candidate,
    candidates,
    chain,
    faults_of,
    is_on_chain,
    merge_incarnations,
    tip,
)


def _life(number: int, parent: tuple[int, int] | None, *, token: str = "t", attempt: str | None = None) -> Incarnation:
    grown = None if parent is None else Parent(incarnation=parent[0], step=parent[1], attempt=attempt)
    return Incarnation(
        run="r", number=number, token=token, parent=grown, reason="start" if parent is None else "recover"
    )


def _candidate(source: str, incarnation: int, step: int, attempt: str = "00000000") -> Candidate:
    return Candidate(source=source, run="r", incarnation=incarnation, step=step, attempt=attempt)


@st.composite
def histories(
    draw: st.DrawFn,
) -> tuple[dict[int, Incarnation], list[Candidate], dict[tuple[int, int], frozenset[tuple[int, int]]]]:
    """Grow lives as a job does: each resumes from any state that any earlier life has reached.

    Returns the records, all states as candidates, and for every state the set of states that led to it.
    """
    records: dict[int, Incarnation] = {}
    past: dict[tuple[int, int], frozenset[tuple[int, int]]] = {}
    for number in range(1, draw(st.integers(1, 6)) + 1):
        parent = draw(st.sampled_from(sorted(past))) if past and draw(st.integers(0, 5)) else None
        records[number] = _life(number, parent)
        before = frozenset() if parent is None else past[parent]
        for step in range(
            (0 if parent is None else parent[1]) + 1, (0 if parent is None else parent[1]) + draw(st.integers(0, 4)) + 1
        ):
            before |= {(number, step)}
            past[number, step] = before
    known = [
        _candidate(draw(st.sampled_from((MEMORY, STORAGE))), number, step)
        for number, step in sorted(past)
        for _ in range(draw(st.integers(0, 2)))
    ]
    return records, known, past


@settings(max_examples=200, deadline=None)
@given(histories())
def test_only_what_led_to_the_newest_life_is_tried_newest_first(history: object) -> None:
    records, known, past = history  # type: ignore[misc]
    newest = tip(records)
    links = chain(records, newest)
    tried = candidates(links, known)

    # What the newest life may resume from: its own states, and the parent state with all that led to it.
    own = [state for state in past if state[0] == newest]
    parent = records[newest].parent
    grown = frozenset() if parent is None else past[parent.incarnation, parent.step]
    admissible = grown | set(own)
    assert {(c.incarnation, c.step) for c in tried} == {(c.incarnation, c.step) for c in known} & admissible
    order = [(c.incarnation, c.step) for c in tried]
    assert order == sorted(order, reverse=True), (
        "an earlier life is tried after a later one, a smaller step after a larger one"
    )
    for one, other in pairwise(tried):
        if (one.incarnation, one.step) == (other.incarnation, other.step):
            assert (one.source, other.source) != (STORAGE, MEMORY)


def test_a_rewind_outranks_newer_memory_of_the_life_that_it_leaves() -> None:
    lives = {1: _life(1, None), 2: _life(2, (1, 10), attempt="0000000a")}
    links = chain(lives, 2)
    known = [
        _candidate(MEMORY, 1, 17),
        _candidate(MEMORY, 1, 16),
        _candidate(STORAGE, 1, 10, "0000000a"),
        _candidate(STORAGE, 1, 15),
    ]
    assert [c.step for c in candidates(links, known)] == [10]
    assert not is_on_chain(links, 1, 11)


def test_a_fork_names_the_attempt_it_grew_from() -> None:
    links = chain({1: _life(1, None), 2: _life(2, (1, 10), attempt="0000000a")}, 2)
    known = [
        _candidate(STORAGE, 1, 10, "0100000b"),
        _candidate(STORAGE, 1, 10, "0000000a"),
        _candidate(STORAGE, 1, 9, "0000000c"),
    ]
    assert [c.attempt for c in candidates(links, known)] == ["0000000a", "0000000c"]


def test_of_one_step_the_latest_attempt_is_tried_first_and_memory_before_storage() -> None:
    links = chain({1: _life(1, None)}, 1)
    known = [
        _candidate(STORAGE, 1, 5, "00aaaaaa"),
        _candidate(STORAGE, 1, 5, "01000000"),
        _candidate(MEMORY, 1, 5, "00aaaaaa"),
    ]
    assert [(c.source, c.attempt) for c in candidates(links, known)] == [
        (MEMORY, "00aaaaaa"),
        (STORAGE, "01000000"),
        (STORAGE, "00aaaaaa"),
    ]


def test_a_missing_ancestor_ends_the_chain_and_is_marked() -> None:
    links = chain({3: _life(3, (2, 7))}, 3)
    assert [(link.incarnation, link.is_known) for link in links] == [(3, True), (2, False)]
    assert [link.incarnation for link in chain({2: _life(2, (2, 7))}, 2)] == [2], (
        "a record that names itself as its parent"
    )
    assert chain({}, 0) == ()


def test_a_stored_record_outranks_one_that_only_memory_knows() -> None:
    stored, remembered = _life(2, (1, 4), token="stored"), _life(2, (1, 9), token="memory")
    assert merge_incarnations([stored], [remembered, _life(1, None)])[2] is stored
    assert tip(merge_incarnations([stored], [_life(3, (2, 5))])) == 3


def test_faults_are_lives_that_went_on_from_storage_after_a_failure() -> None:
    lives = [
        _life(1, None),
        _life(2, (1, 5)),
        _life(3, (2, 7), attempt="00000000"),
        replace(_life(4, (2, 7), attempt="00000000"), reason="rewind"),
        _life(5, (4, 9), attempt="00000000"),
    ]

    assert faults_of(lives) == 2
    assert faults_of([*lives, lives[-1]]) == 2, "each once"
    assert faults_of(lives[:2]) == 0, "from memory nothing is lost"


def test_the_snapshot_of_the_second_checkpoint_that_a_life_grew_from_is_on_the_chain() -> None:
    """A life that dies early finds again what it took from it; another attempt of the step led elsewhere."""
    first, second, other = "00abcdef", "00abcdf0", "01abcdef"
    records = {1: _life(1, None), 2: _life(2, (1, 5), attempt=second)}
    known = [
        _candidate(STORAGE, 1, 5, second),
        _candidate(MEMORY, 1, 5, first),
        _candidate(MEMORY, 1, 5, other),
        _candidate(MEMORY, 1, 4),
    ]
    tried = candidates(chain(records, 2), known)
    assert set(tried) == {known[0], known[1], known[3]}

    records[2] = _life(2, (1, 5), attempt=first)
    assert not is_on_chain(chain(records, 2), 1, 5, second), "its experts are newer than what the life grew from"
