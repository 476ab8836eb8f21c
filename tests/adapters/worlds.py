"""Run cases of `worker.py` in a real world of processes, which ends with the call whatever happens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.support.zygote import Zygote, run_world

__all__ = ["Results", "run_cases"]

Results = dict[str, str]


def run_cases(zygote: Zygote, folder: Path, ranks: int, cases: Sequence[str], *, timeout_s: float = 280) -> Results:
    """Return "ok" or what went wrong for each case, over all ranks. Blocks: for the cases, at most the timeout."""
    spec = {"folder": str(folder), "cases": list(cases)}
    words = run_world(zygote, "tests.adapters.worker", spec, ranks=ranks, folder=folder, deadline_s=timeout_s)
    rows = [_read(folder / f"results{rank}.json") for rank in range(ranks)]
    return {case: _verdict(case, rows, words) for case in cases}


def _read(path: Path) -> Results:
    row: Results = json.loads(path.read_text()) if path.exists() else {}
    return row


def _verdict(case: str, rows: list[Results], words: str) -> str:
    found = [f"rank {rank}: {row[case]}" for rank, row in enumerate(rows) if row.get(case, "ok") != "ok"]
    if not found and all(case in row for row in rows):
        return "ok"
    return "\n".join(found) or f"not reached, the output ends with:\n{words}"
