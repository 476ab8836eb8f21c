"""The job that the benchmarks measure: its settings, the command that starts it, and its end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from moc.cli.live import read_statuses

__all__ = ["RANKS", "ROOT", "RUNTIME", "SETTINGS", "end_agents", "end_job", "job_environment", "torchrun"]

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
RUNTIME = "rt"  # folder of the node agent's socket, in the folder of a benchmark
SETTINGS = (  # 49 M parameters; a rank's snapshot is 293 MB
    "model.layers=4",
    "model.width=512",
    "model.heads=8",
    "model.dense_hidden=1536",
    "model.moe_layers=odd",
    "model.experts=16",
    "model.expert_hidden=768",
    "model.ep_size=2",
    "data.max_mb=4",
    "data.sequence_length=128",
    "training.micro_batch=2",
    "training.threads=1",
    "training.deterministic=false",
    "training.steps=1000000",
    "logging.tensorboard=false",
    "logging.deepspeed=error",
)
END_WAIT_S = 60.0


def torchrun(script: str, plan: Path, ranks: int = RANKS) -> list[str]:
    """Return the command that starts one of this folder's scripts on all ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [
        *[*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"],
        *[str(ROOT / "benchmarks" / script), str(plan)],
    ]


def job_environment() -> dict[str, str]:
    """Return this environment with one thread per rank, and with this Python's programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def end_job(job: subprocess.Popen[bytes], runtime: Path) -> None:
    """End what is still running: the launcher, which ends its ranks, then their agent, which would keep the arena."""
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
    end_agents(runtime, with_ranks=True)


def end_agents(runtime: Path, *, with_ranks: bool) -> None:
    """SIGKILL the agents below a runtime folder, before them the ranks they watch if wanted."""
    for _, status in read_statuses(None, runtime):
        for row in status["ranks"] if with_ranks else ():
            if row.get("alive"):
                os.kill(int(row["pid"]), signal.SIGKILL)
        os.kill(int(status["pid"]), signal.SIGKILL)
