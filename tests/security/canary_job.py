"""A whole job whose storage has a password and whose environment has others; prints what `ps` could see of it.

Lives: one that is killed, one that recovers and is told to end, `moc` verbs beside it. Run by the test as a program,
because the environment must be there before the first process of the job is forked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cli.console import MOC
from tests.support.job import Job


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


def main(folder: Path, url: str) -> None:
    said = []

    def moc(*arguments: str) -> None:
        done = subprocess.run([MOC, *arguments], capture_output=True, text=True, timeout=120, check=False)
        said.append({"arguments": arguments, "code": done.returncode, "out": done.stdout, "err": done.stderr})

    with Job(size=2, root=folder / "rt", step_s=0.01, persist_every=4, run_id="canary", timeout_s=30) as job:
        job.storage = url  # type: ignore[assignment]  # a URL goes the same way as a path
        life = job.start()
        life.event("committed", step=8)
        commands = sorted(set(seen(job)))
        os.environ["MOC_STORAGE"] = url
        root = ("--runtime-root", str(job.root))
        moc("status", *root)
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
        wrong = url.replace("@", "-wrong@")
        job.storage = wrong  # type: ignore[assignment]
        job.start().ended()
        job.storage = url  # type: ignore[assignment]
        last = job.start(steps=life.newest_step("step") + 8, save_at=life.newest_step("step") + 3)
        last.finished()
        os.environ["MOC_STORAGE"] = wrong
        moc("ls")
        logs = [path.read_text(errors="replace") for path in job.folder.glob("life*") if path.is_file()]
    print(json.dumps({"commands": commands, "said": said, "logs": logs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
