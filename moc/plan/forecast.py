"""What a run yields under faults, scheme by scheme: a renewal model over vectors, with chance coming in from outside.

A run is a sequence of *lives*. A life begins with the restart and the load of the state that recovery found, then makes
steps until the next fault. Of these, the steps up to the newest state that survives the fault are kept; the rest is
lost and made again. Rows of the arrays are trials, columns are lives; every scheme sees the same faults.

- A state of step s is in memory `copy_s` after the step and in storage `write_s` after that.
- A fault either kills processes, and memory survives, or takes the memory of a node.
- A fault during a restart costs the time that it had run, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc.errors import UsageError

__all__ = ["Faults", "Outcome", "Scheme", "forecast"]

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How states are saved.

    Intervals are in steps. `save_s` is what one save adds to the step that it begins in. `snapshot_every` is 0 where
    nothing is recovered from memory; `has_replica` says that a lost node's memory exists elsewhere. `stale_steps` is
    the age, beyond the recovered step, of the mean expert after a fault that leaves memory (first) or takes a node's.
    """

    name: str
    save_s: float
    copy_s: float
    write_s: float
    persist_every: int
    snapshot_every: int
    has_replica: bool
    load_memory_s: float
    load_storage_s: float
    stale_steps: tuple[float, float]
    commit_bytes: int

    def __post_init__(self) -> None:
        if self.persist_every < 1 or self.snapshot_every < 0:
            raise UsageError(
                f"interval of a scheme is out of range: scheme={self.name} persist_every={self.persist_every} "
                f"snapshot_every={self.snapshot_every}"
            )

    def step_s(self, pass_s: float) -> float:
        """Return the mean time of a step."""
        return pass_s + self.save_s / (self.snapshot_every or self.persist_every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Times between faults, and which of them take a node's memory; by trial and life."""

    between_s: Seconds
    takes_node: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Means over trials, with the half width of goodput's 95 % interval.

    `goodput` is the time of the kept steps without any saving, over all time; `plt` the proportion of lost tokens.
    """

    scheme: Scheme
    goodput: float
    goodput_half_width: float
    plt: float
    lost_steps_per_fault: float
    faults: float
    bytes_per_hour: float


def forecast(scheme: Scheme, faults: Faults, *, horizon_s: float, pass_s: float, restart_s: float) -> Outcome:
    """Return the outcome of runs of `horizon_s`; raises UsageError if the faults do not reach that far."""
    ends = np.cumsum(faults.between_s, axis=1)
    if (ends[:, -1] < horizon_s).any():
        raise UsageError(f"too few faults for the horizon: horizon_s={horizon_s} reached_s={ends[:, -1].min():.0f}")
    starts = ends - faults.between_s
    length_s = np.clip(horizon_s - starts, 0.0, faults.between_s)
    is_fault = (ends < horizon_s) & (length_s > 0)
    loaded = _loaded_from_memory(scheme, faults)
    work_s = np.maximum(length_s - restart_s - np.where(loaded, scheme.load_memory_s, scheme.load_storage_s), 0.0)
    work_s[:, 0] = length_s[:, 0]  # the first life begins without a fault
    step_s = scheme.step_s(pass_s)
    made = np.floor(work_s / step_s)
    survives = _is_remembered(scheme, faults.takes_node)
    stored = _kept(work_s - scheme.copy_s - scheme.write_s, step_s, scheme.persist_every)
    remembered = _kept(work_s - scheme.copy_s, step_s, scheme.snapshot_every or scheme.persist_every)
    kept = np.where(is_fault, np.where(survives, np.maximum(remembered, stored), stored), made)
    stale = np.where(faults.takes_node, scheme.stale_steps[1], scheme.stale_steps[0])
    total = np.maximum(kept.sum(axis=1), 1.0)
    goodput = kept.sum(axis=1) * pass_s / horizon_s
    lost = np.where(is_fault, made - kept, 0.0).sum(axis=1)
    count = is_fault.sum(axis=1)
    return Outcome(
        scheme=scheme,
        goodput=float(goodput.mean()),
        goodput_half_width=float(1.96 * goodput.std(ddof=1) / np.sqrt(len(goodput))) if len(goodput) > 1 else 0.0,
        plt=float(((stale * (is_fault & (made > 0))).sum(axis=1) / total).mean()),
        lost_steps_per_fault=float(lost.sum() / max(1, int(count.sum()))),
        faults=float(count.mean()),
        bytes_per_hour=float((made // scheme.persist_every).sum(axis=1).mean())
        * scheme.commit_bytes
        * 3600
        / horizon_s,
    )


def _is_remembered(scheme: Scheme, takes_node: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which faults leave a whole state in memory."""
    if not scheme.snapshot_every:
        return np.zeros_like(takes_node)
    return np.ones_like(takes_node) if scheme.has_replica else ~takes_node


def _loaded_from_memory(scheme: Scheme, faults: Faults) -> npt.NDArray[np.bool_]:
    """Return which lives begin from memory: those whose previous life ended with its memory intact."""
    remembered = _is_remembered(scheme, faults.takes_node)
    return np.concatenate([np.zeros((len(remembered), 1), dtype=np.bool_), remembered[:, :-1]], axis=1)


def _kept(until_s: Seconds, step_s: float, every: int) -> Seconds:
    """Return the newest multiple of `every` whose step had ended by then."""
    return np.floor(np.maximum(until_s, 0.0) / (step_s * every)) * every
