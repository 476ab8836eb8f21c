"""One rank of a world that trains each scenario, writes a moc checkpoint and DeepSpeed's own, and trains on."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moc.adapters.deepspeed import DeepSpeedState
from moc.format.keys import CheckpointName
from moc.format.manifest import Manifest, ObjectRow
from moc.repository import Repository
from moc.state import RankCatalog, catalog_digest, check_coverage
from moc.store.local import LocalStore
from tests.export.models import Scenario, build, logits_of, observe, train
from tests.export.scenarios import BY_NAME
from tests.export.writer import write_rank
from tests.support.ranks import join_world

STEPS_BEFORE, STEPS_AFTER = 3, 4


class Position:
    """A stateful object as a training loop has it."""

    def __init__(self) -> None:
        self.rows = torch.arange(4) + dist.get_rank()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "epoch": 2, "where": (1.5, None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


def run(scenario: Scenario, folder: Path) -> None:
    engine = build(scenario, seed=1)
    losses = train(engine, STEPS_BEFORE)
    state = DeepSpeedState(engine, {"position": Position()}, extra_fingerprint={})
    save(state, engine, Repository(LocalStore(folder / "repository")))
    engine.save_checkpoint(str(folder / "theirs"))
    expected = {
        "at": observe(engine),
        "logits": logits_of(engine),
        "losses": losses + train(engine, STEPS_AFTER),
        "after": observe(engine),
    }
    torch.save(expected, folder / f"expected{dist.get_rank()}.pt")


def save(state: DeepSpeedState, engine: Any, repository: Repository) -> None:
    """Write a whole checkpoint, every rank its own objects, the manifest last."""
    if dist.get_rank() == 0:
        repository.create()
    dist.barrier()
    name = CheckpointName(run="export", incarnation=1, step=state.step, attempt="0123abcd")
    rows = write_objects(state, engine, name, repository)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (rows, state.catalog))
    if dist.get_rank() == 0:
        catalogs: list[RankCatalog] = [catalog for _, catalog in gathered]
        repository.put_manifest(
            Manifest(
                name=name,
                parent=None,
                topology=state.topology([0] * dist.get_world_size()).to_json(),
                catalog_digest=catalog_digest(catalogs),
                tensors=check_coverage(shard for catalog in catalogs for shard in catalog.shards),
                objects=tuple(sorted((row for rows, _ in gathered for row in rows), key=lambda row: row.key)),
                fingerprint=canonical(state.fingerprint),
                versions={},
                is_finite=True,
            )
        )
    dist.barrier()


def canonical(value: Any) -> Any:
    """Return JSON values without floats, which a manifest cannot hold, as the manager stores them."""
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return repr(value) if isinstance(value, float) else value


def write_objects(state: DeepSpeedState, engine: Any, name: CheckpointName, repository: Repository) -> list[ObjectRow]:
    shards = state.catalog.shards
    buffers = [ctypes.create_string_buffer(max(1, shard.size_bytes)) for shard in shards]
    crcs = array("I", [0] * len(shards))
    state.copy_shards(array("Q", [ctypes.addressof(buffer) for buffer in buffers]), crcs)
    contents = [
        (shard, buffer.raw[: shard.size_bytes], crc) for shard, buffer, crc in zip(shards, buffers, crcs, strict=True)
    ]
    return write_rank(repository, name, dist.get_rank(), contents, captured(state, engine))


def captured(state: DeepSpeedState, engine: Any) -> dict[str, Any]:
    """Return the captured tree with what a state dict needs beside it: which buffers persist, which names are tied."""
    tree = state.capture()
    keys = engine.module.state_dict().keys()
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in engine.module.named_parameters()}
    tree.setdefault("persistent_buffers", sorted(tree["buffers"].keys() & keys))
    tree.setdefault("tied", {name: first[id(p)] for name, p in parameters.items() if first[id(p)] != name})
    return tree


def main(spec: Mapping[str, Any]) -> None:
    """Join the world and run the scenarios."""
    join_world(spec)
    for name in spec["scenarios"]:
        folder = Path(spec["folder"], name)
        folder.mkdir(exist_ok=True)
        run(BY_NAME[name], folder)
    dist.barrier()
