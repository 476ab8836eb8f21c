"""One rank of a world that knows nothing of moc: loads an exported checkpoint with DeepSpeed alone and trains on.

torchrun ... -m tests.export.plain_job FOLDER SCENARIO...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import safetensors
import torch
import torch.distributed as dist

from tests.export.models import Scenario, build, logits_of, masters_of, observe, train
from tests.export.scenarios import BY_NAME

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


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for name in sys.argv[2:]:
        run(BY_NAME[name], Path(sys.argv[1], name))
    assert not [name for name in sys.modules if name == "moc" or name.startswith("moc.")]
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
