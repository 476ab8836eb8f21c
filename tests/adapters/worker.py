"""One rank of a test world: runs the named cases one after the other and writes {case: "ok" or a traceback} as JSON.

python worker.py FOLDER CASE... with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
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
from cases import CASES


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    results: dict[str, str] = {}
    for name in sys.argv[2:]:
        kind, _, argument = name.partition(":")
        try:
            CASES[kind](argument, folder)
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"results{dist.get_rank()}.json").write_text(json.dumps(results))
        failed = torch.tensor([results[name] != "ok"], dtype=torch.int64)
        dist.all_reduce(failed)
        if int(failed):  # the ranks may have left the case at different collectives
            pass
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
