"""Print what `moc simulate` predicts for a run with faults, from costs that another run has shown, and what it was.

Run A trains under `moc run`, is killed as its schedule says, and shows what steps, snapshots, persists, restarts and
recoveries cost. Run B has other intervals and another schedule. `moc simulate` is given A's costs and B's intervals and
schedule; its goodput is compared with that of B.

    python benchmarks/calibration.py                              # about eleven minutes
    python benchmarks/calibration.py --ranks 1 --side-by-side     # both runs at once, on one machine in one mood

A fault `p` kills one rank, and its memory survives in the agent; `n` kills all ranks and the agent, as the loss of a
node does. Goodput is steps kept x time of a step without saving / time since the first step began. The step time is
A's in both, so the error is that of the steps kept. How fast the machine was during each run is printed beside it.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.launch import RANKS, RUNTIME, SETTINGS, end_agents, end_job, job_environment, torchrun
from benchmarks.machine import machine_facts
from benchmarks.recovery_time import Diaries, Event, wait_until
from moc_train.options import as_mapping, parse_arguments

SMALL = (
    "model.width=256",
    "model.dense_hidden=768",
    "model.heads=4",
    "model.experts=8",
    "model.expert_hidden=512",
    "model.ep_size=null",
)
WARM_STEPS = 3  # the first ones of a life are slower, which is part of its restart
SCALE_MS = 1e3
MOC = Path(sys.executable).parent / "moc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: its intervals in steps, and its faults in seconds after the first step began."""

    name: str
    snapshot_every: int
    persist_every: int
    seconds: float
    faults: str

    def schedule(self) -> list[tuple[float, bool]]:
        """Return when each fault comes and whether it takes the node's memory."""
        return [(float(word[:-1]), word[-1] == "n") for word in self.faults.split(",")]


