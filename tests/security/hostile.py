"""Repositories by somebody who means harm: every checksum is right, the values are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moc._native import crc32c
from moc.format.columns import encode_blocks
from moc.format.keys import CheckpointName, incarnation_key, manifest_key, object_key
from moc.format.manifest import ObjectRow
from moc.format.object import ObjectHeader, align, encode_header
from moc.store.local import LocalStore
from tests.support.forge import sealed
from tests.support.repository import Model, RepositoryBuilder

__all__ = ["CASES", "OLD_ROW", "Hostile"]

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://x\x1b\\[link=file:///etc/passwd]\r\n\u202e\x9b31m"
TIB = 1 << 40
OLD_ROW = {"size": 8192, "header": 4096, "header_crc32c": 0}  # of a manifest of version 1, but for the key


class Hostile:
    """One checkpoint, step 10 of life 1, that a case spoils before or after it is written."""

    def __init__(self, root: Path, **builder: Any) -> None:
        model = builder.pop("model", Model(world_size=1, moe_layers=0))
        self.root, self.builder = root, RepositoryBuilder(LocalStore(root), model=model, **builder)
        self.builder.begin(1)
        self.manifest = self.builder.commit(1, 10)
        self.name: CheckpointName = self.manifest.name

    @property
    def manifest_path(self) -> Path:
        return self.root / manifest_key(self.name)

    def body(self) -> dict[str, Any]:
        return dict(json.loads(self.manifest_path.read_bytes())["body"])

    def rewrite(self, **fields: object) -> None:
        """Replace fields of the manifest and seal it again."""
        self.manifest_path.write_bytes(sealed(self.body() | fields))

    def put_dense(self, encoded: bytes, data: bytes, *, size_bytes: int | None = None, **row: int) -> None:
        """Replace rank 0's dense object and its manifest row."""
        key = object_key(self.name, 0, "d")
        path = self.root / key
        path.write_bytes(encoded + data)
        if size_bytes is not None:
            os.truncate(path, size_bytes)  # sparse: it claims what it does not take
        made = ObjectRow(
            key=key,
            size_bytes=path.stat().st_size,
            header_bytes=len(encoded),
            header_crc32c=crc32c(encoded),
        )
        made = made._replace(**row)
        self.rewrite(objects=encode_blocks([made]), tensors=0)

    def put_state(self, blob: bytes, *, length: int | None = None, size_bytes: int | None = None) -> None:
        """Make the checkpoint one object with this state blob, right in every checksum."""
        length = len(blob) if length is None else length
        header = ObjectHeader(
            name=self.name,
            rank=0,
            piece="d",
            shards=(),
            state=(0, length, crc32c(blob)),
            data_bytes=align(length) if size_bytes is None else size_bytes,
        )
        encoded = encode_header(header)
        total = None if size_bytes is None else len(encoded) + size_bytes
        self.put_dense(encoded, blob.ljust(align(len(blob)), b"\0"), size_bytes=total)

    def put_header_text(self, text: bytes) -> None:
        padded = text.ljust(align(8 + len(text)) - 8)
        self.put_dense(len(padded).to_bytes(8, "little") + padded, b"")


