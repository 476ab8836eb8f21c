"""Freeing: never what is needed, and always enough for the next snapshot."""

from __future__ import annotations

from itertools import chain, combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from moc.plan.freeing import (
    Moment,
    Seal,
    attempt_id,
    complete_moments,
    freeable,
    hopeless_moments,
    moment_after,
    newest_moments,
)

LIFE = 2


def _seal(rank: int, step: int, incarnation: int = LIFE) -> Seal:
    return Seal(incarnation=incarnation, step=step, attempt=f"00{step:06d}", rank=rank, record=step)


def _moment(step: int) -> Moment:
    return (step, f"00{step:06d}")


def _subsets(values: range) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(values, size) for size in range(len(values) + 1)))


def test_every_arrangement_of_few_ranks_and_steps() -> None:
    checked = 0
    for ranks, last in ((2, 4), (3, 3)):
        steps = range(1, last + 1)
        pins = [(), *[(step,) for step in steps]]
        for held, pinned in product(product(_subsets(steps), repeat=ranks), pins):
            seals = [_seal(rank, step) for rank, own in enumerate(held) for step in own]
            old = [_seal(rank, 9, incarnation=1) for rank in range(ranks)]
            passed = newest_moments(seals, LIFE)
            hopeless = hopeless_moments(seals, range(ranks), LIFE, passed=passed)
            freed = freeable(
                [*seals, *old],
                range(ranks),
                LIFE,
                pinned=[(LIFE, _moment(step)) for step in pinned],
                source=None,
                hopeless=hopeless,
            )
            complete = [step for step in steps if all(step in own for own in held)]
            assert complete_moments(seals, range(ranks), LIFE) == tuple(map(_moment, complete))
            newest = complete[-1] if complete else 0
            for seal in freed:
                assert seal.incarnation < LIFE or seal.step not in pinned, "pinned"
                assert seal.incarnation < LIFE or seal.step != newest, "the newest global snapshot"
                if seal.incarnation == LIFE and seal.step > newest:
                    lacking = [own for own in held if seal.step not in own]
                    assert any(own and own[-1] > seal.step for own in lacking), "it may still become global"
                assert seal.incarnation == LIFE or complete, "a former life's, before this one has a global snapshot"
            kept = {(seal.rank, seal.step) for seal in {*seals, *old} - set(freed) if seal.incarnation == LIFE}
            for rank, step in kept:
                ranks_that_may = [r for r, own in enumerate(held) if step in own or not own or own[-1] < step]
                assert step in pinned or step == newest or (step > newest and len(ranks_that_may) == ranks), (
                    rank,
                    step,
                )
            checked += 1
    assert checked == 5 * 16**2 + 4 * 8**3


def test_the_source_stays_until_the_life_stands_on_its_own() -> None:
    old = [_seal(rank, step, incarnation=1) for rank in (0, 1) for step in (5, 6)]
    assert not freeable(old, (0, 1), LIFE, pinned=[], source=(1, _moment(6)))
    own = [_seal(0, 7), _seal(1, 7)]
    freed = freeable([*old, *own], (0, 1), LIFE, pinned=[], source=(1, _moment(6)))
    assert {(seal.incarnation, seal.step) for seal in freed} == {(1, 5)}
    freed = freeable([*old, *own], (0, 1), LIFE, pinned=[(1, _moment(5))], source=None)
    assert {(seal.incarnation, seal.step) for seal in freed} == {(1, 6)}


def test_a_rank_that_was_seen_between_two_of_its_seals_has_not_skipped() -> None:
    # The agent read rank 1's record of step 4 before it was sealed, and that of step 5 after:
    # only `passed` of an earlier look counts.
    seals = [_seal(0, 4), _seal(0, 5), _seal(1, 5)]
    before = {0: _moment(3), 1: _moment(3)}
    assert hopeless_moments(seals, (0, 1), LIFE, passed=before) == {}
    assert hopeless_moments(seals, (0, 1), LIFE, passed=newest_moments(seals, LIFE)) == {_moment(4): (1,)}


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 3).flatmap(
        lambda ranks: st.tuples(
            st.just(ranks),
            st.integers(2, 4),
            st.lists(st.tuples(st.sets(st.integers(0, ranks - 1)), st.booleans(), st.integers(0, 4)), max_size=40),
        )
    )
)
def test_whatever_was_skipped_snapshots_become_global_again(
    case: tuple[int, int, list[tuple[set[int], bool, int]]],
) -> None:
    """Ranks seal into few records and skip when busy; the agent looks now and then, and sometimes pins the newest."""
    ranks, versions, script = case
    held: list[set[int]] = [set() for _ in range(ranks)]
    passed: dict[int, Moment] = {}
    pinned: list[int] = []
    told = [0] * ranks  # the newest step that each rank says it has skipped
    newest = 0

    def end_step(busy: set[int]) -> None:
        for rank in range(ranks):
            if rank not in busy and len(held[rank]) < versions:
                held[rank].add(step)
            else:
                told[rank] = step

    def look() -> None:
        nonlocal passed, newest
        seals = [_seal(rank, step) for rank, own in enumerate(held) for step in own]
        complete = complete_moments(seals, range(ranks), LIFE)
        assert not newest or (complete and complete[-1][0] >= newest), "the global step never goes back"
        newest = complete[-1][0] if complete else 0
        for rank, skipped in enumerate(told):
            passed[rank] = max(passed.get(rank, (0, "")), moment_after(skipped, 0))
        hopeless = hopeless_moments(seals, range(ranks), LIFE, passed=passed)
        passed = newest_moments(seals, LIFE)
        pins = [(LIFE, _moment(step)) for step in pinned]
        for seal in freeable(seals, range(ranks), LIFE, pinned=pins, source=None, hopeless=hopeless):
            held[seal.rank].discard(seal.step)

    step = 0
    for busy, looks, pin in script:
        step += 1
        end_step(busy)
        if looks:
            look()
        pinned = [newest] if pin == 0 and newest and versions > 2 else [] if pin == 1 else pinned
    pinned = []
    for _ in range(4):
        look()
    for _ in range(3 * versions):
        step += 1
        end_step(set())
        look()
    assert newest >= step - 1


@given(st.integers(0, 300), st.integers(0, 10**6))
def test_attempts_sort_in_the_order_they_were_made(ordinal: int, step: int) -> None:
    first = attempt_id("run", 1, "token", step, ordinal)
    assert len(first) == 8
    assert first == attempt_id("run", 1, "token", step, ordinal)
    if ordinal % 256 != 255:
        assert first < attempt_id("run", 1, "token", step, ordinal + 1)
    assert first != attempt_id("run", 1, "other", step, ordinal)
