"""Lost-token accounting: what was routed to each expert, and how much of it the expert's present bytes have learned.

A *route* is one token sent to one expert. `routed` counts the routes of the run up to a step, `learned` those whose
updates are in the expert's bytes. Both are part of the state at that step: a step that is run again counts once. A
recovery that takes an expert from an older version sets what it has learned back to what that version had, so that
routes lost by one fault are not lost a second time by the next. The proportion of lost tokens (PLT) is the mean over
the layers of (routed - learned) / routed, equation 7 of the MoC paper.

Pure, and without torch. What is wrong raises ValueError or TypeError; whoever knows where it came from translates.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moc.state import Expert

__all__ = [
    "BASES",
    "BEFORE_DROPS",
    "COUNT_LIMIT",
    "KEPT",
    "ROUTING_KEY",
    "Capture",
    "Counts",
    "Routing",
    "capture_tree",
    "lose",
]

KEPT = "kept"
BEFORE_DROPS = "routed, before drops"
BASES = (KEPT, BEFORE_DROPS)
"""What is counted: routes that reach their expert, or those that the gate chose, before a capacity limit drops some."""
ROUTING_KEY = "routing"
"""Where a state tree has its captured routes, absent where nothing counts them."""
COUNT_LIMIT = (1 << 63) - 1

COLUMNS = ("routed", "learned", "captured", "steps")

Counts = tuple[tuple[int, ...], ...]
"""By MoE layer and global expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The routes of the run up to one step, over all ranks, since counting began; `basis` says what is counted."""

    basis: str
    routed: Counts
    learned: Counts

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise ValueError(f"unknown basis of routes: basis={self.basis!r:.80} allowed={list(BASES)}")
        _check_counts("routed", self.routed)
        _check_below("learned", self.learned, self.routed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the number of experts of each MoE layer."""
        return _shape(self.routed)

    @property
    def lost(self) -> tuple[int, ...]:
        """Return, by layer, the routes whose updates recoveries have lost."""
        return tuple(sum(row) for row in _difference(self.routed, self.learned))

    @property
    def plt(self) -> float:
        """Return the proportion of lost tokens, 0..1; a layer without routes has lost nothing."""
        shares = [lost / max(1, sum(row)) for lost, row in zip(self.lost, self.routed, strict=True)]
        return sum(shares) / len(shares)

    def to_json(self) -> dict[str, object]:
        lost = _difference(self.routed, self.learned)
        return {
            "basis": self.basis,
            "routed": [list(row) for row in self.routed],
            "lost": [list(row) for row in lost],
        }

    @staticmethod
    def from_json(body: object) -> Routing:
        """Build a routing from `to_json`'s value; raises ValueError or TypeError on anything else."""
        if not isinstance(body, Mapping) or not {"basis", "routed", "lost"} <= body.keys():
            raise ValueError("routes are incomplete: allowed=basis, routed and lost")
        routed, lost = _counts_of("routed", body["routed"]), _counts_of("lost", body["lost"])
        _check_counts("routed", routed)
        _check_below("lost", lost, routed)
        return Routing(basis=_text(body["basis"]), routed=routed, learned=_difference(routed, lost))


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What the state of a snapshot says about routes.

    `captured` is what the experts' bytes in the snapshot have learned, and `steps` the steps of these bytes as the rank
    knows them that took the snapshot: one that missed a snapshot holds an older version than the others believe.
    """

    routing: Routing
    captured: Counts
    steps: Counts

    def __post_init__(self) -> None:
        _check_below("captured", self.captured, self.routing.learned)
        _check_counts("steps", self.steps)
        if _shape(self.steps) != self.routing.shape:
            raise ValueError(f"steps belong to another model: experts={_shape(self.steps)} routed={self.routing.shape}")

    def learned_by(self, expert: Expert, step: int) -> int | None:
        """Return what the version of this step has learned, None where the capture is of another version."""
        is_known = self.steps[expert.layer][expert.index] == step
        return self.captured[expert.layer][expert.index] if is_known else None

    def to_tree(self) -> dict[str, object]:
        """Return plain values for a state tree."""
        counts = {name: getattr(self.routing, name) for name in ("routed", "learned")}
        counts |= {"captured": self.captured, "steps": self.steps}
        return capture_tree(
            self.routing.basis, self.routing.shape, {name: _pack(rows) for name, rows in counts.items()}
        )

    @staticmethod
    def from_tree(tree: object) -> Capture:
        """Build a capture from `to_tree`'s value; raises ValueError or TypeError on anything else."""
        if not isinstance(tree, Mapping) or not {"basis", "experts", *COLUMNS} <= tree.keys():
            raise ValueError(f"captured routes are incomplete: allowed=basis, experts, {', '.join(COLUMNS)}")
        shape = tree["experts"]
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise TypeError(f"numbers of experts are wrong: given={shape!r:.80} allowed=one per MoE layer, at least 1")
        routed, learned, captured, steps = (_unpack(name, tree[name], shape) for name in COLUMNS)
        routing = Routing(basis=_text(tree["basis"]), routed=routed, learned=learned)
        return Capture(routing=routing, captured=captured, steps=steps)


