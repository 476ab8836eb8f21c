"""Offers of several nodes: however ranks are spread over nodes, every node composes what one node would alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import PlanDivergedError
from moc.plan.composition import Base, Composition, compose, steps_of_experts
from moc.plan.offers import Attempt, Offer, Offered, OfferedExpert, join, joined, offered_experts
from moc.plan.select import LoadAware, Sequential
from moc.routing import KEPT, Capture, Counts, Routing
from moc.state import Expert
from tests.plan.test_composition import committed, experts_of, name_of, sealed_of, terms_of

STEP, OLD = 10, (4, 5, 9)
FIRST: Attempt = (1, 5, "00000000")
EXPERT = Expert(layer=0, index=0)

Slices = Mapping[Expert, int]
"""What one rank holds."""


def learned(expert: Expert, step: int) -> int:
    """Return what the run's only version of an expert at a step has learned."""
    return 1000 * (expert.layer + 1) + 10 * step + expert.index


def counts(grid: Sequence[int], steps: Mapping[Expert, int]) -> Counts:
    return tuple(
        tuple(learned(e, steps[e]) for e in (Expert(layer=layer, index=index) for index in range(count)))
        for layer, count in enumerate(grid)
    )


def offer_of(ranks: Sequence[Slices], captures: Sequence[Capture], base: Base | None, *, is_whole: bool) -> Offer:
    """Return what an agent with these ranks offers."""
    steps = steps_of_experts((expert, step) for held in ranks for expert, step in held.items())
    names = [] if base is None else sorted(base.finite)
    return Offer(
        moment=(STEP, "00000000"),
        experts=offered_experts(steps, captures, STEP),
        is_whole=is_whole,
        is_inherited=False,
        base=None if base is None else (base.name.incarnation, base.name.step, base.name.attempt),
        finite=tuple((name.incarnation, name.step, name.attempt) for name in names),
        routing=captures[0].routing if captures else None,
    )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_node_composes_what_one_node_would_however_ranks_are_spread(data: st.DataObject) -> None:
    grid = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    experts = experts_of(grid)
    size = data.draw(st.integers(2, 5))
    ranks: list[dict[Expert, int]] = [{} for _ in range(size)]
    for expert in experts:
        step = data.draw(st.sampled_from([STEP, *OLD]))
        for rank in data.draw(st.sets(st.integers(0, size - 1), min_size=1)):
            is_torn = data.draw(st.integers(0, 9)) == 0
            ranks[rank][expert] = data.draw(st.sampled_from(OLD)) if is_torn else step
    routing = Routing(basis=KEPT, routed=(now := counts(grid, dict.fromkeys(experts, STEP))), learned=now)
    captures = []
    for held in ranks if data.draw(st.booleans()) else ():
        known = {e: held[e] if e in held else data.draw(st.sampled_from([STEP, *OLD])) for e in experts}
        columns = tuple(tuple(known[Expert(layer=n, index=i)] for i in range(count)) for n, count in enumerate(grid))
        captures.append(Capture(routing=routing, captured=counts(grid, known), steps=columns))
    base = committed(4, dict.fromkeys(experts, 4), None, None)
    is_whole = data.draw(st.booleans())
    places = sorted(data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size)))

    alone = join([offer_of(ranks, captures, base, is_whole=is_whole)])
    offers = [
        offer_of([ranks[r] for r in here], [captures[r] for r in here if captures], base, is_whole=is_whole)
        for here in ([r for r in range(size) if places[r] == node] for node in sorted(set(places)))
    ]
    together = join(offers)

    assert together == alone
    policy = LoadAware(1) if captures else Sequential(1)
    compositions = [
        _composed(offered, base, None if is_whole else terms_of(grid, policy)) for offered in (alone, together)
    ]
    assert compositions[0] == compositions[1]
    told = [joined(offer, offers, "digest") for offer in offers]
    late = [data.draw(st.sampled_from(pair)) for pair in zip(offers, told, strict=True)]
    assert join(late) == together, "it does not matter who has composed already"


def _composed(offered: Offered, base: Base, terms: object) -> tuple[Composition, str]:
    sealed = replace(sealed_of(name_of(STEP), offered.steps), routing=offered.routing, learned=offered.learned)
    composition = compose(sealed, base, terms)  # type: ignore[arg-type]  # Terms or None
    return composition, composition.digest


def _offer(**change: object) -> Offer:
    rows = (OfferedExpert(expert=EXPERT, step=5, learned=3),)
    return replace(Offer(moment=(STEP, "00000000"), experts=rows, is_whole=False, is_inherited=False), **change)


def test_the_newest_base_counts_and_whatever_anybody_knows_to_be_finite() -> None:
    newer = (1, 8, "00000000")
    offered = join([_offer(base=FIRST, finite=(FIRST,)), _offer(base=newer, finite=(newer,)), _offer(base=None)])
    assert (offered.base, offered.finite) == (newer, {FIRST, newer})
    assert join([_offer(), _offer()]).base is None


def test_one_node_that_wants_all_makes_a_whole_checkpoint() -> None:
    offered = join([_offer(), _offer(is_whole=True), _offer(is_inherited=True)])
    assert offered.is_whole
    assert offered.is_inherited


def test_nothing_is_counted_where_the_lowest_node_counts_nothing() -> None:
    routing = Routing(basis=KEPT, routed=((9,),), learned=((9,),))
    offered = join([_offer(), _offer(routing=routing)])
    assert (offered.routing, dict(offered.learned)) == (None, {})
    assert dict(join([_offer(routing=routing), _offer()]).learned) == {EXPERT: 3}


def test_offers_for_different_checkpoints_are_not_joined() -> None:
    with pytest.raises(PlanDivergedError, match="different checkpoints"):
        join([_offer(), _offer(moment=(STEP, "00000001"))])


def test_a_digest_tells_all_that_a_manifest_says_of_experts() -> None:
    experts = experts_of([4])
    base = committed(5, dict.fromkeys(experts, 5), None, None)
    sealed, terms = sealed_of(name_of(STEP), dict.fromkeys(experts, STEP)), terms_of([4], Sequential(1))
    composition = compose(sealed, base, terms)
    routing = Routing(basis=KEPT, routed=((9,) * 4,), learned=((9,) * 4,))
    others = [
        compose(sealed, base, None),
        compose(sealed, replace(base, finite=frozenset()), terms),
        replace(composition, written=composition.written[1:]),
        replace(composition, stale=composition.stale[1:]),
        replace(composition, kept=()),
        replace(composition, kept=tuple(row._replace(header_crc32c=1) for row in composition.kept)),
        replace(composition, routing=routing),
    ]
    digests = [composition.digest, *(other.digest for other in others)]
    assert len(set(digests)) == len(digests), json.dumps(digests)
    assert compose(sealed, base, terms).digest == composition.digest
