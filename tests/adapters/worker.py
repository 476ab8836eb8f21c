"""One rank of a test world: runs the named cases one after the other and writes {case: "ok" or a traceback} as JSON.

A failed case ends the world: its ranks may have left it at different collectives.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.adapters import cases, interludes, partial
from tests.support.ranks import join_world

CASES = {**cases.CASES, **interludes.CASES, **partial.CASES}


def main(spec: Mapping[str, Any]) -> None:
    """Join the world and run the cases; raises what the first failing one raises."""
    join_world(spec)
    folder = Path(spec["folder"])
    results: dict[str, str] = {}
    report = folder / f"results{dist.get_rank()}.json"
    for name in spec["cases"]:
        kind, _, argument = name.partition(":")
        try:
            CASES[kind](argument, folder)
        except BaseException:
            report.write_text(json.dumps(results | {name: traceback.format_exc()}))
            raise
        results[name] = "ok"
        report.write_text(json.dumps(results))
    dist.barrier()
