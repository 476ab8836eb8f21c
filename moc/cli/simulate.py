"""Simulate faults at any scale: what four ways to save make of the same days.

  blocking   DeepSpeed's save_checkpoint, training waits until it is on disk
  async      the same bytes on the same ranks, copied behind the next passes
  moc-paper  K experts per layer, two levels, as MoC-System; loses tokens
  full       this project: every step in memory, sharded evenly, nothing lost

Bytes per rank come from the planner. Intervals are those of the formulas
(Young's, but not shorter than a write takes). Times between faults are
exponential; all schemes see the same faults. docs/planning.md has the model.
With measured costs there is a fifth, `measured`; --faults replaces chance.

JSON: {"model": str, "ranks": {...}, "inputs": {...}, "schemes": [{"name",
"goodput", "goodput_half_width", "plt", "lost_steps_per_fault", "faults",
"bytes_per_hour", "persist_every", "snapshot_every", "step_s"}]}

Exit codes: 0 ok, 2 wrong options or model.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from math import ceil

import numpy as np

from moc.cli.exits import OK
from moc.cli.measured import add_measured, measured_scheme, scheduled_faults
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
from moc.cli.output import describe_bytes, print_json, print_table, say
from moc.errors import UsageError
from moc.plan.balance import balanced_rotation
from moc.plan.burden import Checkpoint, Level, plan_level
from moc.plan.cost import Rates, save_stall, two_level_lost_tokens, young_interval
from moc.plan.forecast import Faults, Outcome, Scheme, forecast
from moc.plan.scope import MOC_LAYOUT, PAPER_LAYOUT, Scope
from moc.plan.shapes import ModelShape

__all__ = ["configure", "run"]

LIFE_LIMIT = 5_000_000  # trials x lives: 40 MB per array
LIVES_LIMIT = 200_000  # of one trial, one after the other: half a minute


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = MODEL_HELP
    add_model(parser, k_defaults=("default: N / 4, as in the paper", "default: K_snapshot / 4"))
    add_rates(parser)
    parser.add_argument("--days", type=float, default=30.0, metavar="N", help="length of the run (30)")
    parser.add_argument("--trials", type=int, default=100, metavar="N", help="runs that are averaged (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults (0)")
    parser.add_argument(
        "--node-share", type=float, default=0.25, metavar="P", help="faults that take a node's memory (0.25)"
    )
    parser.add_argument("--replicas", type=int, choices=(0, 1), default=0, help="copies of memory on a peer (0)")
    add_measured(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    shape = load_model(args.model)
    k_snapshot = max(1, shape.experts // 4) if args.k_snapshot is None else args.k_snapshot
    k_persist = max(1, k_snapshot // 4) if args.k_persist is None else args.k_persist
    check_k(k_snapshot, k_persist, shape.experts)
    inputs = _inputs(args) | {"k_snapshot": k_snapshot, "k_persist": k_persist}
    outcomes = simulate(args, shape, (k_snapshot, k_persist))
    if args.json:
        print_json(_to_json(args, inputs, outcomes))
    else:
        _print(args, inputs, outcomes)
    return OK


def simulate(args: argparse.Namespace, shape: ModelShape, ks: tuple[int, int]) -> tuple[Outcome, ...]:
    """Return one outcome per scheme, all on the ranks where ZeRO-2 puts the states; raises UsageError."""
    rates = rates_of(args)
    for name, is_legal, allowed in (
        ("days", 0 < args.days <= 3650, "0 < x <= 3650"),
        ("trials", 1 <= args.trials <= 100_000, "1..100000"),
        ("node_share", 0 <= args.node_share <= 1, "0..1"),
        ("seed", args.seed >= 0, "at least 0"),
    ):
        if not is_legal:
            raise UsageError(f"option is out of range: {name}={getattr(args, name)} allowed={allowed}")
    measured = measured_scheme(args)
    horizon_s = args.days * 86400
    faults = _draw(args, rates) if args.faults is None else scheduled_faults(args.faults, horizon_s=horizon_s)
    schemes = _schemes(checkpoint_of(args, shape, MOC_LAYOUT), rates, ks, has_replica=bool(args.replicas))
    return tuple(
        forecast(scheme, faults, horizon_s=horizon_s, pass_s=rates.pass_s, restart_s=rates.restart_s)
        for scheme in (*schemes, *([] if measured is None else [measured]))
    )


def _draw(args: argparse.Namespace, rates: Rates) -> Faults:
    """Return the faults of all trials, enough for the horizon."""
    expected = args.days * 86400 / rates.mtbf_s
    lives = ceil(min(expected, LIFE_LIMIT) + 8 * expected**0.5 + 20)  # more than eight standard deviations
    if args.trials * lives > LIFE_LIMIT or lives > LIVES_LIMIT:
        raise UsageError(
            f"too many faults: trials={args.trials} lives={lives} "
            f"allowed=product up to {LIFE_LIMIT}, lives up to {LIVES_LIMIT}"
        )
    chance = np.random.default_rng(args.seed)
    return Faults(
        between_s=chance.exponential(rates.mtbf_s, (args.trials, lives)),
        takes_node=chance.random((args.trials, lives)) < args.node_share,
    )


def _schemes(job: Checkpoint, rates: Rates, ks: tuple[int, int], *, has_replica: bool) -> tuple[Scheme, ...]:
    experts = job.shape.experts
    full = replace(job, scope=Scope())
    stored = replace(full, layout=PAPER_LAYOUT)
    today = _level(stored, experts, "baseline")
    ours = _level(full, experts, "adaptive")
    partial = replace(job, layout=PAPER_LAYOUT)
    snapshot, persist = _level(partial, ks[0], "adaptive"), _level(partial, ks[1], "adaptive")
    whole = _level(stored, experts, "adaptive")
    moc = _scheme("moc-paper", rates, copied=snapshot, written=persist, loaded=whole)
    every = moc.persist_every
    stale = [
        two_level_lost_tokens(
            rate=1.0, failed_share=share, experts=experts, snapshot=(ks[0], every), persist=(ks[1], every)
        )
        for share in (0.0, rates.failed_share)
    ]
    return (
        _blocking(today, rates),
        _scheme("async", rates, copied=today, written=today, loaded=today),
        replace(moc, stale_steps=(stale[0], stale[1])),
        _in_memory(_scheme("full", rates, copied=ours, written=ours, loaded=ours), rates, has_replica=has_replica),
    )


def _level(job: Checkpoint, k: int, rule: str) -> Level:
    return plan_level(job, balanced_rotation(job.ownership, k), k, rule)


def _scheme(name: str, rates: Rates, *, copied: Level, written: Level, loaded: Level) -> Scheme:
    """Return an asynchronous scheme that recovers from storage."""
    copy_s = copied.bottleneck / rates.link
    write_s = rates.transfer_s(bottleneck=written.bottleneck, total=written.total)
    stall_s = save_stall(copy_s, rates.pass_s)
    young = young_interval(save_s=stall_s, rate=rates.faults_per_step, step_s=rates.pass_s)
    return Scheme(
        name=name,
        save_s=stall_s,
        copy_s=copy_s,
        write_s=write_s,
        persist_every=max(1, ceil(young), ceil(write_s / rates.pass_s)),
        snapshot_every=0,
        has_replica=False,
        load_memory_s=loaded.bottleneck / rates.link,
        load_storage_s=rates.transfer_s(bottleneck=loaded.bottleneck, total=loaded.total),
        stale_steps=(0.0, 0.0),
        commit_bytes=written.total,
    )


def _blocking(today: Level, rates: Rates) -> Scheme:
    """Return the scheme that waits for copy and write."""
    scheme = _scheme("blocking", rates, copied=today, written=today, loaded=today)
    save_s = scheme.copy_s + scheme.write_s
    young = young_interval(save_s=save_s, rate=rates.faults_per_step, step_s=rates.pass_s)
    return replace(scheme, save_s=save_s, copy_s=0.0, write_s=0.0, persist_every=max(1, round(young)))


def _in_memory(scheme: Scheme, rates: Rates, *, has_replica: bool) -> Scheme:
    """Return the scheme with snapshots of its own: every step if the copy hides, else every Young interval."""
    young = young_interval(save_s=scheme.save_s, rate=rates.faults_per_step, step_s=rates.pass_s)
    every = max(1, ceil(young))
    return replace(
        scheme,
        snapshot_every=every,
        persist_every=-(-scheme.persist_every // every) * every,
        has_replica=has_replica,
    )


def _inputs(args: argparse.Namespace) -> dict[str, object]:
    rates = ("link_gbps", "storage_gbps", "storage_total_gbps", "fb_s", "restart_s", "node_share", "replicas")
    names = ("parts", "size", *rates, "days", "trials", "seed")
    given: dict[str, object] = {name: getattr(args, name) for name in names}
    given |= {} if args.faults is None else {"faults": args.faults}
    return given | {"mtbf_hours": rates_of(args).mtbf_s / 3600, "ranks_per_node": ranks_per_node(args)}


def _to_json(args: argparse.Namespace, inputs: dict[str, object], outcomes: tuple[Outcome, ...]) -> dict[str, object]:
    rates = rates_of(args)
    return {
        "model": args.model,
        "ranks": {"dp": args.dp, "ep": args.ep, "edp": args.dp // args.ep},
        "inputs": inputs,
        "schemes": [
            {
                "name": outcome.scheme.name,
                "goodput": outcome.goodput,
                "goodput_half_width": outcome.goodput_half_width,
                "plt": outcome.plt,
                "lost_steps_per_fault": outcome.lost_steps_per_fault,
                "faults": outcome.faults,
                "bytes_per_hour": outcome.bytes_per_hour,
                "persist_every": outcome.scheme.persist_every,
                "snapshot_every": outcome.scheme.snapshot_every,
                "step_s": outcome.scheme.step_s(rates.pass_s),
            }
            for outcome in outcomes
        ],
    }


def _print(args: argparse.Namespace, inputs: dict[str, object], outcomes: tuple[Outcome, ...]) -> None:
    say("inputs: " + " ".join(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in inputs.items()))
    print(f"{args.model} on {args.dp} ranks, {args.days:g} days, {outcomes[0].faults:.1f} faults")
    print()
    rows = [
        [
            outcome.scheme.name,
            f"{outcome.goodput:.4f}",
            f"{outcome.goodput_half_width:.4f}",
            f"{outcome.plt:.2e}",
            f"{outcome.lost_steps_per_fault:.1f}",
            str(outcome.scheme.persist_every),
            f"{describe_bytes(round(outcome.bytes_per_hour))}",
        ]
        for outcome in outcomes
    ]
    titles = ["SCHEME", "GOODPUT", "+/-", "PLT", "LOST STEPS", "INTERVAL", "PER HOUR"]
    print_table(titles, rows, left=frozenset({"SCHEME"}))
