"""What the nodes of a life offer for a save in which experts take turns, and what all offers together come to.

Where the slices of experts lie on several nodes, and their agents may know different commits, no agent can compose a
checkpoint alone. So each offers what its ranks hold and what it knows to be committed, waits for the offers of all
others, and composes from the same values as they (docs/decisions/0026-offers.md). On one node its own offer is all.

Offers are joined so that it does not matter how often, or in which order: of bases the newest counts, of what is known
to be finite everything, and an expert of which two nodes hold different steps is in pieces. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moc.errors import PlanDivergedError
from moc.format.relative import StateBase
from moc.plan.composition import is_counted_on, steps_of_experts
from moc.plan.freeing import Moment
from moc.routing import Capture, Routing
from moc.state import Expert

__all__ = ["Attempt", "Offer", "Offered", "OfferedExpert", "join", "joined", "offered_experts"]

Attempt = tuple[int, int, str]
"""A checkpoint of the run: incarnation, step, attempt."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class OfferedExpert:
    """What a node's ranks hold of an expert: the step of its bytes, None where they differ, and what these bytes have
    learned, None where they are of the snapshot's own step or nobody knows.
    """

    expert: Expert
    step: int | None
    learned: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One node's part of what a checkpoint is composed of; `moment` is the checkpoint's.

    base: the commit that it would grow from as this node knows it. finite: the attempts known to be all finite.
    composed: the digest of what this node has composed of all offers, None before. Only the lowest node gives the
    routing, and the outline of the small state of its lowest rank, relative to which all ranks of the job store theirs.
    """

    moment: Moment
    experts: tuple[OfferedExpert, ...]
    is_whole: bool
    is_inherited: bool
    base: Attempt | None = None
    finite: tuple[Attempt, ...] = ()
    routing: Routing | None = None
    composed: str | None = None
    state: StateBase | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What all offers for one checkpoint come to."""

    steps: Mapping[Expert, int | None]
    learned: Mapping[Expert, int]
    is_whole: bool
    is_inherited: bool
    base: Attempt | None
    finite: frozenset[Attempt] = field(default_factory=frozenset)
    routing: Routing | None = None


def join(offers: Sequence[Offer]) -> Offered:
    """Return what these offers, in the order of their nodes, come to; the lowest node's routes count.

    Raises: PlanDivergedError for offers of different checkpoints.
    """
    moments = sorted({offer.moment for offer in offers})
    if len(moments) != 1:
        raise PlanDivergedError(f"offers are of different checkpoints: moments={moments}")
    routing = offers[0].routing
    rows = [row for offer in offers for row in offer.experts]
    steps = steps_of_experts((row.expert, row.step) for row in rows)
    learned: dict[Expert, int] = {}
    for row in rows if routing is not None else ():
        if row.learned is not None and row.step == steps[row.expert]:
            learned.setdefault(row.expert, row.learned)
    return Offered(
        steps=steps,
        learned=learned,
        is_whole=any(offer.is_whole for offer in offers),
        is_inherited=any(offer.is_inherited for offer in offers),
        base=max((offer.base for offer in offers if offer.base is not None), default=None),
        finite=frozenset(attempt for offer in offers for attempt in offer.finite),
        routing=routing,
    )


def joined(mine: Offer, offers: Sequence[Offer], composed: str) -> Offer:
    """Return a node's offer once it has composed: with all that the others knew, so that an agent which is replaced
    before it has contributed, and whose successor knows less, composes the same.
    """
    offered = join(offers)
    return replace(mine, base=offered.base, finite=tuple(sorted(offered.finite)), composed=composed)


def offered_experts(
    steps: Mapping[Expert, int | None], captures: Sequence[Capture], step: int
) -> tuple[OfferedExpert, ...]:
    """Return the rows of an offer for a snapshot of this step: what a node's ranks hold, `steps`, and what older bytes
    have learned, as the first capture says that knows and is of the present count.
    """
    counted = [capture for capture in captures if is_counted_on(capture.routing, captures[0].routing)]

    def learned_by(expert: Expert, held: int | None) -> int | None:
        if held is None or held == step:
            return None
        known = (capture.learned_by(expert, held) for capture in counted)
        return next((count for count in known if count is not None), None)

    return tuple(
        OfferedExpert(expert=expert, step=held, learned=learned_by(expert, held))
        for expert, held in sorted(steps.items())
    )
