"""One rank of a world that runs several scenarios, one after another, in the same processes.

Its specification has a "plan", a list of {"verb": "train" | "checkpoint", "folder": ..., "settings": [...]}: "train" is
a whole run as pretrain.py makes it; "checkpoint" saves and loads with DeepSpeed's own writer and leaves a report per
rank.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moc_train.config import TrainConfig, resolve
from moc_train.data import SampleLoader
from moc_train.launch import Place, read_place
from moc_train.options import parse_arguments
from moc_train.training import build_engine, open_tokens, run, start_torch

STEPS_BEFORE, STEPS_AFTER = 3, 3


def build(config: TrainConfig, place: Place) -> tuple[Any, SampleLoader]:
    sizes = resolve(config, place.world_size)
    tokens = open_tokens(config, place)
    loader = SampleLoader(
        tokens,
        seed=config.data.seed,
        rank=place.rank,
        world_size=place.world_size,
        micro_batch=config.training.micro_batch,
        accumulation=sizes.accumulation,
    )
    return build_engine(config, sizes, tokens.vocab_size), loader


def train_steps(engine: Any, loader: SampleLoader, steps: int) -> list[str]:
    losses = []
    for _ in range(steps):
        for tokens, targets in loader.next_step().micro_batches:
            out = engine(tokens, targets)
            engine.backward(out.total)
            engine.step()
        losses.append(out.language.item().hex())
    return losses


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save_and_load(config: TrainConfig, place: Place, folder: Path, other: TrainConfig) -> dict[str, Any]:
    """Save after a few steps, go on, and load into engines of another seed: the whole state, then the module only."""
    start_torch(config, place)
    engine, loader = build(config, place)
    train_steps(engine, loader, STEPS_BEFORE)
    engine.save_checkpoint(str(folder), tag="saved")
    saved, position = parameters(engine), loader.state_dict()
    expected = train_steps(engine, loader, STEPS_AFTER)

    resumed, loader = build(other, place)
    different = not is_same(saved, parameters(resumed))
    loader.load_state_dict(position)
    resumed.load_checkpoint(str(folder), tag="saved")
    full = is_same(saved, parameters(resumed))
    actual = train_steps(resumed, loader, STEPS_AFTER)

    weights, _loader = build(other, place)
    weights.load_checkpoint(str(folder), tag="saved", load_module_only=True)
    return {
        "different_before": different,
        "full": full,
        "module_only": is_same(saved, parameters(weights)),
        "expected": expected,
        "actual": actual,
    }


def main(spec: Mapping[str, Any]) -> None:
    """Run the scenarios of the plan."""
    place = read_place(os.environ)
    for scenario in spec["plan"]:
        folder = Path(scenario["folder"])
        config = parse_arguments([*scenario["settings"], f"logging.folder={folder}"])
        if scenario["verb"] == "train":
            run(config, place)
            continue
        other = parse_arguments([*scenario["settings"], "model.seed=99"])
        report = save_and_load(config, place, folder, other)
        (folder / f"report{place.rank}.json").write_text(json.dumps(report), encoding="utf-8")
    torch.distributed.destroy_process_group()