JOBS = (
    Job(name="A", snapshot_every=5, persist_every=40, seconds=290.0, faults="55p,115n,175p,235n"),
    Job(name="B", snapshot_every=3, persist_every=24, seconds=290.0, faults="65n,120p,170n,240p"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a run has shown, in seconds; the names are those of `moc simulate`'s options."""

    fb_s: float
    save_s: float
    persist_s: float
    copy_s: float
    write_s: float
    restart_s: float
    load_memory_s: float
    load_storage_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What rank 0 noted: its lives, when the first step began, and when each fault came."""

    job: Job
    lives: tuple[tuple[Event, ...], ...]
    begun_s: float
    killed_s: tuple[float, ...]

    def steps(self, life: int) -> list[Event]:
        return [event for event in self.lives[life] if event["event"] == "step"]

    def kept(self) -> int:
        """Return the newest step at the end of the run."""
        return max(
            int(event["step"])
            for event in self.steps(len(self.lives) - 1)
            if event["at_s"] <= self.begun_s + self.job.seconds
        )


def main() -> int:
    options = parse_options()
    folder = Path(tempfile.mkdtemp(prefix="moc-bench-", dir=options.folder))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        facts = machine_facts(folder) | {"ranks": options.ranks, "threads_per_rank": 1}
        facts |= {"at_once": options.side_by_side}
        with ThreadPoolExecutor(len(JOBS) if options.side_by_side else 1) as pool:
            first, second = pool.map(lambda job: measure(folder / job.name, job, options), JOBS)
        costs = fit(first)
        forecast = predict(costs, second.job, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = compare(first, second, costs, forecast)
    if options.json:
        print(json.dumps({"machine": facts, "costs": asdict(costs), **report}, indent=1))
    else:
        print_report(facts, costs, report)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="moc simulate, fed by one run, against another run")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=RANKS)
    parser.add_argument("--side-by-side", action="store_true", help="both runs at once, so that both see one machine")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="for one life to get where it is wanted")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="of moc_train")
    return parser.parse_intermixed_args()


def measure(folder: Path, job: Job, options: argparse.Namespace) -> Run:
    """Run the job through its faults to its end; nothing of it is left running."""
    folder.mkdir()
    config = as_mapping(parse_arguments([*SETTINGS, *SMALL, *options.settings]))
    intervals = {"snapshot_every": job.snapshot_every, "persist_every": job.persist_every}
    (folder / "plan.json").write_text(json.dumps({"config": config, "steps": 1_000_000, **intervals}))
    runtime, diaries = folder / RUNTIME, Diaries(folder, options.ranks)
    schedule = job.schedule()
    supervisor = [str(MOC), "run", "-r", str(folder / "repository")]
    command = [*supervisor, "--runtime-root", str(runtime), "--max-restarts", str(len(schedule)), "--"]
    world = torchrun("recovery_world.py", folder / "plan.json", options.ranks)
    process = subprocess.Popen([*command, *world], env=job_environment(), stdout=sys.stderr)
    killed_s: list[float] = []
    try:
        wait_until(lambda: bool(diaries.first(1, "step")), process, options.deadline_s)
        begun_s = max(float(event["at_s"]) for event in diaries.first(1, "attached"))
        for life, (at_s, takes_node) in enumerate(schedule, 1):
            wait_until(lambda at_s=at_s: now_s() >= begun_s + at_s, process, options.deadline_s)
            require_steps(diaries.life(0, life), f"life {life} of run {job.name}")
            killed_s.append(now_s())
            for rank in range(options.ranks) if takes_node else (options.ranks - 1,):
                os.kill(diaries.life(rank, life)[0]["pid"], signal.SIGKILL)
            if takes_node:
                end_agents(runtime, with_ranks=False)
        wait_until(lambda: now_s() >= begun_s + job.seconds, process, options.deadline_s)
        require_steps(diaries.life(0, len(schedule) + 1), f"the last life of run {job.name}")
        lives = tuple(tuple(diaries.life(0, number)) for number in range(1, len(schedule) + 2))
    finally:
        end_job(process, runtime)
    shutil.rmtree(folder)
    print(f"run {job.name} done", file=sys.stderr, flush=True)
    return Run(job=job, lives=lives, begun_s=begun_s, killed_s=tuple(killed_s))


def require_steps(life: list[Event], name: str) -> None:
    steps = sum(event["event"] == "step" for event in life)
    if steps < WARM_STEPS + 2:
        raise SystemExit(f"{name} has made {steps} steps, too few: the machine is too slow for this schedule")


def now_s() -> float:
    """Return the time on the diaries' clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def fit(run: Run) -> Costs:
    """Return what the run has shown.

    Steps are of three kinds: those that no save touches; those during or right after which a snapshot is taken; those
    that begin while a persist is under way. Means, because what adds up is what counts.
    """
    plain, touched, writing = split_steps(run)
    pass_s, job = statistics.mean(plain), run.job
    snapped_s = statistics.mean([*plain, *touched])
    mean_s = statistics.mean([*plain, *touched, *writing])
    copies = [float(e["copy_ms"]) / SCALE_MS for life in range(len(run.lives)) for e in run.steps(life) if e["copy_ms"]]
    writes = [delay for life in range(len(run.lives)) for delay in write_delays(run, life)]
    copy_s = statistics.mean(copies)
    moc_s: dict[str, list[float]] = {"memory": [], "storage": [], "nothing": []}
    rest_s: list[float] = []
    for life in range(1, len(run.lives)):
        source, attach_s, total_s = restart(run, life, mean_s)
        moc_s[source].append(attach_s)
        rest_s.append(total_s - attach_s)
    if not (moc_s["memory"] and moc_s["storage"] and writes):
        raise SystemExit(f"run {job.name} has not recovered from both memory and storage: {moc_s}")
    return Costs(
        fb_s=pass_s,
        save_s=max(0.0, (snapped_s - pass_s) * job.snapshot_every),
        persist_s=max(0.0, (mean_s - snapped_s) * job.persist_every),
        copy_s=copy_s,
        write_s=max(0.0, statistics.mean(writes) - copy_s),
        restart_s=statistics.mean(rest_s),
        load_memory_s=statistics.mean(moc_s["memory"]),
        load_storage_s=statistics.mean(moc_s["storage"]),
    )


def split_steps(run: Run) -> tuple[list[float], list[float], list[float]]:
    """Return the times of plain steps, of those that a snapshot touches, and of those beside a persist."""
    plain: list[float] = []
    touched: list[float] = []
    writing: list[float] = []
    for life in range(len(run.lives)):
        steps = run.steps(life)[WARM_STEPS:]
        for before, event in pairwise(steps):
            newest = before["step"] // run.job.persist_every * run.job.persist_every
            is_written = newest <= steps[0]["step"] or (before["committed"] or 0) >= newest
            is_touched = event["step"] % run.job.snapshot_every in (0, 1)
            kind = touched if is_touched else plain
            (kind if is_written else writing).append(event["at_s"] - before["at_s"])
    return plain, touched, writing


def write_delays(run: Run, life: int) -> list[float]:
    """Return how long after its step each commit of a life was seen: between two steps, so their middle is taken."""
    steps = run.steps(life)
    ended_s = {event["step"]: event["at_s"] for event in steps}
    delays = []
    for before, event in pairwise(steps):
        is_new = event["committed"] is not None and event["committed"] != before["committed"]
        if is_new and event["committed"] in ended_s:
            delays.append((before["at_s"] + event["at_s"]) / 2 - ended_s[event["committed"]])
    return delays


def restart(run: Run, life: int, step_s: float) -> tuple[str, float, float]:
    """Return what a life recovered from, what moc took for it, and all that it took until steps were as ever."""
    events = {event["event"]: event for event in reversed(run.lives[life])}  # the first of each
    recovered = events["attached"]["recovered"]
    source = "nothing" if recovered is None else recovered["source"]
    warm = run.steps(life)[WARM_STEPS]
    steps = warm["step"] - events["attached"]["resume_step"]
    total_s = warm["at_s"] - run.killed_s[life - 1] - steps * step_s
    return source, events["attached"]["at_s"] - events["built"]["at_s"], total_s


def predict(costs: Costs, job: Job, folder: Path) -> dict[str, Any]:
    """Return the row of `moc simulate` for a job that costs as much."""
    model = folder / "model.json"
    model.write_text(json.dumps(ANY_MODEL))
    options = {**asdict(costs), "snapshot_every": job.snapshot_every, "persist_every": job.persist_every}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(MOC), "simulate", "--model", str(model), "--dp", "2", "--ep", "2"]
    command += [*words, "--days", str(job.seconds / 86400), "--faults", job.faults, "--json"]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = next(row for row in json.loads(ended.stdout)["schemes"] if row["name"] == "measured")
    return found


ANY_MODEL = {
    "name": "any",
    "layers": 1,
    "hidden": 64,
    "heads": 1,
    "vocabulary": 256,
    "ffn": 0,
    "moe_layers": 1,
    "experts": 2,
    "expert_ffn": 64,
    "top_k": 1,
}
"""The measured scheme does not look at the model; the verb's other schemes do."""


def compare(first: Run, second: Run, costs: Costs, forecast: dict[str, Any]) -> dict[str, Any]:
    """Return both goodputs and how far they are apart, and the same with B's own step time."""
    measured = second.kept() * costs.fb_s / second.job.seconds
    speeds = [life_speeds(run) for run in (first, second)]
    means = [statistics.mean(split_steps(run)[0]) for run in (first, second)]
    return {
        "runs": [asdict(run.job) | {"kept": run.kept()} for run in (first, second)],
        "predicted": forecast["goodput"],
        "measured": measured,
        "error": forecast["goodput"] / measured - 1,
        "predicted_lost_steps": forecast["lost_steps_per_fault"] * forecast["faults"],
        "measured_lost_steps": lost_steps(second),
        "plain_step_s": means,
        "plain_step_by_life_s": speeds,
        "speed_ratio": means[1] / means[0],
    }


def life_speeds(run: Run) -> list[float]:
    """Return the median step of each life."""
    medians = []
    for life in range(len(run.lives)):
        steps = run.steps(life)[WARM_STEPS:]
        medians.append(statistics.median(b["at_s"] - a["at_s"] for a, b in pairwise(steps)))
    return medians


def lost_steps(run: Run) -> int:
    """Return how many steps were made and then taken back by faults."""
    lost = 0
    for life in range(1, len(run.lives)):
        resumed = next(event for event in run.lives[life] if event["event"] == "attached")["resume_step"]
        lost += run.steps(life - 1)[-1]["step"] - resumed
    return lost


def print_report(facts: dict[str, object], costs: Costs, report: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for run in report["runs"]:
        print(
            f"run {run['name']}: snapshot every {run['snapshot_every']}, persist every {run['persist_every']} steps, "
            f"{run['seconds']:.0f} s, faults {run['faults']}, kept {run['kept']} steps"
        )
    print("\nwhat run A has shown, seconds: " + ", ".join(f"{n} {v:.4g}" for n, v in asdict(costs).items()))
    print(f"\ngoodput of run B: predicted {report['predicted']:.4f}, measured {report['measured']:.4f}", end="")
    print(f", error {report['error']:+.1%}")
    print(f"steps lost: predicted {report['predicted_lost_steps']:.0f}, measured {report['measured_lost_steps']}")
    before, after = report["plain_step_s"]
    print(f"noise: mean plain step A {before * SCALE_MS:.0f} ms, B {after * SCALE_MS:.0f} ms", end="")
    print(f" ({report['speed_ratio'] - 1:+.1%}); median step by life: ", end="")
    print("; ".join(describe(speeds) for speeds in report["plain_step_by_life_s"]))


def describe(seconds: Sequence[float]) -> str:
    return ", ".join(f"{value * SCALE_MS:.0f}" for value in seconds) + " ms"


if __name__ == "__main__":
    sys.exit(main())
