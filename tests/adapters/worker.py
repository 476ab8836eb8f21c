"""One rank of a test world: runs the named cases one after the other and writes {case: "ok" or a traceback} as JSON.

torchrun ... -m tests.adapters.worker FOLDER CASE...
A failed case ends the world: its ranks may have left it at different collectives.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from tests.adapters import cases, interludes, partial

CASES = {**cases.CASES, **interludes.CASES, **partial.CASES}


def main(folder: Path, names: list[str]) -> None:
    """Run the cases; raises what the first failing one raises."""
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    results: dict[str, str] = {}
    report = folder / f"results{dist.get_rank()}.json"
    for name in names:
        kind, _, argument = name.partition(":")
        try:
            CASES[kind](argument, folder)
        except BaseException:
            report.write_text(json.dumps(results | {name: traceback.format_exc()}))
            raise
        results[name] = "ok"
        report.write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # engines and groups need no orderly end, which takes seconds
