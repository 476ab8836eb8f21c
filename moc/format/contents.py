"""What a manifest and the headers of its objects must agree on, and which shards of an object a checkpoint consists of.

A shard is *live* in a checkpoint if its expert comes from the attempt that the object belongs to; dense shards always
are. Others are *superseded*: an object of an earlier attempt also holds experts that a later commit has written anew.
Every reader takes the live shards of an object, and only these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moc.errors import ShardCorruptError
from moc.format.keys import CheckpointName, parse_object_key
from moc.format.manifest import Manifest, ObjectRow
from moc.format.object import ObjectHeader, StoredShard
from moc.state import Expert

__all__ = ["contradictions", "expert_steps", "live_shards"]


def live_shards(manifest: Manifest, row: ObjectRow, header: ObjectHeader) -> tuple[StoredShard, ...]:
    """Return the shards of one object that the checkpoint consists of, in the order of the header."""
    owner, _, _ = parse_object_key(row.key)
    return tuple(stored for stored in header.shards if _version(manifest, stored.shard.expert)[0] == owner)


def expert_steps(manifest: Manifest, headers: Iterable[tuple[ObjectRow, ObjectHeader]]) -> dict[int, tuple[int, ...]]:
    """Return the step of each expert's bytes, by MoE layer and in the order of the experts."""
    steps = {
        stored.shard.expert: stored.step
        for row, header in headers
        for stored in live_shards(manifest, row, header)
        if stored.shard.expert is not None
    }
    layers: dict[int, list[int]] = {}
    for expert, step in sorted(steps.items()):
        layers.setdefault(expert.layer, []).append(step)
    return {layer: tuple(row) for layer, row in layers.items()}


def contradictions(manifest: Manifest, row: ObjectRow, header: ObjectHeader) -> Iterator[ShardCorruptError]:
    """Yield what one header, which agrees with its key, says that its manifest does not allow."""
    owner, _, piece = parse_object_key(row.key)
    is_dense = piece == "d"
    if is_dense != (header.state is not None):
        yield ShardCorruptError(
            f"state blob is {'missing' if is_dense else 'not expected'}: key={row.key} piece={piece}"
        )
    for stored in header.shards:
        expert, where = stored.shard.expert, f"key={row.key} shard={stored.shard.name}"
        if is_dense != (expert is None):
            yield ShardCorruptError(f"shard is in an object of the other kind: {where} expert={expert}")
        source, declared = _version(manifest, expert)
        if stored.step > owner.step or (source == owner and stored.step != declared):
            yield ShardCorruptError(f"shard has an impossible step: {where} expected={declared} actual={stored.step}")


def _version(manifest: Manifest, expert: Expert | None) -> tuple[CheckpointName, int]:
    return (manifest.name, manifest.name.step) if expert is None else manifest.version(expert)
