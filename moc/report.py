"""What a recovery tells: the state it chose, what it passed over, and which experts are older than the rest. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moc.state import Expert

__all__ = ["ExpertOrigin", "RecoveryReport", "Rejection", "StaleVersion", "reasons_for_drift"]

STALE_LINES = 8  # of a report; the rest is counted, and all of it is in `RecoveryReport.stale`
LINE_EXPERTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A candidate that was not used, and why."""

    candidate: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleVersion:
    """An expert whose bytes are of an earlier step than the rest, and the snapshot or attempt that they come from."""

    expert: Expert
    step: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrigin:
    """Where an expert's bytes come from: what kind of source it is, the step of the bytes, and who holds them."""

    expert: Expert
    level: str
    step: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What a recovery did; the same on every rank. Bytes and seconds are lists by rank and maps by phase.

    `experts` says of every expert where it comes from, in the partial modes, where that may be several places.
    `lost` are the routes that this recovery has lost, by MoE layer, empty where nothing counts them; `plt` is the
    proportion of lost tokens of the whole run so far, None where nothing counts them.
    """

    step: int
    source: str
    incarnation: int
    parent_incarnation: int
    run: str
    lineage: tuple[tuple[int, int | None], ...]
    bytes_per_rank: tuple[int, ...]
    seconds: Mapping[str, float]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]
    stale: tuple[StaleVersion, ...] = ()
    lost: tuple[int, ...] = ()
    plt: float | None = None
    experts: tuple[ExpertOrigin, ...] = ()

    def __str__(self) -> str:
        total = sum(self.bytes_per_rank)
        timing = " ".join(f"{phase}={seconds:.2f}s" for phase, seconds in self.seconds.items())
        lines = [
            f"recovered step {self.step} from {self.source}: {total / 1e6:.1f} MB, {timing}",
            f"  run {self.run}, incarnation {self.incarnation}, grown from incarnation {self.parent_incarnation}",
        ]
        lines += [f"  {line}" for line in (*self.origin_lines(), *self.loss_lines())]
        lines += [f"  rejected {r.candidate}: {r.reason}" for r in self.rejected]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def origin_lines(self) -> list[str]:
        """Return how many experts come from where, in one line; none where all come from one place."""
        counts = Counter((-row.step, row.level) for row in self.experts)
        if len(counts) < 2:
            return []
        parts = [f"{count} from {level} at step {-step}" for (step, level), count in sorted(counts.items())]
        return [f"experts: {', '.join(parts)}"]

    def loss_lines(self) -> list[str]:
        """Return what was lost, in short lines; none where nothing ever was."""
        if not self.stale:
            return [] if not self.plt else [f"no expert is stale; PLT of the run so far {self.plt:.3%}"]
        lines = [f"{len(self.stale)} expert(s) are stale, so the run is not bit-exact:", *stale_lines(self.stale)]
        if self.plt is None:
            return [*lines, "routes lost: not counted"]
        lost = " ".join(str(routes) for routes in self.lost)
        return [*lines, f"routes lost by layer: {lost}; PLT of the run so far {self.plt:.3%}"]


def stale_lines(stale: Sequence[StaleVersion]) -> list[str]:
    """Return one line for each step and source that experts come from, newest first."""
    groups: dict[tuple[int, str], list[str]] = {}
    for row in stale:
        groups.setdefault((row.step, row.source), []).append(f"{row.expert.layer}/{row.expert.index}")
    lines = []
    for (step, source), names in sorted(groups.items(), key=lambda group: (-group[0][0], group[0][1])):
        more = f" and {len(names) - LINE_EXPERTS} more" if len(names) > LINE_EXPERTS else ""
        lines.append(f"  step {step} from {source}: layer/expert {' '.join(names[:LINE_EXPERTS])}{more}")
    left = len(lines) - STALE_LINES
    return lines if left <= 0 else [*lines[:STALE_LINES], f"  and {left} older step(s)"]


def reasons_for_drift(
    *, stored_ranks: int, ranks: int, stored_software: Mapping[str, object], software: Mapping[str, object]
) -> tuple[str, ...]:
    """Return why a run whose every tensor was restored may yet not go on bit-exactly. Pure."""
    reasons = []
    if stored_ranks != ranks:
        reasons.append(
            f"the number of ranks has changed, so the run is not bit-exact: stored={stored_ranks} present={ranks}"
        )
    for name in sorted(stored_software.keys() | software.keys()):
        stored, present = stored_software.get(name), software.get(name)
        if stored != present:
            reasons.append(f"a version has changed, so the run may not be bit-exact: {name} {stored=} {present=}")
    return tuple(reasons)
