"""Export of the whole weights to safetensors, sharded and indexed as the Hugging Face hub has it.

Names are the keys of the state dict of the same model with expert-parallel size 1. Tensors are written one at a time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

from moc.adapters.export.placement import Placement
from moc.adapters.export.publish import publish_folder
from moc.adapters.export.source import CheckpointSource
from moc.adapters.export.weights import (
    FLOAT_DTYPES,
    LOCAL_EXPERT,
    StoredBuffer,
    cast_bytes,
    model_dtype,
    persistent_buffers,
    weights_of,
)
from moc.errors import InternalError, UsageError
from moc.format.manifest import Manifest
from moc.repository import Repository
from moc.state import DTYPE_BYTES, Shard
from moc.store.port import Progress

__all__ = ["SHARD_BYTES", "export_safetensors"]

SHARD_BYTES = 5 * 1024**3  # the hub's own limit of one file
HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One tensor of the export; `load` returns its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], memoryview]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def export_safetensors(
    repository: Repository,
    manifest: Manifest,
    target: Path,
    progress: Progress,
    *,
    dtype: Literal["model", "f32"] = "model",
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Path, ...]:
    """Write the weights of a checkpoint to the new folder `target` and return the files, index included.

    With "model" weights have the precision that training held them in, with "f32" that of their masters; buffers stay
    as they are.
    Blocks: until durable. Memory: one tensor and its cast. Raises: UsageError, StorageError, IntegrityError; then
    nothing is left.
    """
    if dtype not in ("model", "f32") or shard_bytes < 1:
        raise UsageError(
            f"export option is out of range: dtype={dtype} shard_bytes={shard_bytes} allowed=model,f32 and >= 1"
        )
    source = CheckpointSource(repository, manifest, progress)
    wanted = model_dtype(source) if dtype == "model" else "F32"
    first = source.state(source.ranks[0])
    files = _divide(_entries(source, first, wanted), shard_bytes)
    # The library's own convention: a tensor is stored under one name, the metadata map its other names to it.
    metadata = {"format": "pt"} | {str(alias): str(name) for alias, name in first.get("tied", {}).items()}
    with publish_folder(target) as folder:
        names = _file_names(len(files))
        for name, entries in zip(names, files, strict=True):
            with (folder / name).open("wb") as file:
                _write_file(file, entries, metadata)
        if len(files) > 1:
            names.append("model.safetensors.index.json")
            (folder / names[-1]).write_text(_index(files, names), encoding="utf-8")
    return tuple(target / name for name in names)


def _entries(source: CheckpointSource, first: Mapping[str, Any], wanted: str) -> list[_Entry]:
    entries = [_weight_entry(source, shard, wanted) for shard in weights_of(source)]
    known = {entry.name for entry in entries}
    for buffer in _buffers(source, first):
        if buffer.name not in known:
            known.add(buffer.name)
            entries.append(
                _Entry(name=buffer.name, dtype=buffer.value.dtype, shape=buffer.value.shape, load=_loaded(buffer))
            )
    return sorted(entries, key=lambda entry: _natural(entry.name))


def _weight_entry(source: CheckpointSource, shard: Shard, wanted: str) -> _Entry:
    dtype = wanted if shard.dtype in FLOAT_DTYPES else shard.dtype
    return _Entry(
        name=shard.tensor,
        dtype=dtype,
        shape=shard.shape,
        load=lambda: cast_bytes(source.read(shard), shard.dtype, dtype),
    )


def _buffers(source: CheckpointSource, tree: Mapping[str, Any]) -> list[StoredBuffer]:
    """Return the buffers of the first rank, whose tree is given, and of the others those inside experts."""
    if not tree.get("buffers"):
        return []
    ranks = source.ranks
    placement = Placement(source, tree["groups"])
    found = persistent_buffers(tree, placement.prefixes, placement.first_experts(ranks[0]))
    if any(LOCAL_EXPERT.fullmatch(name) for name in tree["buffers"]):
        for rank in ranks[1:]:
            own = persistent_buffers(source.state(rank), placement.prefixes, placement.first_experts(rank))
            found += [buffer for buffer in own if buffer.expert is not None]
    return found


def _loaded(buffer: StoredBuffer) -> Callable[[], memoryview]:
    return lambda: buffer.value.data


def _divide(entries: Sequence[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    """Divide the entries, in order, into files of at most `shard_bytes`; a larger tensor has a file to itself."""
    files: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.size_bytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.size_bytes
    return files


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_file(file: BinaryIO, entries: Sequence[_Entry], metadata: Mapping[str, str]) -> None:
    # Wide elements first: with a header of a multiple of 8 bytes, every tensor is aligned to its element.
    ordered = sorted(entries, key=lambda entry: (-DTYPE_BYTES[entry.dtype], _natural(entry.name)))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    reached = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [reached, reached + entry.size_bytes],
        }
        reached += entry.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust(-(-len(text) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT)
    file.write(struct.pack("<Q", len(padded)) + padded)
    for entry in ordered:
        data = entry.load()
        if data.nbytes != entry.size_bytes:
            raise InternalError(
                f"tensor has an unexpected size: tensor={entry.name} bytes={data.nbytes} expected={entry.size_bytes}"
            )
        file.write(data)


def _index(files: Sequence[Sequence[_Entry]], names: Sequence[str]) -> str:
    sizes = sum(entry.size_bytes for entries in files for entry in entries)
    rows = {entry.name: name for name, entries in zip(names, files, strict=False) for entry in entries}
    return json.dumps({"metadata": {"total_size": sizes}, "weight_map": dict(sorted(rows.items()))}, indent=2) + "\n"


def _natural(name: str) -> list[tuple[int, str]]:
    """Order names by their parts, numbers as numbers: layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
