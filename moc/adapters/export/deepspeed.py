"""Export of a whole checkpoint to DeepSpeed's own format, for `engine.load_checkpoint` in a script that knows nothing
of moc.

The files are those that `engine.save_checkpoint` would have written in the same world. This is the one place where moc
writes pickles.
What DeepSpeed does not keep goes along: `client_state["moc"]` has the position in the run and rank 0's stateful
objects, and each
rank's optimizer file has under "moc" its own stateful objects and RNG states.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import __version__ as deepspeed_version

from moc.adapters.deepspeed.values import live_of
from moc.adapters.export.model_states import config_of, expert_states, model_state
from moc.adapters.export.partitions import optimizer_state
from moc.adapters.export.placement import Placement
from moc.adapters.export.publish import publish_folder
from moc.adapters.export.source import CheckpointSource
from moc.adapters.export.weights import LOCAL_EXPERT, StoredBuffer, model_dtype, persistent_buffers
from moc.errors import ManifestCorruptError, MismatchError
from moc.format.manifest import Manifest
from moc.repository import Repository
from moc.store.port import Progress

__all__ = ["export_deepspeed"]

SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
NEEDED = ("buffers", "engine", "groups", "loss_scaler", "lr_scheduler", "rng", "stateful", "zero")


def export_deepspeed(repository: Repository, manifest: Manifest, target: Path, progress: Progress) -> tuple[Path, ...]:
    """Write a DeepSpeed checkpoint to the new folder `target` and return its files.

    It loads, optimizer included, in as many ranks with the same expert-parallel sizes and the same ZeRO optimizer;
    weights alone
    (`load_module_only=True`) in any number of ranks. Blocks: until durable. Memory: the dense weights, or one rank's
    partition.
    Raises: UsageError, StorageError, IntegrityError; then nothing is left.
    """
    source = CheckpointSource(repository, manifest, progress)
    model = model_dtype(source)
    first = source.state(source.ranks[0])
    missing = sorted(set(NEEDED) - first.keys())
    if missing:
        raise MismatchError(
            f"checkpoint was not taken from a DeepSpeed engine: name={manifest.name} missing={','.join(missing)}"
        )
    placement = Placement(source, first["groups"])
    tag = _tag(first["engine"])
    with publish_folder(target) as folder:
        (folder / tag).mkdir()
        buffers = persistent_buffers(first, placement.prefixes, placement.first_experts(source.ranks[0]))
        state = model_state(source, placement, first, buffers, model=model)
        _save(state | {"moc": _client_state(source, first)}, folder / tag / "mp_rank_00_model_states.pt")
        del state
        for rank in source.ranks:
            tree = source.state(rank)
            _save_partition(source, placement, rank, tree, model, folder / tag)
            if rank != source.ranks[0]:
                buffers += _expert_buffers(placement, rank, tree)
        for expert, content in expert_states(source, buffers, model=model):
            _save(content, folder / tag / f"layer_{expert.layer}_expert_{expert.index}_mp_rank_00_model_states.pt")
        for name in SCRIPTS:
            script = folder / name
            script.write_bytes(importlib.resources.files("deepspeed.utils").joinpath(name).read_bytes())
            script.chmod(0o755)
        (folder / "latest").write_text(tag)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return tuple(target / file for file in files)


def _tag(engine: Mapping[str, Any]) -> str:
    """Return the name of the folder inside the export: what a checkpoint says must not lead out of it."""
    step = engine.get("global_steps")
    if type(step) is not int or not 0 <= step < 2**63:
        raise ManifestCorruptError(f"state has no step: global_steps={str(step)[:80]!r} allowed=an integer")
    return f"global_step{step}"


def _save_partition(
    source: CheckpointSource, placement: Placement, rank: int, tree: Mapping[str, Any], model: str, folder: Path
) -> None:
    prefix = "bf16_" if model == "BF16" else ""
    content = {
        "optimizer_state_dict": optimizer_state(source, placement, rank, tree, model=model),
        "ds_config": config_of(source, placement, model=model),
        "ds_version": deepspeed_version,
        "moc": {"stateful": live_of(tree["stateful"]), "rng": live_of(tree["rng"])},
    }
    _save(content, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _client_state(source: CheckpointSource, tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "checkpoint": str(source.manifest.name),
        "micro_steps": tree["engine"].get("micro_steps"),
        "stateful": live_of(tree["stateful"]),
    }


def _expert_buffers(placement: Placement, rank: int, tree: Mapping[str, Any]) -> list[StoredBuffer]:
    if not any(LOCAL_EXPERT.fullmatch(name) for name in tree["buffers"]):
        return []
    own = persistent_buffers(tree, placement.prefixes, placement.first_experts(rank))
    return [buffer for buffer in own if buffer.expert is not None]


def _save(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
