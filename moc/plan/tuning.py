"""From what a job has measured to K and interval of both levels, with the equations of the MoC-System paper.

A copy hides behind forward and backward pass or stalls the update (equation 10); intervals follow from the stall and
the failure rate (4); two settings are compared by what they cost per step (16). See `moc.plan.cost`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moc.plan.cost import RATE_LIMITS, Rates, advise, checkpoint_cost, save_stall

__all__ = ["RankTimes", "Settings", "Tuning", "describe_tuning", "tune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """What one rank copies when it copies all, and how fast: bytes, bytes per second, seconds."""

    dense_bytes: int
    expert_bytes: int
    copy_rate: float
    pass_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """K of both levels and their intervals in steps; `persist_every` is 0 for never."""

    k_snapshot: int
    k_persist: int
    snapshot_every: int
    persist_every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Advice beside the present settings, and what it follows from.

    Costs are in seconds per step, equation 4; `faults` are those so far and one to come.
    """

    experts: int
    present: Settings
    advised: Settings
    present_cost_s: float
    advised_cost_s: float
    present_stall_s: float
    advised_stall_s: float
    plt: float
    full_copy_s: float
    pass_s: float
    storage_rate: float
    faults: int
    steps: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe_tuning(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return lines for people from a tuning's `to_json`: the advice, what it costs, what was measured."""
    new, now = body["advised"], body["present"]
    return (
        (
            f"K_snapshot {new['k_snapshot']} of {body['experts']} every {new['snapshot_every']} steps, "
            f"K_persist {new['k_persist']} every {new['persist_every']}"
        ),
        f"now {now['k_snapshot']} every {now['snapshot_every']}, {now['k_persist']} every {now['persist_every']}",
        f"stall {body['advised_stall_s']:.3g} s, now {body['present_stall_s']:.3g} s: max(0, copy - pass) (eq. 10)",
        (
            f"cost {body['advised_cost_s']:.3g} s a step, now {body['present_cost_s']:.3g} s: "
            "stall/I + rate I/2 (eq. 4, 16)"
        ),
        f"interval I = sqrt(2 stall / rate) (eq. 4), PLT {body['plt']:.3g} (eq. 7)",
        f"rate {body['faults']} faults (one to come) in {body['steps']} steps of {body['pass_s']:.3g} s",
        f"copy of all {body['full_copy_s']:.3g} s, storage {body['storage_rate'] / 1e6:.3g} MB/s",
    )


def tune(
    ranks: Sequence[RankTimes],
    *,
    experts: int,
    storage_rate: float,
    restarts: int,
    steps: int,
    failed_share: float,
    plt_limit: float,
    present: Settings,
) -> Tuning:
    """Return advice for a node with these ranks; `experts` is the number per MoE layer, 1 for a dense model.

    `storage_rate` is what storage takes from the node, in bytes per second; `failed_share` is the share of the ranks
    whose memory the loss of the node takes.
    """
    pass_s = _within("pass_s", min(rank.pass_s for rank in ranks))
    faults, steps = restarts + 1, max(1, steps)
    rates = Rates(
        link=_within("link", min(rank.copy_rate for rank in ranks)),
        storage=_within("storage", storage_rate),
        storage_total=_within("storage_total", storage_rate),
        pass_s=pass_s,
        mtbf_s=_within("mtbf_s", pass_s * steps / faults),
        restart_s=0.0,
        failed_share=failed_share,
    )
    shares = [k / experts for k in range(1, experts + 1)]
    snapshot_s = tuple(max((r.dense_bytes + r.expert_bytes * s) / r.copy_rate for r in ranks) for s in shares)
    persist_s = tuple(sum(r.dense_bytes + r.expert_bytes * s for r in ranks) / rates.storage for s in shares)
    advice = advise(rates, experts=experts, snapshot_s=snapshot_s, persist_s=persist_s, plt_limit=plt_limit)

    def cost(stall_s: float, interval: int) -> float:
        rate = rates.faults_per_step
        return checkpoint_cost(save_s=stall_s, interval=interval, steps=1, faults=rate, restart_s=0.0, step_s=pass_s)

    stall_s = save_stall(snapshot_s[present.k_snapshot - 1], pass_s)
    return Tuning(
        experts=experts,
        present=present,
        advised=Settings(
            k_snapshot=advice.k_snapshot,
            k_persist=advice.k_persist,
            snapshot_every=advice.snapshot_every,
            persist_every=advice.persist_every,
        ),
        present_cost_s=cost(stall_s, present.snapshot_every),
        advised_cost_s=cost(advice.stall_s, advice.snapshot_every),
        present_stall_s=stall_s,
        advised_stall_s=advice.stall_s,
        plt=advice.plt,
        full_copy_s=snapshot_s[-1],
        pass_s=pass_s,
        storage_rate=storage_rate,
        faults=faults,
        steps=steps,
    )


def _within(name: str, value: float) -> float:
    """Return the value, moved into the range that `Rates` takes for no error of typing."""
    least, most = RATE_LIMITS[name]
    return min(max(value, least), most)