def _state(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _shape(dimensions: int) -> bytes:
    shape = "[" + ",".join(["9" * 4000] * dimensions) + "]"
    row = f'["w","master","F32",{shape},0,0,null,10,0,0]'
    body = (
        f'{{"attempt":"00000000","data_bytes":0,"incarnation":1,"piece":"d","rank":0,"run":"run-7",'
        f'"shards":[{row}],"state":null,"step":10}}'
    )
    return json.dumps({"__metadata__": {"moc": body}}, separators=(",", ":")).encode()


def _many_manifest_values(repository: Hostile, megabytes: int) -> None:
    filler = b"[" + b"[]," * (megabytes * 350_000) + b"[]]"
    repository.manifest_path.write_bytes(sealed(b'{"fingerprint":' + filler + b"}"))


def _twice(repository: Hostile, count: int) -> None:
    rows = [OLD_ROW | {"key": object_key(repository.name, rank, "d")} for rank in range(count // 2)]
    repository.rewrite(version=1, objects=rows + rows)


def _block(repository: Hostile, **fields: object) -> None:
    """Replace fields of the block of dense objects."""
    repository.rewrite(objects=[repository.body()["objects"][0] | fields])


def _stale_experts(repository: Hostile, count: int) -> None:
    """Rows that may all be right, of a checkpoint that itself has written older versions."""
    name = repository.name
    rows = [[0, index, 1, 0, 2**62] for index in range(count)]
    repository.rewrite(sources=[[name.incarnation, name.step, name.attempt]], stale_experts=rows)


def _lives(repository: Hostile) -> None:
    """A lineage that leads in a circle, and to lives that never were."""
    for number, parent in ((2, 3), (3, 2), (4, 4), (5, 10**17)):
        body = {
            "version": 1,
            "run": "run-7",
            "number": number,
            "token": ESCAPES,
            "parent": {"incarnation": parent, "step": 10, "attempt": ESCAPES},
            "reason": ESCAPES,
            "fingerprint": {},
        }
        path = repository.root / incarnation_key("run-7", number)
        path.write_bytes(sealed(body))


CASES: Mapping[str, Callable[[Hostile], None]] = {
    "manifest of 20 million values": lambda r: _many_manifest_values(r, 60),
    "manifest larger than any": lambda r: os.truncate(r.manifest_path, TIB),
    "manifest nested deep": lambda r: r.manifest_path.write_bytes(b"[" * 1_000_000),
    "manifest of a huge number": lambda r: r.manifest_path.write_bytes(sealed(b'{"step":' + b"9" * 5_000_000 + b"}")),
    "a quarter of a million stale experts": lambda r: _stale_experts(r, 250_000),
    "a million stale experts": lambda r: _stale_experts(r, 1_000_000),
    "stale experts beyond number": lambda r: r.rewrite(
        sources=[[1, 10, "00000000"]] * 9, stale_experts=[[2**63 - 1, 2**63 - 1, 1, 2**63 - 1, 2**63 - 1]]
    ),
    "world of a trillion ranks": lambda r: r.rewrite(topology={"world_size": 10**12}),
    "objects named twice": lambda r: _twice(r, 8_000),
    "sizes beyond any disk": lambda r: _block(r, size=[10**400]),
    "a block of a trillion ranks": lambda r: _block(r, ranks=[[0, 10**12]]),
    "blocks of a million runs": lambda r: _block(r, ranks=[[2 * rank, 1] for rank in range(1_000_000)]),
    "a block of a million objects": lambda r: _block(
        r, ranks=[[0, 1_000_000]], **{name: [4096] * 1_000_000 for name in ("size", "header", "header_crc32c")}
    ),
    "tensors beyond number": lambda r: r.rewrite(tensors=2**63 - 1),
    "header of a tebibyte": lambda r: r.put_dense(b"\xff" * 4096, b"", size_bytes=TIB, header_bytes=TIB),
    "header of 20 million values": lambda r: r.put_header_text(b"[" + b"[]," * 20_000_000 + b"[]]"),
    "header nested deep": lambda r: r.put_header_text(b'{"a":' * 1_000_000),
    "shape whose product takes hours": lambda r: r.put_header_text(_shape(2_000)),
    "state that claims a gibibyte": lambda r: r.put_state(b"\0" * 64, length=1 << 30, size_bytes=None),
    "state text longer than its blob": lambda r: r.put_state((1 << 30).to_bytes(8, "little") + b"{}"),
    "state of 20 million values": lambda r: r.put_state(_state(b"[" + b"[]," * 20_000_000 + b"[]]")),
    "state nested deep": lambda r: r.put_state(_state(b'{"t":[' * 1_000_000)),
    "state of a tebibyte": lambda r: r.put_state(b"", length=TIB, size_bytes=TIB),
    "lives in a circle": _lives,
    "plt of words": lambda r: r.rewrite(plt={"0": ["x", []], "1": [10**18, 0], "2": None}),
    "escapes in every text": lambda r: r.rewrite(
        fingerprint={ESCAPES: ESCAPES, "list": [ESCAPES]},
        versions={"torch": ESCAPES},
        topology={"world_size": ESCAPES},
        parent={"incarnation": 1, "step": 1, "attempt": ESCAPES},
        catalog_digest=ESCAPES,
    ),
}
"""What is done to a sound checkpoint, by what it is."""