def capture_tree(basis: str, experts: Sequence[int], columns: Mapping[str, bytes]) -> dict[str, object]:
    """Return a capture as plain values for a state tree.

    `columns` has the names of `COLUMNS`: counts as little-endian int64, layer after layer.
    """
    return {"basis": basis, "experts": list(experts), **{name: columns[name] for name in COLUMNS}}


def lose(routing: Routing, lost_at: Mapping[Expert, int]) -> Routing:
    """Return the routing after a recovery that took these experts from older versions.

    `lost_at` is, by expert, what the version has learned: `Capture.captured` of its snapshot, or the count in its
    checkpoint's row of a stale expert. A number that cannot be costs nobody a state: more than was routed is of another
    count, which ended before this one began, so of this one the version has learned nothing; an expert without a count
    loses nothing.
    """
    rows = [list(row) for row in routing.learned]
    for expert, learned in sorted(lost_at.items()):
        if expert.layer < len(rows) and expert.index < len(rows[expert.layer]):
            is_possible = learned <= routing.routed[expert.layer][expert.index]
            rows[expert.layer][expert.index] = learned if is_possible else 0
    return replace(routing, learned=tuple(tuple(row) for row in rows))


def _check_counts(name: str, counts: Counts) -> None:
    if not counts or not all(counts):
        raise ValueError(f"a layer without experts: name={name} experts={_shape(counts)} allowed=at least 1 in each")
    for layer, row in enumerate(counts):
        for index, count in enumerate(row):
            if type(count) is not int:
                raise TypeError(f"count is no integer: name={name} {layer=} expert={index} given={count!r:.80}")
            if not 0 <= count <= COUNT_LIMIT:
                raise ValueError(f"count is out of range: name={name} {layer=} expert={index} {count=}")


def _check_below(name: str, counts: Counts, most: Counts) -> None:
    """Raise unless there is one count per expert, and none is greater than the expert's in `most`."""
    _check_counts(name, counts)
    if _shape(counts) != _shape(most):
        raise ValueError(f"counts belong to another model: name={name} experts={_shape(counts)} routed={_shape(most)}")
    for layer, rows in enumerate(zip(counts, most, strict=True)):
        for index, (count, limit) in enumerate(zip(*rows, strict=True)):
            if count > limit:
                raise ValueError(f"count is too large: name={name} {layer=} expert={index} {count=} allowed=0..{limit}")


def _difference(counts: Counts, less: Counts) -> Counts:
    return tuple(tuple(n - m for n, m in zip(*rows, strict=True)) for rows in zip(counts, less, strict=True))


def _shape(counts: Counts) -> tuple[int, ...]:
    return tuple(len(row) for row in counts)


def _counts_of(name: str, rows: object) -> Counts:
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise TypeError(f"counts are not a list per layer: name={name} given={rows!r:.80}")
    return tuple(tuple(row) for row in rows)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"basis of routes is no text: given={value!r:.80}")
    return value


def _pack(counts: Counts) -> bytes:
    return _little(array("q", [count for row in counts for count in row])).tobytes()


def _unpack(name: str, packed: object, shape: Sequence[int]) -> Counts:
    if not isinstance(packed, bytes) or len(packed) != 8 * sum(shape):
        raise ValueError(f"packed counts have a wrong length: name={name} allowed={8 * sum(shape)} bytes")
    flat = array("q")
    flat.frombytes(packed)
    values = iter(_little(flat).tolist())
    return tuple(tuple(next(values) for _ in range(experts)) for experts in shape)


def _little(counts: array[int]) -> array[int]:
    if sys.byteorder == "big":
        counts.byteswap()
    return counts
