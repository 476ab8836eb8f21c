"""Writes one rank's objects of a checkpoint with the format's own codecs."""

from __future__ import annotations

from collections.abc import Sequence

from moc._native import crc32c
from moc.format.keys import CheckpointName, object_key
from moc.format.manifest import ObjectRow
from moc.format.object import ObjectHeader, StoredShard, align, encode_header
from moc.format.tagged import encode_state
from moc.repository import Repository
from moc.state import Shard

__all__ = ["write_rank"]


def write_rank(
    repository: Repository,
    name: CheckpointName,
    rank: int,
    contents: Sequence[tuple[Shard, bytes, int]],
    tree: object,
) -> list[ObjectRow]:
    """Write shards, given with their bytes and crc32c, and the tree; return the manifest rows."""
    rows = []
    for piece in ("d", "e00"):
        mine = [row for row in contents if (row[0].expert is None) == (piece == "d")]
        if piece == "e00" and not mine:
            continue
        data, stored = bytearray(), []
        for shard, content, crc in mine:
            stored.append(StoredShard(shard=shard, step=name.step, position=len(data), crc32c=crc))
            data += content.ljust(align(len(content)), b"\0")
        state = None
        if piece == "d":
            blob = encode_state(tree).to_bytes()
            state = (len(data), len(blob), crc32c(blob))
            data += blob.ljust(align(len(blob)), b"\0")
        header = ObjectHeader(
            name=name, rank=rank, piece=piece, shards=tuple(stored), state=state, data_bytes=len(data)
        )
        encoded = encode_header(header)
        key = object_key(name, rank, piece)
        repository.put_object(key, [memoryview(encoded), memoryview(data)])
        rows.append(
            ObjectRow(
                key=key,
                size_bytes=len(encoded) + len(data),
                header_bytes=len(encoded),
                header_crc32c=crc32c(encoded),
            )
        )
    return rows
