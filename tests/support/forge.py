"""Forged checkpoints: contents that contradict each other behind checksums that are all right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moc._native import crc32c
from moc.format.canonical import open_record
from moc.format.keys import CheckpointName, manifest_key, parse_object_key
from moc.format.manifest import ObjectRow
from moc.format.object import ObjectHeader, align, encode_header
from moc.repository import Repository
from moc.store.port import Store

__all__ = ["Change", "forge_header", "forge_object", "forge_record", "laid_out", "object_keys", "put_row", "sealed"]

Change = Callable[[ObjectHeader], ObjectHeader]


def sealed(body: object) -> bytes:
    """Return a record of this body, also of one that no record may hold; bytes are its text as it is."""
    if not isinstance(body, bytes):
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        body = text.encode("utf-8", "surrogatepass")
    return b'{"body":%s,"crc32c":%d}\n' % (body, crc32c(body))


def forge_record(store: Store, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the body of a record and seal it again."""
    body = dict(open_record(store.read(key, limit_bytes=1 << 26), name=key).body)
    change(body)
    store.put(key, [memoryview(sealed(body))])


def forge_header(
    repository: Repository, name: CheckpointName, key: str, change: Change, *, lay_out: bool = True
) -> None:
    """Change the header of an object; its data are laid out anew for the shards that are left, unless told not to."""
    row = next(row for row in repository.read_manifest(name).objects if row.key == key)
    header = repository.read_header(row)
    data = bytearray(header.data_bytes)
    repository.read_range(row, 0, memoryview(data))
    changed, content = laid_out(change(header), bytes(data)) if lay_out else (change(header), bytes(data))
    forge_object(repository, name, key, encode_header(changed), content)


def forge_object(repository: Repository, name: CheckpointName, key: str, header: bytes, data: bytes) -> None:
    """Replace an object by these bytes, and its row in the manifest."""
    row = ObjectRow(key=key, size_bytes=len(header) + len(data), header_bytes=len(header), header_crc32c=crc32c(header))
    repository.put_object(key, [memoryview(header), memoryview(data)])

    def replace_row(body: dict[str, Any]) -> None:
        put_row(body, key, size=row.size_bytes, header=row.header_bytes, header_crc32c=row.header_crc32c)

    forge_record(repository.store, manifest_key(name), replace_row)


def put_row(body: dict[str, Any], key: str, **facts: object) -> None:
    """Change what a manifest says of one object: its `size`, `header` and `header_crc32c`."""
    if body["version"] == 1:
        next(row for row in body["objects"] if row["key"] == key).update(facts)
        return
    owner, rank, piece = parse_object_key(key)
    wanted = (owner.incarnation, owner.step, owner.attempt, piece)
    names = ("incarnation", "step", "attempt", "piece")
    block = next(block for block in body["objects"] if tuple(block[name] for name in names) == wanted)
    place = [r for first, count in block["ranks"] for r in range(first, first + count)].index(rank)
    for name, fact in facts.items():
        block[name][place] = fact


def object_keys(body: dict[str, Any]) -> list[str]:
    """Return the keys of the objects that a manifest of the present version names, told from its text alone."""
    return [
        f"objects/{block['incarnation']:06d}-{body['run']}/{block['step']:012d}-{block['attempt']}"
        f"/r{rank:05d}-{block['piece']}.safetensors"
        for block in body["objects"]
        for first, count in block["ranks"]
        for rank in range(first, first + count)
    ]


def laid_out(header: ObjectHeader, data: bytes) -> tuple[ObjectHeader, bytes]:
    """Return the header with positions and checksums as a writer makes them, and the data that go with it.

    A shard's bytes are those at its old position.
    """
    content, shards, state = bytearray(), [], None
    for stored in header.shards:
        part = data[stored.position : stored.position + stored.shard.size_bytes]
        shards.append(replace(stored, position=len(content), crc32c=crc32c(part)))
        content += part.ljust(align(len(part)), b"\0")
    if header.state is not None:
        blob = data[header.state[0] : header.state[0] + header.state[1]]
        state = (len(content), len(blob), crc32c(blob))
        content += blob.ljust(align(len(blob)), b"\0")
    return replace(header, shards=tuple(shards), state=state, data_bytes=len(content)), bytes(content)
