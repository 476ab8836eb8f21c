"""A reader of the format that was written from docs/format.md alone: JSON, safetensors, and nothing of moc.

It reads everything, checks every checksum that the document promises, and raises ValueError for what is wrong.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

__all__ = ["Array", "Contents", "crc32c", "lineage", "read_checkpoint", "read_record", "read_repository"]

ALIGNMENT = 4096
WIDTHS = {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
WIDTHS |= {f"{kind}{bits}": bits // 8 for kind in "IU" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True, slots=True)
class Array:
    """An array in a state."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    data: bytes


@dataclass(slots=True)
class Contents:
    """One checkpoint: whole tensors by "part/tensor" as (dtype, shape, bytes), and each rank's state."""

    is_finite: bool
    tensors: dict[str, tuple[str, list[int], bytes]]
    states: dict[int, object]


def read_repository(root: Path) -> dict[str, Contents]:
    """Return every checkpoint by name."""
    if (root / "FORMAT").read_bytes() != b"moc repository 1\n":
        raise ValueError("another format")
    manifests = sorted(root.glob("manifests/*/*.json"))
    return {f"{path.parent.name}/{path.stem}": read_checkpoint(root, path) for path in manifests}


def lineage(root: Path) -> list[str]:
    """Return the names of the checkpoints that led to the present state, in the order in which recovery tries them."""
    records = {int(path.name[:6]): read_record(path) for path in root.glob("incarnations/*.json")}
    found: list[str] = []
    number: int | None = max(records)
    fork: dict[str, Any] | None = None
    while number is not None:
        names = []
        for path in root.glob(f"manifests/{number:06d}-{records[number]['run']}/*.json"):
            step, attempt = int(path.stem[:12]), path.stem[13:]
            if fork is None or step < fork["step"] or (step == fork["step"] and fork["attempt"] in (None, attempt)):
                names.append(f"{path.parent.name}/{path.stem}")
        found += sorted(names, reverse=True)
        fork = records[number]["parent"]
        number = None if fork is None else fork["incarnation"]
    return found


def read_record(path: Path) -> dict[str, Any]:
    """Return the body of a record."""
    content = path.read_bytes()
    envelope = json.loads(content)
    body = json.dumps(envelope["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if content != b'{"body":%s,"crc32c":%d}\n' % (body, crc32c(body)):
        raise ValueError(f"record is corrupt: {path}")
    assert isinstance(envelope["body"], dict)
    return envelope["body"]


def read_checkpoint(root: Path, manifest: Path) -> Contents:
    """Return what one manifest names."""
    body = read_record(manifest)
    pieces: dict[str, list[tuple[int, bytes]]] = {}
    facts: dict[str, tuple[str, list[int]]] = {}
    states: dict[int, object] = {}
    own = (body["incarnation"], body["step"], body["attempt"])
    sources = {(layer, index): body["sources"][number] for layer, index, _, number, _ in body["stale_experts"]}
    steps = {(layer, index): step for layer, index, step, _, _ in body["stale_experts"]}
    for row in _rows(body):
        metadata, tensors = _read_object(root / row["key"], row)
        owner = (metadata["incarnation"], metadata["step"], metadata["attempt"])
        if "__state__" in tensors:
            states[metadata["rank"]] = read_state(tensors["__state__"])
        for tensor, part, dtype, shape, offset, length, expert, step, _position, checksum in metadata["shards"]:
            data = tensors[f"{part}/{tensor}@{offset}"]
            if crc32c(data) != checksum or len(data) != length * WIDTHS[dtype]:
                raise ValueError(f"shard is corrupt: {row['key']} {part}/{tensor}@{offset}")
            place = None if expert is None else tuple(expert)
            if tuple(sources.get(place, own)) != owner:
                continue  # superseded
            if step != steps.get(place, body["step"]):
                raise ValueError(f"shard has another step: {row['key']} {part}/{tensor}@{offset}")
            facts[f"{part}/{tensor}"] = (dtype, shape)
            pieces.setdefault(f"{part}/{tensor}", []).append((offset, data))
    whole = {}
    for name, (dtype, shape) in facts.items():
        reached = 0
        for offset, data in sorted(pieces[name]):
            if offset != reached:
                raise ValueError(f"gap or overlap in {name}")
            reached += len(data) // WIDTHS[dtype]
        whole[name] = (dtype, shape, b"".join(data for _, data in sorted(pieces[name])))
    if len(whole) != body["tensors"]:
        raise ValueError("another number of tensors")
    states = {rank: _whole(tree, states) for rank, tree in states.items()}
    return Contents(is_finite=body["is_finite"], tensors=whole, states=states)


def _whole(tree: object, states: dict[int, object]) -> object:
    """Return a rank's tree, also where its blob says only how it differs from another rank's."""
    if not isinstance(tree, dict) or list(tree) != ["relative_to", "size", "crc32c", "changes"]:
        return tree
    whole = states[tree["relative_to"]]
    for path, value in tree["changes"]:
        whole = _changed(whole, path, value)
    return whole


def _changed(tree: Any, path: list[str], value: object) -> object:
    if not path:
        return value
    return {key: _changed(item, path[1:], value) if key == path[0] else item for key, item in tree.items()}


def _rows(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per object."""
    if body["version"] == 1:
        return list(body["objects"])
    rows = []
    for block in body["objects"]:
        folder = f"objects/{block['incarnation']:06d}-{body['run']}/{block['step']:012d}-{block['attempt']}"
        ranks = [rank for first, count in block["ranks"] for rank in range(first, first + count)]
        columns = zip(ranks, block["size"], block["header"], block["header_crc32c"], strict=True)
        rows += [
            {"key": f"{folder}/r{rank:05d}-{block['piece']}.safetensors", "size": s, "header": h, "header_crc32c": c}
            for rank, s, h, c in columns
        ]
    return rows


def _read_object(path: Path, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[: 8 + length]
    if (len(content), len(header), crc32c(header)) != (row["size"], row["header"], row["header_crc32c"]):
        raise ValueError(f"header is corrupt: {path}")
    metadata = json.loads(json.loads(header[8:])["__metadata__"]["moc"])
    tensors = {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(content)}
    for name, data in tensors.items():
        if name.startswith("__pad__/") and any(data):
            raise ValueError(f"padding is not zero: {path} {name}")
    if metadata["state"] is not None and crc32c(tensors["__state__"]) != metadata["state"][2]:
        raise ValueError(f"state is corrupt: {path}")
    return metadata, tensors


def read_state(blob: bytes) -> object:
    """Return the tree of a state blob."""
    (length,) = struct.unpack("<Q", blob[:8])
    base = -(-(8 + length) // 64) * 64

    def value(node: Any) -> object:
        if isinstance(node, list):
            return [value(item) for item in node]
        if not isinstance(node, dict):
            return node
        ((tag, content),) = node.items()
        match tag:
            case "f":
                return float.fromhex(content)
            case "b":
                return base64.b64decode(content)
            case "t":
                return tuple(value(item) for item in content)
            case "d":
                return {value(key): value(item) for key, item in content}
            case "a":
                dtype, shape, kind, offset, size = content
                return Array(dtype, tuple(shape), kind, blob[base + offset : base + offset + size])
        raise ValueError(f"unknown tag: {tag}")

    return value(json.loads(blob[8 : 8 + length]))


def _table() -> tuple[int, ...]:
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        rows.append(byte)
    return tuple(rows)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C: reflected polynomial 0x82F63B78, all ones before and after."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
