"""A world that knows nothing of moc: its ranks load an exported checkpoint with DeepSpeed alone and train on.

python -m tests.export.plain_job RANKS FOLDER SCENARIO...
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist

from tests.export.models import Scenario, build, logits_of, masters_of, observe, train
from tests.export.scenarios import BY_NAME
from tests.support.ranks import join_world

STEPS_AFTER = 4


def run(scenario: Scenario, folder: Path) -> None:
    engine = build(scenario, seed=2)
    path, client_state = engine.load_checkpoint(str(folder / "ours"))
    assert path is not None
    seen = {"at": observe(engine), "client_state": client_state["moc"], "logits": logits_of(engine)}
    seen |= {"losses": train(engine, STEPS_AFTER), "after": observe(engine)}

    other = build(scenario, seed=3)
    other.load_checkpoint(str(folder / "ours"), load_module_only=True)
    seen |= {"module_only": {"logits": logits_of(other), "masters": masters_of(other), "steps": other.global_steps}}
    seen |= {"whole": logits_of_whole_model(scenario, folder / "weights")}
    torch.save(seen, folder / f"seen{dist.get_rank()}.pt")


def logits_of_whole_model(scenario: Scenario, folder: Path) -> torch.Tensor:
    """Return the logits of the model with all experts on each rank, from safetensors alone."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            tied = {alias: name for alias, name in file.metadata().items() if alias != "format"}
    state |= {alias: state[name] for alias, name in tied.items()}
    engine = build(replace(scenario, ep_size=1), seed=4)
    engine.module.load_state_dict(state, strict=True)
    return logits_of(engine)


def run_rank(rank: int, ranks: int, rendezvous: str, folder: Path, names: list[str]) -> None:
    """Be one rank; collective."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    join_world({"rendezvous": rendezvous})
    for name in names:
        run(BY_NAME[name], folder / name)
    assert not [name for name in sys.modules if name == "moc" or name.startswith("moc.")]
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Fork the ranks, which find everything imported, and exit with 1 unless all have come to a good end."""
    ranks, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (ranks, f"{meeting}/rendezvous", folder, names)
        processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    sys.exit(int(any(process.exitcode for process in processes)))


if __name__ == "__main__":
    main()
