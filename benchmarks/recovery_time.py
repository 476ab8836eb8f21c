"""Print how long a job stands still when a rank is killed: from SIGKILL to the first step of the next life, by phase.

`moc run` supervises torchrun with two ranks of `moc_train`'s model. For a recovery from memory one rank is killed; for
one from storage all ranks and the node's agent, with the memory it holds. Kinds alternate in one run.

    python benchmarks/recovery_time.py --repeats 3
    python benchmarks/recovery_time.py --repeats 1 --json model.experts=8

launch    the end of the other rank, the delay of `moc run` (1 s), torchrun's start, Python's start
import    torch, DeepSpeed, moc
join      process group, token file
engine    model and deepspeed.initialize
choose    what there is on the lineage
restore   bytes into the engine
begin     the rest of attach: the agent's arena, the record of the new life
step      the first step
moc       of these, choose, restore and begin: what `CheckpointManager.attach` takes
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.launch import RANKS, RUNTIME, SETTINGS, end_agents, end_job, job_environment, torchrun
from benchmarks.machine import machine_facts
from moc_train.options import as_mapping, parse_arguments

MEMORY, STORAGE = "memory", "storage"
PHASES = ("launch", "import", "join", "engine", "choose", "restore", "begin", "step")
PERSIST_EVERY = 5
STEPS_BEFORE_KILL = 6  # so that the life has a commit of its own
LOOK_S = 0.02

Event = dict[str, Any]


class Diaries:
    """What the ranks have noted so far."""

    def __init__(self, folder: Path, ranks: int = RANKS) -> None:
        self._paths = [folder / f"rank{rank}.jsonl" for rank in range(ranks)]

    def life(self, rank: int, number: int) -> list[Event]:
        """Return a rank's events in its life of this number, from 1; a line that is not whole yet is left for later."""
        path = self._paths[rank]
        text = path.read_text().rpartition("\n")[0] if path.exists() else ""
        lives: list[list[Event]] = []
        for event in map(json.loads, text.splitlines()):
            if event["event"] == "imported":
                lives.append([])
            lives[-1].append(event)
        return lives[number - 1] if len(lives) >= number else []

    def first(self, number: int, kind: str) -> list[Event]:
        """Return every rank's first event of this kind in a life, or nothing until all have it."""
        found = [
            next((e for e in self.life(rank, number) if e["event"] == kind), None) for rank in range(len(self._paths))
        ]
        events = [event for event in found if event is not None]
        return events if len(events) == len(self._paths) else []

    def is_ripe(self, number: int) -> bool:
        """Return whether a life has made enough steps, the last of them with a commit of this life."""
        for rank in range(len(self._paths)):
            events = self.life(rank, number)
            resumed = next((e["resume_step"] for e in events if e["event"] == "attached"), None)
            last = events[-1] if events else {}
            if resumed is None or last["event"] != "step" or last["step"] - resumed < STEPS_BEFORE_KILL:
                return False
            if last["committed"] is None or last["committed"] <= resumed:
                return False
        return True


def main() -> int:
    options = parse_options()
    folder = Path(tempfile.mkdtemp(prefix="moc-bench-", dir=options.folder))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        facts = machine_facts(folder) | {"ranks": RANKS, "threads_per_rank": 1}
        rows = measure(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps({"machine": facts, "recoveries": rows}, indent=1))
    else:
        print_report(facts, rows)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="how long a job stands still when a rank is killed")
    parser.add_argument("--repeats", type=int, default=3, help="recoveries of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="for one life to get where it is wanted")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="of moc_train")
    return parser.parse_intermixed_args()


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the job through its lives and return one row per recovery; nothing of it is left running."""
    config = as_mapping(parse_arguments([*SETTINGS, *options.settings]))
    plan = {"config": config, "snapshot_every": 1, "persist_every": PERSIST_EVERY, "steps": 1_000_000}
    (folder / "plan.json").write_text(json.dumps(plan))
    runtime, diaries = folder / RUNTIME, Diaries(folder)
    kinds = (MEMORY, STORAGE) * options.repeats
    supervisor = [str(Path(sys.executable).parent / "moc"), "run", "-r", str(folder / "repository")]
    command = [*supervisor, "--runtime-root", str(runtime), "--max-restarts", str(len(kinds)), "--"]
    job = subprocess.Popen(
        [*command, *torchrun("recovery_world.py", folder / "plan.json")], env=job_environment(), stdout=sys.stderr
    )
    rows = []
    try:
        for number, kind in enumerate(kinds, 1):
            wait_until(lambda number=number: diaries.is_ripe(number), job, options.deadline_s)
            pids = [diaries.life(rank, number)[0]["pid"] for rank in range(RANKS)]
            killed_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            for pid in pids[-1:] if kind == MEMORY else pids:
                os.kill(pid, signal.SIGKILL)
            if kind == STORAGE:
                end_agents(runtime, with_ranks=False)
            wait_until(lambda number=number: bool(diaries.first(number + 1, "step")), job, options.deadline_s)
            rows.append(split_phases(diaries, number + 1, killed_s))
            print(f"{kind}: {rows[-1]['total']:.1f} s", file=sys.stderr, flush=True)
    finally:
        end_job(job, runtime)
    return rows


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[bytes], deadline_s: float) -> None:
    """Look until the condition holds; SystemExit when the job has ended or the time is over."""
    ends_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > ends_s:
            raise SystemExit(f"the job did not get on within {deadline_s:.0f} s")
        try:
            raise SystemExit(f"the job ended: exit code {job.wait(LOOK_S)}")
        except subprocess.TimeoutExpired:
            continue


def split_phases(diaries: Diaries, number: int, killed_s: float) -> dict[str, Any]:
    """Return the phases of a life's beginning in seconds; each ends when the last rank has come so far."""

    def reached_s(kind: str) -> float:
        return max(float(event["at_s"]) for event in diaries.first(number, kind))

    started_s = max(float(event["started_s"]) for event in diaries.first(number, "imported"))
    recovered = diaries.first(number, "attached")[0]["recovered"]
    if recovered is None:
        raise SystemExit(f"life {number} recovered nothing")
    choose, restore = (float(recovered["seconds"][name]) for name in ("choose", "restore"))
    return {
        "source": recovered["source"],
        "resumed_at": recovered["step"],
        "launch": started_s - killed_s,
        "import": reached_s("imported") - started_s,
        "join": reached_s("joined") - reached_s("imported"),
        "engine": reached_s("built") - reached_s("joined"),
        "choose": choose,
        "restore": restore,
        "begin": reached_s("attached") - reached_s("built") - choose - restore,
        "step": reached_s("step") - reached_s("attached"),
        "moc": reached_s("attached") - reached_s("built"),
        "total": reached_s("step") - killed_s,
    }


def print_report(facts: dict[str, object], rows: list[dict[str, Any]]) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("seconds from SIGKILL to the first step of the next life, median (range)\n")
    sources = [source for source in (MEMORY, STORAGE) if any(row["source"] == source for row in rows)]
    chosen = {source: [row for row in rows if row["source"] == source] for source in sources}
    print(f"{'':10s}" + "".join(f"{f'from {source}, n={len(chosen[source])}':>28s}" for source in sources))
    for phase in (*PHASES, "moc", "total"):
        cells = [sorted(float(row[phase]) for row in chosen[source]) for source in sources]
        print(f"{phase:10s}" + "".join(f"{describe(cell):>28s}" for cell in cells))


def describe(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({values[0]:.2f} .. {values[-1]:.2f})"


if __name__ == "__main__":
    sys.exit(main())
