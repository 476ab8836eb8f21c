"""What a run yields under faults, scheme by scheme: lives one after the other, with chance coming in from outside.

A run is a sequence of *lives*. A life begins with the restart and the load of the state that recovery found, then makes
steps until the next fault. Of these, the steps up to the newest state that survives the fault are kept; the rest is
lost and made again. Rows of the arrays are trials, columns are lives; every scheme sees the same faults.

- Saves are of steps that their interval divides, counted from the beginning of the run.
- A state of step s is in memory `copy_s` after the step and in storage `write_s` after that.
- A fault either kills processes, and memory survives, or takes the memory of a node. Then also steps of earlier lives
  are lost that had been recovered from memory and not been stored since.
- A fault during a restart costs the time that it had run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc.errors import UsageError

__all__ = ["Faults", "Outcome", "Scheme", "forecast"]

Seconds = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

NEVER = -1.0  # a step that no run reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How states are saved.

    Intervals are in steps. `save_s` is what one save adds to the step that it begins in, `persist_s` what writing it
    to storage adds to the steps meanwhile. `snapshot_every` is 0 where nothing is recovered from memory; `has_replica`
    says that a lost node's memory exists elsewhere. `stale_steps` is the age, beyond the recovered step, of the mean
    expert after a fault that leaves memory (first) or takes a node's.
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
    persist_s: float = 0.0

    def __post_init__(self) -> None:
        if self.persist_every < 1 or self.snapshot_every < 0:
            raise UsageError(
                f"interval of a scheme is out of range: scheme={self.name} persist_every={self.persist_every} "
                f"snapshot_every={self.snapshot_every}"
            )

    def step_s(self, pass_s: float) -> float:
        """Return the mean time of a step."""
        return pass_s + self.save_s / (self.snapshot_every or self.persist_every) + self.persist_s / self.persist_every


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Times between faults, and which of them take a node's memory; by trial and life."""

    between_s: Seconds
    takes_node: Flags


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
    length_s = np.clip(horizon_s - (ends - faults.between_s), 0.0, faults.between_s)
    is_fault = (ends < horizon_s) & (length_s > 0)
    lives = int((length_s > 0).any(axis=0).sum())
    step_s = scheme.step_s(pass_s)
    run = _Runs(len(ends))
    for life in range(lives):
        waits_s = restart_s + np.where(run.is_in_memory, scheme.load_memory_s, scheme.load_storage_s) if life else 0.0
        work_s = np.maximum(length_s[:, life] - waits_s, 0.0)
        run.live(scheme, work_s, step_s, is_fault[:, life], faults.takes_node[:, life])
    goodput = run.step * pass_s / horizon_s
    count = is_fault.sum(axis=1)
    return Outcome(
        scheme=scheme,
        goodput=float(goodput.mean()),
        goodput_half_width=float(1.96 * goodput.std(ddof=1) / np.sqrt(len(goodput))) if len(goodput) > 1 else 0.0,
        plt=float((run.stale / np.maximum(run.step, 1.0)).mean()),
        lost_steps_per_fault=float(run.lost.sum() / max(1, int(count.sum()))),
        faults=float(count.mean()),
        bytes_per_hour=float(run.commits.mean()) * scheme.commit_bytes * 3600 / horizon_s,
    )


class _Runs:
    """All trials between two lives: the step that each goes on from, the newest that is stored, and sums so far."""

    def __init__(self, trials: int) -> None:
        self.step, self.stored, self.lost, self.stale, self.commits = (np.zeros(trials) for _ in range(5))
        self.is_in_memory = np.zeros(trials, dtype=np.bool_)

    def live(self, scheme: Scheme, work_s: Seconds, step_s: float, is_fault: Flags, takes_node: Flags) -> None:
        """Make steps for `work_s` and, where a fault ends the life, go back to what survives it."""
        end = self.step + np.floor(work_s / step_s)
        age = np.where(takes_node, scheme.stale_steps[1], scheme.stale_steps[0])
        self.stale += np.where(is_fault & (end > self.step), age, 0.0)
        self.commits += end // scheme.persist_every - self.step // scheme.persist_every
        saved = self._newest(work_s - scheme.copy_s - scheme.write_s, step_s, scheme.persist_every)
        self.stored = np.where(saved > self.step, saved, self.stored)
        taken = np.where(self.is_in_memory, self.step, NEVER)
        if scheme.snapshot_every:
            newest = self._newest(work_s - scheme.copy_s, step_s, scheme.snapshot_every)
            taken = np.where(newest > self.step, newest, taken)
        survives = (taken >= self.stored) & (scheme.has_replica | ~takes_node)
        kept = np.where(survives, taken, self.stored)
        self.lost += np.where(is_fault, end - kept, 0.0)
        self.step = np.where(is_fault, kept, end)
        self.is_in_memory = survives

    def _newest(self, until_s: Seconds, step_s: float, every: int) -> Seconds:
        """Return the newest multiple of `every` whose step had ended by then, also one before this life."""
        return np.asarray((self.step + np.floor(np.maximum(until_s, 0.0) / step_s)) // every * every)
