"""Kill a real job again and again, and judge whether anything was lost, repeated, changed or leaked.

`moc run` supervises DeepSpeed's launcher (or torchrun) with two ranks of `moc_train`'s model. Every 20 to 40 s a victim
is killed by SIGKILL: one rank, all ranks, the node's agent, or agent and ranks at once. After the given time the job is
ended by SIGTERM, started once more, and trained some steps to a good end. Then the same number of steps is trained
without kills and without moc.

    python benchmarks/soak.py --minutes 20 --seed 1

Passed is a soak in which
- the losses of the surviving lineage equal the undisturbed run's bit for bit, and every sample was used once;
- no announced commit was lost, and no life began before what was promised when its predecessor was killed;
- everything that is stored is whole, and nothing is stored that no checkpoint needs;
- the memory, descriptors and threads of agent and ranks, and the files of both folders, do not grow;
- no process is left.

The exit code is 0 if so, else 1. Needs time for the undisturbed run as well: half as much again.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.launch import RANKS, ROOT, job_environment
from benchmarks.machine import machine_facts
from benchmarks.soak_ledger import Kill, Ledger, broken_promises, recoveries_by_source
from benchmarks.soak_watch import AGENT, ARENAS_ALLOWED, Growth, Watch, agent_pids, growth_of, processes, rank_pids
from examples.main_job import free_port
from moc.agent.runtime import LOG_NAME, runtime_folder
from moc.cli.live import read_status
from moc_train.compare import compare, read_lineage
from moc_train.runlog import log_path, read_records, surviving_steps

BIN = Path(sys.executable).parent
SETTINGS = (  # so small that hundreds of steps fit between two kills, with every kind of state
    "model.layers=2",
    "model.width=64",
    "model.heads=2",
    "model.dense_hidden=128",
    "model.moe_layers=odd",
    "model.experts=8",
    "model.expert_hidden=64",
    "model.ep_size=2",
    "data.max_mb=2",
    "data.tokenizer_mb=1",
    "data.vocab_size=1024",
    "data.sequence_length=64",
    "training.micro_batch=2",
    "training.threads=1",
    "optimizer.decay_steps=1000000",
    "logging.tensorboard=false",
    "logging.deepspeed=error",
    "logging.every=1000000",
)
KEEP_LAST, PERSIST_EVERY = 3, 20
ENDLESS = 1_000_000
LAST_STEPS = 100  # of the life that comes to a good end
VICTIMS = {"rank": 4, "all": 2, "agent": 2, "both": 3}  # with their weights
LOOK_S = 1.0
EARLY_SHARE = 0.3  # of the kills may hit a life that does not train yet
END_S = 300.0


def main() -> int:
    options = parse_options()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    job = Job(options)
    try:
        job.soak()
        job.finish()
        job.train_undisturbed()
        problems = job.judge()
    finally:
        job.end()
    print("\nsoak passed" if not problems else "\nsoak FAILED: " + "\n  ".join(["", *problems]), flush=True)
    return int(bool(problems))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="with kills (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the kills' times and victims (default: 1)")
    parser.add_argument("--gap-s", type=float, nargs=2, default=(20.0, 40.0), help="between two kills (default: 20 40)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="emptied first (default: runs/soak)")
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="deepspeed")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="of moc_train")
    return parser.parse_intermixed_args()


class Job:
    """The soaked job, its kills, and what was seen of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._out = options, options.out.resolve()
        self._chance = random.Random(options.seed)
        self._run = f"soak-{os.getpid()}"
        self._storage, self._runtime = self._out / "repository", runtime_folder(self._run, None)
        self._ledger = Ledger(self._storage, self._runtime / LOG_NAME, keep_last=KEEP_LAST)
        self._watch = Watch(self._run, self._storage, self._runtime)
        self._kills: list[Kill] = []
        self._may_hit_start = False
        self._problems: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    def soak(self) -> None:
        """Train and kill until the time is over, then end the job by SIGTERM."""
        process = self._start("disturbed", ENDLESS, is_attached=True)
        self._wait_for_start(process)
        until_s = time.monotonic() + 60 * self._options.minutes
        kill_s = time.monotonic() + self._chance.uniform(*self._options.gap_s)
        while time.monotonic() < until_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(LOOK_S)
                raise SystemExit(
                    f"soak FAILED: the job ended by itself: exit_code={code} log={self._out}/disturbed.log"
                )
            self._watch.look()
            self._ledger.look()
            if time.monotonic() >= kill_s and (self._may_hit_start or self._is_training()):
                self._kill()
                kill_s = time.monotonic() + self._chance.uniform(*self._options.gap_s)
                # Sometimes, but not twice in a row: `moc run` rightly gives up a job that does not get any further.
                self._may_hit_start = not self._may_hit_start and self._chance.random() < EARLY_SHARE
        process.terminate()
        process.wait(END_S)

    def finish(self) -> None:
        """Start the job once more and let it come to a good end, which takes the agent along."""
        self._last_step = max(surviving_steps(self._records())) + LAST_STEPS
        code = self._start("disturbed", self._last_step, is_attached=True).wait(END_S)
        if code:
            self._problems.append(f"the last life did not come to a good end: exit_code={code}")
        if left := [*agent_pids(self._runtime), *rank_pids(self._run)]:
            self._problems.append(f"processes are left: pids={left}")
        self._ledger.look()

    def train_undisturbed(self) -> None:
        """Train the same number of steps without kills and without moc."""
        say(f"the undisturbed run: {self._last_step} steps")
        process = self._start("undisturbed", self._last_step, is_attached=False)
        if code := process.wait(END_S + 120 * self._options.minutes):
            self._problems.append(f"the undisturbed run failed: exit_code={code}")

    def judge(self) -> list[str]:
        """Print what happened and return what should not have."""
        folders = [self._out / name for name in ("undisturbed", "disturbed")]
        comparison = compare(*map(read_lineage, folders))
        starts = [record for record in self._records() if record["event"] == "start"]
        sources = recoveries_by_source(self._storage)
        growth = growth_of(self._watch.samples)
        lost, leftovers = sorted(map(str, self._ledger.lost)), self._ledger.leftovers(self._run)
        committed = self._ledger.newest_step()
        problems = [*self._problems, *comparison.differences[:8], *broken_promises(self._kills, starts)]
        problems += [f"announced commit lost: {name}" for name in lost]
        problems += [f"damaged: {finding}" for finding in self._ledger.damages()]
        problems += [f"left in storage: {name}" for name in leftovers]
        problems += [f"grows: {row.kind} {row.name} {row.first:.1f} to {row.last:.1f}" for row in growth if row.is_leak]
        if committed != self._last_step:
            problems.append(f"the last step is not stored: committed={committed} step={self._last_step}")
        if self._watch.arenas_most > ARENAS_ALLOWED:
            problems.append(f"a process mapped {self._watch.arenas_most} arenas, allowed {ARENAS_ALLOWED}")
        facts: dict[str, Any] = {
            "machine": machine_facts(self._out),
            "seed": self._options.seed,
            "minutes": self._options.minutes,
            "kills": dict(Counter(kill.kind for kill in self._kills)),
            "lives": len(starts),
            "recoveries": dict(sources),
            "commits_announced": len(self._ledger.announced()),
            "commits_lost": len(lost),
            "steps": comparison.steps,
            "steps_done_again": sum(1 for r in self._records() if r["event"] == "step") - comparison.steps,
            "leftovers": len(leftovers),
            "arenas_most": self._watch.arenas_most,
            "comparison": str(comparison),
        }
        report(facts, growth)
        rows = {**facts, "growth": [asdict(row) for row in growth], "problems": problems}
        rows |= {"kill_list": [asdict(kill) for kill in self._kills]}
        (self._out / "soak.json").write_text(json.dumps(rows, indent=1))
        return problems

    def end(self) -> None:
        """Leave no process and no runtime folder behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            self._process.kill()
            self._process.wait()
        words = f"checkpoint.run_id={self._run}"
        for pid in [*agent_pids(self._runtime), *(pid for pid, line in processes() if words in line)]:
            _kill(pid)
        shutil.rmtree(self._runtime, ignore_errors=True)

    def _start(self, name: str, steps: int, *, is_attached: bool) -> "subprocess.Popen[bytes]":
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        launcher = {
            "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", str(RANKS), "--master_port", str(free_port())],
            "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", str(RANKS), *rendezvous],
        }[self._options.launcher]
        supervisor = [str(BIN / "moc"), "run", "-r", str(self._storage), "--max-restarts", "100000", "--delay", "0.2"]
        settings = [*SETTINGS, f"data.cache={self._out / 'cache'}", f"training.steps={steps}"]
        settings += [f"logging.folder={self._out / name}", f"checkpoint.run_id={self._run}"]
        settings += [f"checkpoint.persist_every={PERSIST_EVERY}", f"checkpoint.keep_last={KEEP_LAST}"]
        settings += [*self._options.settings, f"checkpoint.enabled={str(is_attached).lower()}"]
        command = [*launcher, str(ROOT / "moc_train/pretrain.py"), *settings]
        with (self._out / f"{name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*supervisor, "--", *command] if is_attached else command,
                env=job_environment(),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        return self._process

    def _wait_for_start(self, process: "subprocess.Popen[bytes]") -> None:
        until_s = time.monotonic() + END_S
        while not any(record["event"] == "step" for record in self._records()):
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit(f"soak FAILED: the job makes no steps log={self._out}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)

    def _kill(self) -> None:
        """Kill a victim and note what had been promised before."""
        kind = self._chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        agents, ranks = agent_pids(self._runtime), rank_pids(self._run)
        one = ranks[self._chance.randrange(RANKS) :][:1] or ranks
        pids = {"rank": one, "all": ranks, "agent": agents, "both": agents + ranks}[kind]
        if not pids:
            return  # it is just being started
        status = read_status(self._runtime) if agents else None
        starts = self._starts()
        kill = Kill(
            at_s=time.monotonic(),
            kind=kind,
            pids=tuple(pids),
            starts=starts,
            announced_step=self._ledger.newest_step(),
            global_step=None if status is None else status["global_step"],
        )
        for pid in pids:
            _kill(pid)
        self._kills.append(kill)
        say(f"kill {len(self._kills)}: {kind} pids={pids} starts={starts} announced={kill.announced_step}")

    def _is_training(self) -> bool:
        """Return whether the newest life has begun since the last kill of a rank."""
        killed = [kill for kill in self._kills if kill.kind != AGENT]
        return not killed or self._starts() > killed[-1].starts

    def _starts(self) -> int:
        return log_path(self._out / "disturbed", 0).read_bytes().count(b'{"event": "start"')

    def _records(self) -> Sequence[dict[str, Any]]:
        path = log_path(self._out / "disturbed", 0)
        return read_records(path) if path.exists() else ()


def report(facts: dict[str, Any], growth: Sequence[Growth]) -> None:
    print()
    for name, value in facts.items():
        print(f"{name:18} {value}")
    print(f"\n{'grows':8} {'':18} {'first third':>12} {'last third':>12} {'per hour':>10}")
    for row in growth:
        print(f"{row.kind:8} {row.name:18} {row.first:12.1f} {row.last:12.1f} {row.per_hour:10.1f}")


def say(text: str) -> None:
    print(text, flush=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
