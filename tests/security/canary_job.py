"""A whole job whose storage has a password and whose environment has others; prints what `ps` could see of it.

Lives: one that is killed, one that recovers and is told to end, `moc` verbs beside it. With several nodes they hold
replicas of each other, and one loses its memory with the first life. Run by the test as a program, because the
environment must be there before the first process of the job is forked.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cli.console import MOC
from tests.support.job import Job, Life


def seen(job: Job) -> Iterator[str]:
    """Yield the command line of every process of the job."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{job.root}/".encode() in (path / "cmdline").read_bytes() or int(path.name) in pids(job):
                yield (path / "cmdline").read_text() + (path / "comm").read_text()
        except (OSError, UnicodeDecodeError):
            continue


def pids(job: Job) -> list[int]:
    return [life.pid(rank) for life in job.lives for rank in range(life.size)]


def secrets(job: Job) -> list[str]:
    """Return what the agents of the present life prove themselves with: one secret where there are several."""
    inventories = [job.ask_agent("inventory", node=node)[0] for node in range(len(job.roots))]
    return sorted({row["peer"]["secret"] for row in inventories if "peer" in row})


def replicas(job: Job) -> list[bytes]:
    """Return all that is in the memory of replicas."""
    found = []
    for node in range(len(job.roots)):
        for path in Path(f"/proc/{job.agent_pid(node)}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the agent has closed it since
                found += [path.read_bytes()] if "-guest" in os.readlink(path) else []
    return found


def lose_memory(job: Job) -> Life:
    """Run a life whose newest state is in memory and in replicas only, until it is killed."""
    life = job.start(persist_every=0)
    for rank in (0, 1):
        life.event("global", rank=rank, step=life.event("attached")["step"] + 8)
    life.kill()
    return life


def main(folder: Path, url: str, nodes: int) -> None:
    said, told, found = [], [], []

    def moc(*arguments: str) -> None:
        done = subprocess.run([MOC, *arguments], capture_output=True, text=True, timeout=120, check=False)
        said.append({"arguments": arguments, "code": done.returncode, "out": done.stdout, "err": done.stderr})

    options = {"step_s": 0.01, "persist_every": 4, "run_id": "canary", "timeout_s": 30, "replicas": nodes - 1}
    with Job(size=2, nodes=nodes, root=folder / "rt", **options) as job:
        job.roots[1:] = [folder / f"rt{node}" for node in range(1, nodes)]
        job.storage = url  # type: ignore[assignment]  # a URL goes the same way as a path
        life = job.start()
        life.event("committed", step=8)
        life.event("global", rank=1, step=8)
        told += secrets(job)
        found += replicas(job)
        commands = sorted(set(seen(job)))
        os.environ["MOC_STORAGE"] = url
        root = ("--runtime-root", str(job.root))
        moc("status", *root)
        if nodes > 1:
            moc("status", "--json", *root)
            moc("status", "--prometheus", *root)
        moc("doctor", "-o", str(folder / "bundle.tar.gz"), "--timeout", "5", *root)
        for verb in (
            ["ls"],
            ["show", "--json"],
            ["verify"],
            ["restore", "--step", "1"],
            ["restore", "--to", str(folder / "x")],
        ):
            moc(*verb)
        life.kill()
        if nodes > 1:
            life = lose_memory(job)
            told += secrets(job)
            job.kill_agent(1)
        wrong = url.replace("@", "-wrong@")
        job.storage = wrong  # type: ignore[assignment]
        job.start().ended()
        job.storage = url  # type: ignore[assignment]
        last = job.start(steps=life.newest_step("step") + 40, save_at=life.newest_step("step") + 3)
        told += secrets(job) if last.event("attached") else []
        last.finished()
        os.environ["MOC_STORAGE"] = wrong
        moc("ls")
        logs = [path.read_text(errors="replace") for path in job.folder.glob("life*") if path.is_file()]
    password = url.partition("@")[0].rpartition(":")[2]
    seen_in = [any(word.encode() in memory for word in (password, *told)) for memory in found]
    results = {"commands": commands, "said": said, "logs": logs, "secrets": told, "replicas_tell": seen_in}
    print(json.dumps(results | {"source": last.event("attached", may_end=True)["source"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
