"""Plan partial-expert checkpoints: bytes per rank, stalls, lost tokens, memory.

Nothing is measured and nothing is touched: the model, the ranks and the rates
are what the options say. docs/planning.md has the formulas and their sources.

JSON: {"model": {...}, "ranks": {"dp", "ep", "edp"}, "inputs": {...},
"size_ratio": float, "bottleneck_bytes": {"baseline", "equal", "adaptive"},
"lower_bound_bytes": int, "max_over_lower_bound": float, "levels":
{"snapshot": LEVEL, "persist": LEVEL}, "cost": {...}, "memory": {...},
"advice": {...}, "formulas": {...}} with LEVEL {"k", "checkpoints",
"total_bytes", "size_ratio", "bottleneck_bytes": {...}, "bottleneck_rank",
"manifest_objects", "lower_bound_bytes", "max_over_lower_bound"}. The keys at
the top are those of the level "persist". Bytes are those of the worst of the `checkpoints` of one
full turn of the rotation.

Exit codes: 0 ok, 2 wrong options or model.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from math import ceil

from moc.cli.exits import OK
from moc.cli.models import (
    MODEL_HELP,
    add_model,
    add_rates,
    check_k,
    checkpoint_of,
    load_model,
    ranks_per_node,
    rates_of,
)
from moc.cli.options import add_json
from moc.cli.output import describe_bytes, print_facts, print_json, print_table, say
from moc.errors import UsageError
from moc.plan.balance import balanced_rotation
from moc.plan.burden import Checkpoint, Level, all_experts, bytes_bound, least_k, plan_level, rank_bytes
from moc.plan.composition import KEPT_LIMIT
from moc.plan.cost import (
    Advice,
    Rates,
    advise,
    arena_bytes,
    checkpoint_cost,
    is_better,
    save_stall,
    size_ratio,
    two_level_lost_tokens,
    young_interval,
)
from moc.plan.scope import LAYOUTS, PAPER_LAYOUT

__all__ = ["configure", "run"]

PLT_LIMIT = 0.0375  # where the paper's GPT-125M-8E begins to lose accuracy: one run, not a law
DAY_S = 86400.0
FORMULAS = {
    "day_s": "eq. 4: O_save I_total / I + sum (O_restart + I / 2)",
    "size_ratio": "eq. 6 / eq. 5",
    "bottleneck_bytes": "fullest rank of the worst checkpoint of one turn",
    "lower_bound_bytes": "dual feasible functions over the ownership map",
    "stall_s": "eq. 10: max(0, copy - F&B)",
    "plt": "eq. 7, closed form, two levels",
    "blocking_young_interval": "sqrt(2 O_save / rate), from eq. 4",
    "is_better_than_blocking": "eq. 16",
    "arena_bytes": "full + (versions - 1) * snapshot, per rank",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One level under two rules: how it is done today, and by moc; `equal` differs where something is replicated."""

    baseline: Level
    equal: Level
    adaptive: Level
    size_ratio: float
    bound: int

    def to_json(self) -> dict[str, object]:
        best = self.adaptive
        return {
            "k": best.k,
            "checkpoints": best.checkpoints,
            "total_bytes": best.total,
            "size_ratio": self.size_ratio,
            "bottleneck_bytes": {
                "baseline": self.baseline.bottleneck,
                "equal": self.equal.bottleneck,
                "adaptive": best.bottleneck,
            },
            "bottleneck_rank": best.rank,
            "manifest_objects": best.objects,
            "lower_bound_bytes": self.bound,
            "max_over_lower_bound": best.bottleneck / self.bound,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the two levels cost in time and in tokens; intervals are in steps."""

    copy_s: float
    stall_s: float
    write_s: float
    shortest_interval: int
    interval: int
    blocking_save_s: float
    blocking_young_interval: float
    is_better_than_blocking: bool
    day_s: float
    blocking_day_s: float
    faults_per_step: float
    plt: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is printed."""

    job: Checkpoint
    inputs: dict[str, object]
    snapshot: Pair
    persist: Pair
    cost: Cost
    arena_bytes_per_rank: int
    arena_bytes_per_node: int
    advice: Advice


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = MODEL_HELP
    add_model(parser, k_defaults=("default: all", "default: K_snapshot"))
    add_rates(parser)
    parser.add_argument(
        "--layout",
        choices=tuple(LAYOUTS),
        default="moc",
        help="moc: 12 B per parameter where ZeRO-2 puts them; paper: 14 B, as the paper models it",
    )
    parser.add_argument("--versions", type=int, default=4, metavar="V", help="snapshots in host memory (4)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    report = make_report(args)
    if args.json:
        print_json(_to_json(report))
    else:
        _print(report)
    return OK


def make_report(args: argparse.Namespace) -> Report:
    """Return the plan for the options; raises UsageError."""
    shape = load_model(args.model)
    k_snapshot = shape.experts if args.k_snapshot is None else args.k_snapshot
    k_persist = k_snapshot if args.k_persist is None else args.k_persist
    check_k(k_snapshot, k_persist, shape.experts)
    rates = rates_of(args)
    if args.versions < 2:
        raise UsageError(f"versions are out of range: versions={args.versions} allowed=at least 2")
    job = checkpoint_of(args, shape, LAYOUTS[args.layout])
    snapshot = plan_pair(job, k_snapshot)
    persist = snapshot if k_persist == k_snapshot else plan_pair(job, k_persist)
    full = int(rank_bytes(job, all_experts(job.ownership), "equal").max())
    arena = arena_bytes(full=full, snapshot=snapshot.adaptive.bottleneck, versions=args.versions)
    names = (
        "layout",
        "parts",
        "size",
        "link_gbps",
        "storage_gbps",
        "storage_total_gbps",
        "fb_s",
        "restart_s",
        "versions",
    )
    return Report(
        job=job,
        inputs={name: getattr(args, name) for name in names}
        | {"ranks_per_node": ranks_per_node(args)}
        | {"mtbf_hours": rates.mtbf_s / 3600, "plt_limit": PLT_LIMIT},
        snapshot=snapshot,
        persist=persist,
        cost=_cost(job, rates, snapshot.adaptive, persist),
        arena_bytes_per_rank=arena,
        arena_bytes_per_node=arena * ranks_per_node(args),
        advice=_advice(job, rates),
    )


def plan_pair(job: Checkpoint, k: int) -> Pair:
    """Return one level under each rule.

    DeepSpeed stores the weights of training too, so the baseline does even where moc stores masters only.
    """
    rotation = balanced_rotation(job.ownership, k)
    equal = plan_level(job, rotation, k, "equal")
    return Pair(
        baseline=plan_level(replace(job, layout=PAPER_LAYOUT), rotation, k, "baseline"),
        equal=equal,
        adaptive=plan_level(job, rotation, k, "adaptive") if job.layout.weight else equal,
        size_ratio=size_ratio(job.shape, job.layout, job.scope, k),
        bound=bytes_bound(job, k),
    )


def _cost(job: Checkpoint, rates: Rates, snapshot: Level, persist: Pair) -> Cost:
    written, today = persist.adaptive, persist.baseline
    copy_s, write_s = (
        snapshot.bottleneck / rates.link,
        rates.transfer_s(bottleneck=written.bottleneck, total=written.total),
    )
    blocking_s = today.bottleneck / rates.link + rates.transfer_s(bottleneck=today.bottleneck, total=today.total)
    stall_s = save_stall(copy_s, rates.pass_s)
    shortest = max(1, ceil(write_s / rates.pass_s))
    best, young = (
        young_interval(save_s=save_s, rate=rates.faults_per_step, step_s=rates.pass_s)
        for save_s in (stall_s, blocking_s)
    )
    every = max(shortest, ceil(best))
    return Cost(
        copy_s=copy_s,
        stall_s=stall_s,
        write_s=write_s,
        shortest_interval=shortest,
        interval=every,
        blocking_save_s=blocking_s,
        blocking_young_interval=young,
        is_better_than_blocking=is_better(
            (stall_s, every), (blocking_s, young), rate=rates.faults_per_step, step_s=rates.pass_s
        ),
        day_s=_cost_of_a_day(rates, stall_s, every),
        blocking_day_s=_cost_of_a_day(rates, blocking_s, young),
        faults_per_step=rates.faults_per_step,
        plt=two_level_lost_tokens(
            rate=rates.faults_per_step,
            failed_share=rates.failed_share,
            experts=job.shape.experts,
            snapshot=(snapshot.k, max(1, ceil(best))),
            persist=(written.k, every),
        ),
    )


def _cost_of_a_day(rates: Rates, save_s: float, interval: float) -> float:
    return checkpoint_cost(
        save_s=save_s,
        interval=interval,
        steps=DAY_S / rates.pass_s,
        faults=DAY_S / rates.mtbf_s,
        restart_s=rates.restart_s,
        step_s=rates.pass_s,
    )


def _advice(job: Checkpoint, rates: Rates) -> Advice:
    """Return the advice; the bytes of other K lie on the line between none and all, as an even selection makes them."""
    experts = job.shape.experts
    everything = all_experts(job.ownership)
    none, every = (rank_bytes(job, selected, "equal") for selected in (~everything, everything))

    def sizes(least: int, most: int) -> list[int]:
        return [least + -(-(most - least) * k // experts) for k in range(1, experts + 1)]

    ranks, totals = sizes(int(none.max()), int(every.max())), sizes(int(none.sum()), int(every.sum()))
    return advise(
        rates,
        experts=experts,
        snapshot_s=tuple(size / rates.link for size in ranks),
        persist_s=tuple(rates.transfer_s(bottleneck=b, total=t) for b, t in zip(ranks, totals, strict=True)),
        plt_limit=PLT_LIMIT,
        k_least=least_k(job.ownership, KEPT_LIMIT),
    )


def _to_json(report: Report) -> dict[str, object]:
    shape, ownership = report.job.shape, report.job.ownership
    persist = report.persist.to_json()
    top = ("size_ratio", "bottleneck_bytes", "lower_bound_bytes", "max_over_lower_bound")
    return {
        "model": {
            "name": shape.name,
            "parameters": shape.elements,
            "expert_parameters": shape.all_expert_elements,
            "moe_layers": shape.moe_layers,
            "experts": shape.experts,
        },
        "ranks": {"dp": ownership.dp, "ep": ownership.ep, "edp": ownership.columns},
        "inputs": report.inputs,
        **{name: persist[name] for name in top},
        "levels": {"snapshot": report.snapshot.to_json(), "persist": persist},
        "cost": asdict(report.cost),
        "memory": {
            "arena_bytes_per_rank": report.arena_bytes_per_rank,
            "arena_bytes_per_node": report.arena_bytes_per_node,
        },
        "advice": asdict(report.advice),
        "formulas": FORMULAS,
    }


def _print(report: Report) -> None:
    shape, own, inputs = report.job.shape, report.job.ownership, report.inputs
    say("inputs: " + " ".join(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in inputs.items()))
    share = f"{shape.all_expert_elements / shape.elements:.1%} in {shape.moe_layers} x {shape.experts} experts"
    print(f"{shape.name}: {shape.elements / 1e9:.4g} B parameters, {share}")
    print(f"{own.dp} ranks, expert-parallel {own.ep}, {own.columns} replicas of each expert")
    print()
    rows = []
    for name, pair in (("snapshot", report.snapshot), ("persist", report.persist)):
        sizes = [describe_bytes(level.bottleneck) for level in (pair.baseline, pair.equal, pair.adaptive)]
        best = pair.adaptive
        over = f"{best.bottleneck / pair.bound:.3f}"
        rows.append([name, str(best.k), f"{pair.size_ratio:.3f}", describe_bytes(best.total), *sizes, over])
    print_table(
        ["LEVEL", "K", "SIZE", "TOTAL", "BASELINE", "EQUAL", "ADAPTIVE", "/BOUND"], rows, left=frozenset({"LEVEL"})
    )
    print()
    cost, advice = report.cost, report.advice
    objects = report.persist.adaptive.objects
    better = "cheaper" if cost.is_better_than_blocking else "not cheaper"
    print_facts(
        (
            ("fullest rank", f"snapshot {report.snapshot.adaptive.rank}, persist {report.persist.adaptive.rank}"),
            ("stall", f"{cost.stall_s:.3g} s: copy {cost.copy_s:.3g} s behind F&B (eq. 10)"),
            (
                "write",
                f"{cost.write_s:.3g} s: at most every {cost.shortest_interval} steps, best every {cost.interval}",
            ),
            ("blocking save", f"{cost.blocking_save_s:.3g} s, Young interval {cost.blocking_young_interval:.3g} steps"),
            ("a day", f"{cost.day_s:.3g} s lost, blocking {cost.blocking_day_s:.3g} s (eq. 4); {better} (eq. 16)"),
            ("PLT", f"{cost.plt:.3g} of all tokens (eq. 7, closed form, two levels)"),
            ("manifest", f"{objects:,} objects" + ("" if objects <= KEPT_LIMIT else f": at most {KEPT_LIMIT:,}")),
            ("host memory", f"{describe_bytes(report.arena_bytes_per_rank)} per rank"),
            ("", f"{describe_bytes(report.arena_bytes_per_node)} per node (full + (V - 1) snapshot)"),
            (
                "advice",
                f"K_snapshot {advice.k_snapshot}, interval {advice.snapshot_every} (stall {advice.stall_s:.3g} s)",
            ),
            ("", f"K_persist {advice.k_persist}, interval {advice.persist_every} (PLT {advice.plt:.3g})"),
        )
    )
