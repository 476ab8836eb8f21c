"""Run cases of `worker.py` in a real world of processes, which ends with the call whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Results", "run_cases"]

ROOT = Path(__file__).parents[2]
OUTPUT_TAIL = 4000

Results = dict[str, str]


def run_cases(folder: Path, ranks: int, cases: Sequence[str], *, timeout_s: float = 280) -> Results:
    """Return "ok" or what went wrong for each case, over all ranks. Blocks: for the cases, at most the timeout."""
    tools = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # the ninja that belongs to this torch
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    log = folder / f"world{ranks}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "-m", "tests.adapters.worker", str(folder), *cases],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": tools,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "PYTHONFAULTHANDLER": "1",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # every process dumps its stacks into the log
        finally:
            _end(process)
    rows = [_read(folder / f"results{rank}.json") for rank in range(ranks)]
    return {case: _verdict(case, rows, log) for case in cases}


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=10)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended, as it should
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def _read(path: Path) -> Results:
    row: Results = json.loads(path.read_text()) if path.exists() else {}
    return row


def _verdict(case: str, rows: list[Results], log: Path) -> str:
    found = [f"rank {rank}: {row[case]}" for rank, row in enumerate(rows) if row.get(case, "ok") != "ok"]
    if not found and all(case in row for row in rows):
        return "ok"
    return "\n".join(found) or f"not reached, the output ends with:\n{log.read_text()[-OUTPUT_TAIL:]}"
