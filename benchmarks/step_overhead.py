"""Print what moc adds to a training step: a snapshot every step and a durable checkpoint per block, over nothing.

A real DeepSpeed job (ZeRO-2, two ranks, expert parallel 2) trains `moc_train`'s model in blocks of steps. Blocks with
and without moc alternate, in a random order inside each pair; the result is the difference inside the pairs. In the
same run DeepSpeed's own `save_checkpoint` writes the same state to the same disk.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --pairs 6 --saves 2          a look, not a result
    python benchmarks/step_overhead.py --json model.experts=8 training.accumulation=2
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from benchmarks.launch import RANKS, RUNTIME, SETTINGS, end_job, job_environment, torchrun
from benchmarks.machine import machine_facts
from moc_train.options import as_mapping, parse_arguments

DRAWS = 10_000  # of the bootstrap


def main() -> int:
    options = parse_options()
    folder = Path(tempfile.mkdtemp(prefix="moc-bench-", dir=options.folder))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        facts = machine_facts(folder) | {"ranks": RANKS, "threads_per_rank": 1}
        ranks = run_world(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = {"machine": facts, "options": describe(options), **summarise(ranks, options)}
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what moc adds to a training step")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of blocks (default: 40)")
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="begin no pair after that, however few (default: 12)"
    )
    parser.add_argument("--block", type=int, default=10, help="steps of a block, and between checkpoints (default: 10)")
    parser.add_argument("--warmup-pairs", type=int, default=1, help="pairs that are not counted (default: 1)")
    parser.add_argument("--saves", type=int, default=5, help="runs of DeepSpeed's save_checkpoint (default: 5)")
    parser.add_argument("--plain-steps", type=int, default=5, help="steps between those (default: 5)")
    parser.add_argument("--versions", type=int, default=3, help="copies in the arena (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the blocks and of the bootstrap")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--timeout-s", type=float, default=3600.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="of moc_train")
    options = parser.parse_intermixed_args()
    if min(options.pairs, options.block, options.warmup_pairs, options.saves, options.plain_steps) < 1:
        parser.error("--pairs, --block, --warmup-pairs, --saves and --plain-steps must be positive")
    return options


def describe(options: argparse.Namespace) -> dict[str, object]:
    return {key: value for key, value in sorted(vars(options).items()) if key not in ("json", "folder", "timeout_s")}


def run_world(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the world and return what its ranks measured; nothing of it is left running."""
    plan = {**describe(options), "config": as_mapping(parse_arguments([*SETTINGS, *options.settings]))}
    (folder / "plan.json").write_text(json.dumps(plan))
    command = torchrun("overhead_world.py", folder / "plan.json")
    world = subprocess.Popen(command, env=job_environment(), stdout=sys.stderr, start_new_session=True)
    try:
        code = world.wait(options.timeout_s)
    finally:
        end_job(world, folder / RUNTIME)
    if code:
        raise SystemExit(f"the world failed: exit code {code}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


# From measurements to figures


def summarise(ranks: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures. A block takes as long as its slowest rank; counts are sums over the ranks."""
    steps = options.block
    wall = {
        kind: np.array([[pair[kind]["spent_ms"]["wall"] for pair in rank["pairs"]] for rank in ranks]).max(0) / steps
        for kind in ("with", "without")
    }
    cpu = {kind: cpu_ms(ranks, kind) / steps for kind in ("with", "without")}
    added_ms = wall["with"] - wall["without"]
    saving = [pair["with"] for rank in ranks for pair in rank["pairs"]]
    plain = [pair["without"] for rank in ranks for pair in rank["pairs"]]
    return {
        "pairs": len(added_ms),
        "parameters": ranks[0]["parameters"],
        "plain_step_ms": spread(wall["without"], options.seed),
        "added_ms_per_step": spread(added_ms, options.seed),
        "added_percent": spread(100 * added_ms / wall["without"], options.seed),
        "added_cpu_ms_per_step": spread(cpu["with"] - cpu["without"], options.seed),
        "added_ms_by_position": positions(ranks, steps),
        "per_saving_step_ms": {
            "boundary": mean_of_steps(saving, "boundary_ms"),
            "capture": mean_of_steps(saving, "capture_ms"),
            "copy_wall": mean_of_steps(saving, "copy_ms"),
            "stall": statistics.fmean(block["stall_ms"] for block in saving) / steps,
        },
        "threads_ms_per_step": {
            name: [statistics.fmean(b["spent_ms"][name] for b in blocks) / steps for blocks in (saving, plain)]
            for name in ("rank_run", "train_run", "train_wait", "copy_run", "copy_wait", "agent_run")
        },
        "snapshot_bytes_per_rank": [rank["snapshot_bytes"] for rank in ranks],
        "shards_per_rank": [rank["shards"] for rank in ranks],
        "arena_bytes": ranks[0]["arena_bytes"],
        "checkpoint_bytes": ranks[0]["checkpoint_bytes"],
        "snapshots": {name: sum(block[name] for block in saving) for name in ("sealed", "skipped", "failed")},
        "snapshots_due": steps * len(saving),
        "problems": sorted({str(block["problem"]) for block in saving if block["problem"]}),
        "blocks_committed_in_time": sum(pair["with"]["is_committed"] for pair in ranks[0]["pairs"]),
        "agent_cpu_s": sum(p[kind]["spent_ms"]["agent_run"] for p in ranks[0]["pairs"] for kind in p) / 1e3,
        "deepspeed_save": {
            name: spread([save[name] for save in ranks[0]["saves"]], options.seed)
            for name in ("save_ms", "durable_ms", "plain_step_ms")
        },
        "deepspeed_save_bytes": ranks[0]["saves"][-1]["bytes"],
    }


def spread(values: Sequence[float], seed: int) -> dict[str, Any]:
    """Return median and mean, each with the 95 % interval of a percentile bootstrap over the values."""
    data = np.asarray(values, dtype=float)
    drawn = data[np.random.default_rng(seed).integers(0, len(data), (DRAWS, len(data)))]

    def interval(statistic: Callable[..., Any]) -> list[float]:
        return [float(bound) for bound in np.percentile(statistic(drawn, axis=1), (2.5, 97.5))]

    return {
        "n": len(data),
        "median": float(np.median(data)),
        "median_95": interval(np.median),
        "mean": float(data.mean()),
        "mean_95": interval(np.mean),
    }


def cpu_ms(ranks: list[dict[str, Any]], kind: str) -> Any:
    """Return the CPU time of each block, of all ranks and the agent: it depends less than time on what else runs."""
    spent = [[pair[kind]["spent_ms"] for pair in rank["pairs"]] for rank in ranks]
    agent = np.array([row["agent_run"] for row in spent[0]])  # one agent, which every rank has seen
    return np.array([[row["rank_run"] for row in rows] for rows in spent]).sum(0) + agent


def positions(ranks: list[dict[str, Any]], steps: int) -> list[float]:
    """Return, for each position in a block, the median difference: the persist runs in the first positions."""
    series = {
        kind: np.array([[[row["step_ms"] for row in p[kind]["steps"]] for p in rank["pairs"]] for rank in ranks]).max(0)
        for kind in ("with", "without")
    }
    difference = np.median(series["with"] - series["without"], axis=0)
    assert difference.shape == (steps,), f"one row per step: {difference.shape} {steps=}"
    return [float(value) for value in difference]


def mean_of_steps(blocks: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for block in blocks for row in block["steps"])


# Printing


def print_report(report: dict[str, Any]) -> None:
    options, machine = report["options"], report["machine"]
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    size = statistics.fmean(report["snapshot_bytes_per_rank"]) / 1e6
    print(
        f"model {report['parameters'] / 1e6:.0f} M parameters, snapshot {size:.0f} MB per rank in"
        f" {report['shards_per_rank'][0]} shards, checkpoint {report['checkpoint_bytes'] / 1e6:.0f} MB,"
        f" arena {report['arena_bytes'] / 1e6:.0f} MB"
    )
    print(f"{report['pairs']} pairs of blocks of {options['block']} steps: a snapshot a step, a checkpoint a block\n")
    print(line("step without moc, ms", report["plain_step_ms"]))
    print(line("added by moc, ms per step", report["added_ms_per_step"]))
    print(line("added by moc, percent", report["added_percent"]))
    print(line("added CPU of all processes, ms per step", report["added_cpu_ms_per_step"]))
    places = " ".join(f"{value:.0f}" for value in report["added_ms_by_position"])
    print(f"{'median added by position in block, ms':40s} {places}\n")
    for name, value in report["per_saving_step_ms"].items():
        print(f"{name + ', ms per step':40s} {value:8.2f}")
    print(f"\n{'thread, ms per step':40s} {'with':>8s} {'without':>8s}")
    for name, (saving, plain) in report["threads_ms_per_step"].items():
        print(f"{name:40s} {saving:8.1f} {plain:8.1f}")
    counts, due = report["snapshots"], report["snapshots_due"]
    print(f"\nsnapshots: {due} due, " + ", ".join(f"{value} {name}" for name, value in counts.items()))
    for problem in report["problems"]:
        print(f"  {problem}")
    print(f"checkpoints committed within their block: {report['blocks_committed_in_time']} of {report['pairs']}")
    print(f"agent: {report['agent_cpu_s']:.1f} s of CPU in all counted blocks\n")
    print(f"DeepSpeed's save_checkpoint, {report['deepspeed_save_bytes'] / 1e6:.0f} MB")
    print(line("until it returns, ms", report["deepspeed_save"]["save_ms"]))
    print(line("until it is on the disk, ms", report["deepspeed_save"]["durable_ms"]))
    added, save = report["added_ms_per_step"]["mean"], report["deepspeed_save"]["save_ms"]["mean"]
    print(
        f"added per step: save_checkpoint every step {save:.0f} ms, every {options['block']} steps"
        f" {save / options['block']:.0f} ms; moc, both at once, {added:.0f} ms"
    )


def line(title: str, figure: dict[str, Any]) -> str:
    median, mean = figure["median_95"], figure["mean_95"]
    return (
        f"{title:40s} median {figure['median']:8.2f} ({median[0]:.2f} .. {median[1]:.2f})"
        f"   mean {figure['mean']:8.2f} ({mean[0]:.2f} .. {mean[1]:.2f})   n={figure['n']}"
    )


if __name__ == "__main__":
    sys.exit(main())
