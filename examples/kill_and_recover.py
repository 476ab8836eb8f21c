"""Kill a training job with SIGKILL and watch it recover:

from the agent's memory, then, with the agent killed too, from storage.

    python -m examples.kill_and_recover

Runs `attach_moe.py` three times over one repository and compares every loss with an undisturbed run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
STEPS = 40
LINE = re.compile(r"rank (\d+) step (\d+) loss (-?0x\S+?p[+-]\d+)")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, _ = train(Path(folder) / "undisturbed")
        storage = Path(folder) / "disturbed"
        first, trainers = train(storage, kill_at=15)
        print(f"killed trainers {trainers} after step 15", flush=True)
        second, trainers = train(storage, kill_at=30)
        agents = end_agents(storage)
        print(f"killed trainers {trainers} after step 30, and agents {agents}", flush=True)
        third, _ = train(storage)
    losses = first | second | third
    same = sum(losses.get(key) == loss for key, loss in undisturbed.items())
    print(f"losses equal: {same} of {len(undisturbed)} (rank, step) pairs bit-equal")
    print(
        f"first steps of the later lives: {min(s for _, s in second)} (from memory),"
        f" {min(s for _, s in third)} (from storage)"
    )
    return 0 if same == len(undisturbed) else 1


def train(storage: Path, kill_at: int | None = None) -> tuple[dict[tuple[int, int], str], list[int]]:
    """Run the job; return loss by (rank, step), and the pids killed once every rank had finished step `kill_at`."""
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    script = [HERE / "attach_moe.py", "--storage", storage, "--steps", str(STEPS)]
    job = subprocess.Popen(
        [*command, "--rdzv-endpoint", "127.0.0.1:0", *script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    losses: dict[tuple[int, int], str] = {}
    killed: list[int] = []
    assert job.stdout is not None
    for line in job.stdout:
        for match in LINE.finditer(line):  # two ranks may share a line
            losses[int(match[1]), int(match[2])] = match[3]
        if kill_at is not None and not killed and all((rank, kill_at) in losses for rank in (0, 1)):
            killed = children(job.pid)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
    job.wait()
    if kill_at is None and job.returncode:
        raise SystemExit(f"training failed: exit code {job.returncode}")
    return losses, killed


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def end_agents(storage: Path) -> list[int]:
    """SIGKILL the agents that serve this repository."""
    run = next((storage / "incarnations").glob("*.json")).stem.partition("-")[2]
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        if b"moc.agent" in words and run.encode() in words:
            found.append(int(command.parent.name))
            os.kill(found[-1], signal.SIGKILL)
    return found


if __name__ == "__main__":
    sys.exit(main())
