"""What checkpoints and faults cost: the equations of the MoC-System paper (arXiv 2408.04307), by their numbers.

Times are in seconds, intervals in steps, rates in faults per step unless a name says otherwise. "(derived)" marks what
follows from the paper's equations but is not printed there. docs/planning.md has them all with their sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, sqrt

from moc.errors import UsageError
from moc.plan.scope import Layout, Scope
from moc.plan.shapes import ModelShape

__all__ = [
    "Advice",
    "Rates",
    "advise",
    "arena_bytes",
    "checkpoint_cost",
    "full_bytes",
    "is_better",
    "largest_k",
    "lost_tokens",
    "partial_bytes",
    "save_stall",
    "size_ratio",
    "two_level_lost_tokens",
    "young_interval",
]


RATE_LIMITS = {
    "link": (1e3, 1e15),
    "storage": (1e3, 1e15),
    "storage_total": (1e3, 1e18),
    "pass_s": (1e-6, 1e6),
    "mtbf_s": (1.0, 1e12),
    "restart_s": (0.0, 1e7),
}
"""What is taken for a typing error outside."""


def full_bytes(shape: ModelShape, layout: Layout) -> int:
    """Return the size of a full checkpoint: (P_ne + P_e)(B_w + B_o). Equation 5."""
    return shape.elements * layout.total


def partial_bytes(shape: ModelShape, layout: Layout, scope: Scope, k: int) -> int:
    """Return the size of a checkpoint with K experts per layer: (P_ne + K/N P_e)(B_w + B_o). Equation 6.

    It is exact, since experts are of one size; parts outside the scope count in full.
    """
    follows = scope.partial_optimizer(layout) + scope.partial_weight(layout)
    chosen = shape.moe_layers * k * shape.expert_elements
    return shape.dense_elements * layout.total + shape.all_expert_elements * (layout.total - follows) + chosen * follows


def size_ratio(shape: ModelShape, layout: Layout, scope: Scope, k: int) -> float:
    """Return the part of a full checkpoint that is saved: equation 6 over equation 5."""
    return partial_bytes(shape, layout, scope, k) / full_bytes(shape, layout)


def lost_tokens(*, faults: float, experts: int, k: int, interval: float, steps: float) -> float:
    """Return the expected proportion of lost tokens (PLT) of a sequential selection and balanced load.

    Closed form of equation 7 (derived): faults * (N/K - 1)/2 * interval/steps.
    """
    return faults * (experts / k - 1) / 2 * interval / steps


def two_level_lost_tokens(
    *, rate: float, failed_share: float, experts: int, snapshot: tuple[int, float], persist: tuple[int, float]
) -> float:
    """Return the PLT with recovery from memory where it survives (derived from equation 7).

    `rate` is in faults per step, `failed_share` is the share of the experts whose memory a fault takes; a level is
    (K, interval).
    """
    stored = lost_tokens(faults=rate, experts=experts, k=persist[0], interval=persist[1], steps=1)
    remembered = lost_tokens(faults=rate, experts=experts, k=snapshot[0], interval=snapshot[1], steps=1)
    return failed_share * stored + (1 - failed_share) * remembered


def save_stall(snapshot_s: float, pass_s: float) -> float:
    """Return how long a weight update waits for a copy behind forward and backward pass. Equation 10."""
    return max(0.0, snapshot_s - pass_s)


def checkpoint_cost(
    *, save_s: float, interval: float, steps: float, faults: float, restart_s: float, step_s: float
) -> float:
    """Return what checkpoints and faults cost a run: O_save I_total/I + sum (O_restart + I/2). Equation 4."""
    return save_s * steps / interval + faults * (restart_s + interval / 2 * step_s)


def is_better(ours: tuple[float, float], other: tuple[float, float], *, rate: float, step_s: float) -> bool:
    """Return whether (save_s, interval) costs less per step than another one: O_save/I + rate I/2. Equation 16."""

    def per_step(scheme: tuple[float, float]) -> float:
        return scheme[0] / scheme[1] + rate * scheme[1] / 2 * step_s

    return per_step(ours) < per_step(other)


def young_interval(*, save_s: float, rate: float, step_s: float) -> float:
    """Return the interval that minimises equation 4: sqrt(2 O_save / rate), in steps (Young 1974).

    `rate` is in faults per step.
    """
    return inf if rate == 0 else sqrt(2 * save_s / (rate * step_s))


def arena_bytes(*, full: int, snapshot: int, versions: int) -> int:
    """Return the host memory of one rank's snapshots: every byte once, and what a snapshot changes once more for each
    further version (derived from the arena's layout; pages and small state come on top).
    """
    return full + (versions - 1) * snapshot


def largest_k(seconds_of_k: tuple[float, ...], pass_s: float) -> int:
    """Return the largest K whose copy ends within forward and backward pass, at least 1.

    `seconds_of_k[i]` is the copy time of K = i + 1.
    """
    return max([k for k, seconds in enumerate(seconds_of_k, start=1) if seconds <= pass_s], default=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was measured or assumed: bandwidths in bytes per second, times in seconds.

    `link` and `storage` are of one rank, `storage_total` is what the store takes from all. `pass_s` is forward and
    backward pass, `restart_s` the time from a fault to training, `mtbf_s` the mean time between faults of the whole
    job, `failed_share` the share of the ranks whose memory a fault takes.
    """

    link: float
    storage: float
    storage_total: float
    pass_s: float
    mtbf_s: float
    restart_s: float
    failed_share: float

    def __post_init__(self) -> None:
        for name, (least, most) in RATE_LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(
                    f"rate is out of range, in bytes and seconds: {name}={value:g} allowed={least:g}..{most:g}"
                )
        if not 0 < self.failed_share <= 1:
            raise UsageError(f"rate is out of range: failed_share={self.failed_share} allowed=0 < x <= 1")

    @property
    def faults_per_step(self) -> float:
        """The failure rate, per step of forward and backward pass."""
        return self.pass_s / self.mtbf_s

    def transfer_s(self, *, bottleneck: int, total: int) -> float:
        """Return how long a write to storage or a read from it takes: the fullest rank's, or all of it, if longer."""
        return max(bottleneck / self.storage, total / self.storage_total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What a level costs and which interval suits it; `plt` is that of the advised pair of levels."""

    k_snapshot: int
    k_persist: int
    snapshot_every: int
    persist_every: int
    stall_s: float
    plt: float


def advise(
    rates: Rates,
    *,
    experts: int,
    snapshot_s: tuple[float, ...],
    persist_s: tuple[float, ...],
    plt_limit: float,
    k_least: int = 1,
) -> Advice:
    """Return K and interval of both levels; `snapshot_s[i]` and `persist_s[i]` are the times of K = i + 1. Storage can
    have `k_least` experts or more.

    The largest K_snapshot whose copy hides behind the passes; a snapshot every step if it does, else every Young
    interval. Then the smallest K_persist, and with it the shortest interval that storage can keep up with, whose lost
    tokens stay under the limit.
    """
    k_snapshot = largest_k(snapshot_s, rates.pass_s)
    stall_s = save_stall(snapshot_s[k_snapshot - 1], rates.pass_s)
    young = young_interval(save_s=stall_s, rate=rates.faults_per_step, step_s=rates.pass_s)
    snapshot_every = max(1, ceil(young))
    choices = []
    for k in range(min(k_least, k_snapshot), k_snapshot + 1):
        every = max(1, ceil(persist_s[k - 1] / rates.pass_s))
        every = -(-every // snapshot_every) * snapshot_every
        plt = two_level_lost_tokens(
            rate=rates.faults_per_step,
            failed_share=rates.failed_share,
            experts=experts,
            snapshot=(k_snapshot, snapshot_every),
            persist=(k, every),
        )
        choices.append((plt > plt_limit, k, every, plt))
    _, k_persist, persist_every, plt = min(choices, key=lambda row: (row[0], row[3] if row[0] else 0.0, row[1]))
    return Advice(
        k_snapshot=k_snapshot,
        k_persist=k_persist,
        snapshot_every=snapshot_every,
        persist_every=persist_every,
        stall_s=stall_s,
        plt=plt,
    )
