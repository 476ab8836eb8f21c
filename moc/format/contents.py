"""What a manifest and the headers of its objects must agree on: the checks of one header, which every reader makes."""

from __future__ import annotations

from collections.abc import Iterator

from moc.errors import ShardCorruptError
from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest, ObjectRow
from moc.format.object import ObjectHeader

__all__ = ["contradictions"]


def contradictions(manifest: Manifest, row: ObjectRow, header: ObjectHeader) -> Iterator[ShardCorruptError]:
    """Yield what one header, which agrees with its key, says that its manifest does not allow."""
    name, _, piece = parse_object_key(row.key)
    is_dense = piece == "d"
    if is_dense != (header.state is not None):
        yield ShardCorruptError(
            f"state blob is {'missing' if is_dense else 'not expected'}: key={row.key} piece={piece}"
        )
    stale = {(layer, index): step for layer, index, step in manifest.stale_experts}
    for stored in header.shards:
        expert, where = stored.shard.expert, f"key={row.key} shard={stored.shard.name}"
        if is_dense != (expert is None):
            yield ShardCorruptError(f"shard is in an object of the other kind: {where} expert={expert}")
        declared = manifest.name.step if expert is None else stale.get((expert.layer, expert.index), manifest.name.step)
        if stored.step != declared or stored.step > name.step:
            yield ShardCorruptError(f"shard has an impossible step: {where} expected={declared} actual={stored.step}")
