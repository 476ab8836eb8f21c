"""What one agent tells the others of its life: a report of all it knows, whole and new each time. Pure.

A report replaces every earlier one of its node, so that a lost, late or repeated message does no harm: `order` says
which of two is newer, across restarts of an agent too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from moc.errors import MocError, UsageError
from moc.format.keys import ATTEMPT_PATTERN, INCARNATION_LIMIT, LAST_STEP, parse_object_key
from moc.format.manifest import ObjectRow, Parent
from moc.format.relative import StateBase
from moc.persist import Receipt
from moc.plan.freeing import Moment, Seal, second_attempt
from moc.plan.offers import Attempt, Offer, OfferedExpert
from moc.routing import COUNT_LIMIT, Routing
from moc.state import Expert

__all__ = [
    "NOBODY",
    "Contribution",
    "Order",
    "Others",
    "Report",
    "Verdict",
    "Wish",
    "offer_from_text",
    "order_from_json",
    "report_from_json",
]

T = TypeVar("T")
Order = tuple[int, int]
"""Of reports of one node: when its agent began, and how many it had told before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A node's part of a save: the receipts of its ranks, and the commit that the save follows as this node sees it.

    What a manifest says beside the receipts is taken from the lowest node's.
    """

    moment: Moment
    parent: Parent | None
    receipts: tuple[Receipt, ...]
    routing: Routing | None = None
    """The routes of the run as one of the lowest node's ranks has captured them; None from others, and where the nodes
    composed together."""
    composed: str | None = None
    """The digest of what the nodes have composed together."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Wish:
    """A moment that is to be saved although nobody has flagged it: an agent leaves. With `is_second` its checkpoint is
    another one than the moment's own, because it has other experts.
    """

    moment: Moment
    is_second: bool
    is_inherited: bool = False
    """Whether the moment is one of an earlier life, from which the present one was recovered."""

    @property
    def target(self) -> Moment:
        """The moment of the checkpoint."""
        step, attempt = self.moment
        return (step, second_attempt(attempt) if self.is_second else attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a save has ended, as a node knows it; `error` is None where it is committed."""

    moment: Moment
    size_bytes: int
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one node's agent knows of its life.

    held: the moments in its memory, and which of its ranks hold them. passed: how far each rank has come; what it has
    passed and does not hold, it never will. ended: ranks whose trainer is dead. wishes: what this agent leaves with.
    done: the newest moments of which every host of this node that is not away holds a replica. leaning: held moments
    of which this node has experts in pieces, while it shows a recovery memory of another layout. offer: for a save in
    which experts take turns, until it is committed.
    """

    node: int
    order: Order
    url: str
    held: tuple[tuple[Moment, tuple[int, ...]], ...]
    passed: tuple[tuple[int, Moment], ...]
    ended: tuple[int, ...]
    wishes: tuple[Wish, ...]
    contributions: tuple[Contribution, ...]
    verdicts: tuple[Verdict, ...]
    done: tuple[Moment, ...] = ()
    leaning: tuple[Moment, ...] = ()
    offer: Offer | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "node": self.node,
            "order": list(self.order),
            "url": self.url,
            "held": [[*moment, list(ranks)] for moment, ranks in self.held],
            "passed": [[rank, *moment] for rank, moment in self.passed],
            "ended": list(self.ended),
            "wishes": [[*wish.moment, wish.is_second, wish.is_inherited] for wish in self.wishes],
            "contributions": [_contribution_to_json(part) for part in self.contributions],
            "verdicts": [[*v.moment, v.size_bytes, v.error] for v in self.verdicts],
            "done": [list(moment) for moment in self.done],
            "leaning": [list(moment) for moment in self.leaning],
            "offer": None if self.offer is None else json.dumps(_offer_to_json(self.offer), separators=(",", ":")),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """What all other nodes have reported, as far as freeing and saves are concerned; NOBODY on one node.

    silent: nodes that have not answered for a while.
    """

    seals: tuple[Seal, ...] = ()
    passed: Mapping[int, Moment] = field(default_factory=dict)
    ended: frozenset[int] = frozenset()
    wishes: frozenset[Wish] = frozenset()
    verdicts: tuple[Verdict, ...] = ()
    done: Mapping[int, tuple[Moment, ...]] = field(default_factory=dict)
    leaning: frozenset[Moment] = frozenset()
    silent: tuple[int, ...] = ()


NOBODY = Others()


def order_from_json(row: Any) -> Order:
    """Return which report is meant; raises UsageError for what is none."""
    try:
        born, number = map(_count, row)
    except (TypeError, ValueError) as error:
        raise UsageError(f"not the order of a report: given={row!r:.80}") from error
    return (born, number)


def offer_from_text(text: str) -> Offer:
    """Return the offer in a report; raises ValueError and the like for what is none.

    It is a text of its own, because it is most of a report and mostly what it was in the one before.
    """
    try:
        return _offer_from_json(json.loads(text))
    except RecursionError as error:
        raise ValueError("an offer is nested too deep") from error


def report_from_json(
    body: Mapping[str, Any], *, node: int, ranks: tuple[int, ...], read_offer: Callable[[str], Offer] = offer_from_text
) -> Report:
    """Return a report of this node, which has these ranks; raises UsageError for what no agent says.

    `read_offer` is called as `offer_from_text`, by who may know what comes out.
    """
    try:
        report = Report(
            node=_count(body["node"]),
            order=order_from_json(body["order"]),
            url=_text(body["url"]),
            held=tuple((_moment(row[:2]), tuple(map(_count, row[2]))) for row in body["held"]),
            passed=tuple((_count(row[0]), _moment(row[1:])) for row in body["passed"]),
            ended=tuple(map(_count, body["ended"])),
            wishes=tuple(map(_wish_from_json, body["wishes"])),
            contributions=tuple(map(_contribution_from_json, body["contributions"])),
            verdicts=tuple(
                Verdict(moment=_moment(row[:2]), size_bytes=_count(row[2]), error=_maybe(_text, row[3]))
                for row in body["verdicts"]
            ),
            done=tuple(map(_moment, body["done"])),
            leaning=tuple(map(_moment, body["leaning"])),
            offer=_maybe(lambda text: read_offer(_text(text)), body["offer"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError, MocError) as error:
        raise UsageError(f"report is not readable: node={node} reason={type(error).__name__}: {error}") from error
    told = [rank for _, held in report.held for rank in held]
    told += [*(rank for rank, _ in report.passed), *report.ended]
    told += [receipt.rank for part in report.contributions for receipt in part.receipts]
    told += [] if report.offer is None or report.offer.state is None else [report.offer.state.rank]
    if report.node != node or not set(told) <= set(ranks):
        raise UsageError(f"report speaks for others: node={node} given={report.node} ranks={sorted(set(told))}")
    return report


def _contribution_to_json(part: Contribution) -> list[object]:
    parent = part.parent
    above = None if parent is None else [parent.incarnation, parent.step, parent.attempt]
    routing = None if part.routing is None else part.routing.to_json()
    return [*part.moment, above, [_receipt_to_json(receipt) for receipt in part.receipts], routing, part.composed]


def _contribution_from_json(row: Any) -> Contribution:
    step, attempt, above, receipts, routing, composed = row
    return Contribution(
        moment=_moment([step, attempt]),
        parent=_maybe(
            lambda p: Parent(incarnation=_count(p[0]), step=_count(p[1]), attempt=_maybe(_text, p[2])), above
        ),
        receipts=tuple(map(_receipt_from_json, receipts)),
        routing=_maybe(Routing.from_json, routing),
        composed=_maybe(_text, composed),
    )


def _offer_to_json(offer: Offer) -> dict[str, object]:
    return {
        "moment": list(offer.moment),
        "experts": [
            [row.expert.layer, row.expert.index, row.step, *([] if row.learned is None else [row.learned])]
            for row in offer.experts
        ],
        "is_whole": offer.is_whole,
        "is_inherited": offer.is_inherited,
        "base": None if offer.base is None else list(offer.base),
        "finite": [list(attempt) for attempt in offer.finite],
        "routing": None if offer.routing is None else offer.routing.to_json(),
        "composed": offer.composed,
        "state": None if offer.state is None else [offer.state.rank, sorted(d.hex() for d in offer.state.outline)],
    }


def _offer_from_json(body: Any) -> Offer:
    offer = Offer(
        moment=_moment(body["moment"]),
        experts=tuple(_expert_from_json(*row) for row in body["experts"]),
        is_whole=_fact(body["is_whole"]),
        is_inherited=_fact(body["is_inherited"]),
        base=_maybe(_attempt, body["base"]),
        finite=tuple(map(_attempt, body["finite"])),
        routing=_maybe(Routing.from_json, body["routing"]),
        composed=_maybe(_text, body["composed"]),
        state=_maybe(_state_from_json, body["state"]),
    )
    step, experts = offer.moment[0], [row.expert for row in offer.experts]
    if any(one >= other for one, other in pairwise(experts)):
        raise ValueError(f"experts are not ascending: step={step}")
    if any(row.step is not None and row.step > step for row in offer.experts):
        raise ValueError(f"an expert is newer than its snapshot: step={step}")
    if any(row.learned is not None and row.learned > COUNT_LIMIT for row in offer.experts):
        raise ValueError(f"an expert has learned too much: allowed=0..{COUNT_LIMIT}")
    return offer


def _state_from_json(row: Any) -> StateBase:
    rank, digests = row
    return StateBase(rank=_count(rank), outline=frozenset(bytes.fromhex(_text(digest)) for digest in digests))


def _expert_from_json(layer: Any, index: Any, step: Any, learned: Any = None) -> OfferedExpert:
    expert = Expert(layer=_count(layer), index=_count(index))
    return OfferedExpert(expert=expert, step=_maybe(_count, step), learned=_maybe(_count, learned))


def _receipt_to_json(receipt: Receipt) -> list[object]:
    rows = [[row.key, row.size_bytes, row.header_bytes, row.header_crc32c] for row in receipt.rows]
    return [receipt.rank, receipt.digest, receipt.is_finite, rows]


def _receipt_from_json(row: Any) -> Receipt:
    rank, digest, is_finite, rows = row
    objects = []
    for key, *numbers in rows:
        parse_object_key(_text(key))
        size, header, crc = map(_count, numbers)
        objects.append(ObjectRow(key=key, size_bytes=size, header_bytes=header, header_crc32c=crc))
    return Receipt(rank=_count(rank), digest=_text(digest), rows=tuple(objects), is_finite=_fact(is_finite))


def _wish_from_json(row: Any) -> Wish:
    step, attempt, is_second, is_inherited = row
    if not re.fullmatch(ATTEMPT_PATTERN, _text(attempt), re.ASCII):
        raise ValueError(f"not an attempt: {attempt!r}")
    return Wish(moment=(_count(step), attempt), is_second=_fact(is_second), is_inherited=_fact(is_inherited))


def _moment(row: Any) -> Moment:
    step, attempt = row
    return (_count(step), _text(attempt))


def _attempt(row: Any) -> Attempt:
    incarnation, step, attempt = row
    if not 1 <= _count(incarnation) <= INCARNATION_LIMIT or _count(step) > LAST_STEP:
        raise ValueError(f"not an attempt: {row!r}")
    if not re.fullmatch(ATTEMPT_PATTERN, _text(attempt), re.ASCII):
        raise ValueError(f"not an attempt: {row!r}")
    return (incarnation, step, attempt)


def _fact(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"not a fact: {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"not a count: {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a text: {value!r}")
    return value


def _maybe(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)
