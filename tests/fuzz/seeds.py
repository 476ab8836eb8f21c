"""Valid inputs of every parser, taken from the golden repositories, and how to put right checksums on changed ones."""

from __future__ import annotations

import json
import struct
from array import array
from dataclasses import asdict
from functools import cache

from moc._native import crc32c
from moc.config import Config
from moc.format.object import header_length
from moc.plan.layout import RECORD_FIXED_BYTES, arrange_arena
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import SealRecord, encode_seal
from moc.state import Expert, RankCatalog, Shard
from tests.golden.write import FOLDERS
from tests.support.forge import sealed

__all__ = [
    "DESCRIPTOR_PAGES",
    "arena_bytes",
    "descriptor",
    "golden_bodies",
    "golden_files",
    "headers",
    "relative_states",
    "reseal_arena",
    "reseal_seal",
    "seals",
    "stale",
    "states",
    "with_metadata",
    "with_stale",
]

CATALOG = RankCatalog(
    rank=0,
    shards=(
        Shard(tensor="w", part="master", dtype="F32", shape=(3,), offset=0, length=3),
        Shard(tensor="e", part="master", dtype="F32", shape=(2,), offset=0, length=2, expert=Expert(layer=0, index=0)),
    ),
    state_capacity_bytes=100,
)
DESCRIPTOR_PAGES = 4096 * 36  # prologue and both descriptor areas of that arena


@cache
def golden_files(pattern: str) -> tuple[bytes, ...]:
    """Return the contents of golden files, by path."""
    return tuple(path.read_bytes() for path in sorted(p for f in FOLDERS for p in f.glob(f"*/{pattern}")))


@cache
def golden_bodies(pattern: str) -> tuple[bytes, ...]:
    """Return the JSON text of the bodies of golden records."""
    return tuple(content[8 : content.rindex(b',"crc32c":')] for content in golden_files(pattern))


@cache
def _partial() -> dict[str, object]:
    """Return the body of the golden manifest of the present version that has experts of the most attempts."""
    bodies = [json.loads(body) for body in golden_bodies("manifests/*/*.json")]
    body = max(bodies, key=lambda body: (body["version"], len(body.get("sources", ()))))
    assert isinstance(body, dict)
    return body


def stale() -> bytes:
    """Return the JSON text of sources and rows of stale experts."""
    return json.dumps([_partial()["sources"], _partial()["stale_experts"]], separators=(",", ":")).encode()


def with_stale(text: bytes) -> bytes:
    """Return a manifest whose sources and rows are those of this JSON text; what is none is the whole manifest."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return text
    sources, experts = rows if isinstance(rows, list) and len(rows) == 2 else (rows, rows)
    return sealed(_partial() | {"sources": sources, "stale_experts": experts})


@cache
def headers() -> tuple[bytes, ...]:
    """Return the headers of golden objects, without the blanks at their ends."""
    files = golden_files("objects/*/*/*.safetensors")
    return tuple(content[: header_length(content[:8], key="golden")] for content in files)


@cache
def states() -> tuple[bytes, ...]:
    """Return golden state blobs."""
    found = []
    for content, header in zip(golden_files("objects/*/*/*.safetensors"), headers(), strict=True):
        state = json.loads(json.loads(header[8:])["__metadata__"]["moc"])["state"]
        if state is not None:
            begin = len(header) + state[0]
            found.append(content[begin : begin + state[1]])
    return tuple(found)


@cache
def relative_states() -> tuple[bytes, bytes]:
    """Return a golden state blob that is relative to another rank's, and that one."""
    whole = FOLDERS[-1] / "alike"
    found = []
    for path in sorted(whole.glob("objects/*/*/*-d.safetensors")):
        content = path.read_bytes()
        begin = header_length(content[:8], key="golden")
        position, length, _ = json.loads(json.loads(content[8:begin])["__metadata__"]["moc"])["state"]
        found.append(content[begin + position : begin + position + length])
    base, relative = found
    return relative, base


@cache
def seals() -> tuple[bytes, ...]:
    """Return seal records."""
    record = SealRecord(
        run="run-7",
        incarnation=3,
        step=9,
        rank=0,
        flags=1,
        attempt="00abcdef",
        digest="0123456789abcdef",
        state_bytes=64,
        state_crc32c=5,
        slots=array("I", [0, 1]),
        steps=array("Q", [9, 9]),
        crcs=array("I", [7, 8]),
    )
    return (encode_seal(record).ljust(4096, b"\0"),)


@cache
def arena_bytes() -> bytes:
    """Return a whole arena of one rank."""
    layout = arrange_arena((CATALOG,), versions=2, descriptor_bytes=descriptor_room(descriptor()))
    arena = Arena.create(descriptor(), layout, name="seed")
    content = bytes(arena.view(0, arena.size_bytes))
    arena.close()
    return content


def descriptor() -> dict[str, object]:
    """Return the descriptor of that arena, with all that an agent reads in it."""
    lineage = [content.decode() for content in golden_files("incarnations/*.json")[:1]]
    return {
        "run": "golden-1",
        "versions": 2,
        "catalogs": [CATALOG.to_json()],
        "digest": "0123456789abcdef",
        "tensors": 2,
        "topology": {"world_size": 1, "node_of_rank": [0], "ep_sizes": []},
        "fingerprint": {},
        "software": {"moc": "0.1.0"},
        "storage": "/nonexistent/moc-fuzz",
        "keep_last": 2,
        "keep_every": 0,
        "timeout_s": 60.0,
        "memory_budget_bytes": 1 << 24,
        "config": asdict(Config()),
        "lineage": lineage,
    }


def with_metadata(header: bytes, metadata: bytes) -> bytes:
    """Return a header with other metadata, padded as a header is."""
    tensors = json.loads(header[8:])
    tensors["__metadata__"]["moc"] = metadata.decode("utf-8", "replace")
    text = json.dumps(tensors, separators=(",", ":")).encode()
    padded = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)
    return struct.pack("<Q", len(padded)) + padded


def reseal_seal(content: bytes) -> bytes:
    """Return a seal record with the checksum that its own lengths ask for, where there are so many bytes."""
    changed = bytearray(content)
    if len(changed) < RECORD_FIXED_BYTES:
        return content
    units, shards = struct.unpack_from("<II", changed, struct.calcsize("<8x4sI32sQQII8s16sQI"))
    body = changed[RECORD_FIXED_BYTES : RECORD_FIXED_BYTES + 12 * units + 4 * shards]
    fixed = changed[8 : RECORD_FIXED_BYTES - 4]
    struct.pack_into("<I", changed, RECORD_FIXED_BYTES - 4, crc32c(body, crc32c(fixed)))
    return bytes(changed)


def reseal_arena(text: bytes) -> bytes:
    """Return an arena with this text as its valid descriptor."""
    changed = bytearray(arena_bytes())
    (room,) = struct.unpack_from("<Q", changed, 16)
    (selector,) = struct.unpack_from("<Q", changed, 64)
    begin = 4096 + selector * room
    text = text[: room - 12]
    changed[begin : begin + 12 + len(text)] = struct.pack("<QI", len(text), crc32c(text)) + text
    return bytes(changed)
