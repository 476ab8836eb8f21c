"""Runs a world of ranks that have never seen moc, and brings its processes to an end, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240


def run_plain(module: str, *arguments: str, ranks: int = 2) -> None:
    """Run `python -m module ranks arguments`, which forks the ranks; raises AssertionError with its output."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(ranks), *arguments],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, f"{module} {arguments} failed:\n{output[-8000:]}"
