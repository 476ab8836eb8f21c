"""Golden repositories with one thing wrong, each with what `moc verify` must say about it.

Where a record or header is changed, its checksum is made right again, so that nothing but the contradiction tells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moc.format.keys import CheckpointName, parse_manifest_key
from moc.format.object import ObjectHeader, encode_header
from moc.repository import Repository
from moc.store.local import LocalStore
from tests.golden.write import FOLDERS
from tests.support.forge import Change, forge_header, forge_object, forge_record, sealed

__all__ = ["CASES", "Broken", "Case"]

DENSE, EXPERTS = "r00000-d.safetensors", "r00000-e00.safetensors"
NEWEST = "000000000006-02040006"
LIVES = "lives"
TWO = "two-ranks"


class Broken:
    """A copy of a golden repository that is about to be damaged."""

    def __init__(self, scenario: str, root: Path, version: int = 1) -> None:
        """Copy the golden repository whose manifests have this version."""
        shutil.copytree(FOLDERS[version - 1] / scenario, root)
        self.root, self.repository = root, Repository(LocalStore(root))

    def path(self, pattern: str) -> Path:
        """Return the last path that matches."""
        return max(self.root.glob(pattern))

    def flip(self, pattern: str, offset: int) -> None:
        path = self.path(pattern)
        content = bytearray(path.read_bytes())
        content[offset] ^= 0x04
        path.write_bytes(content)

    def cut(self, pattern: str, length: int) -> None:
        path = self.path(pattern)
        path.write_bytes(path.read_bytes()[:length])

    def record(self, pattern: str, **fields: object) -> None:
        """Replace fields of the last record that matches."""

        def change(body: dict[str, Any]) -> None:
            body.update(fields)

        forge_record(self.repository.store, self._key(pattern), change)

    def body(self, pattern: str, text: bytes) -> None:
        """Replace the whole body of a record by this text; `@` in it stands for the fields of the present one."""
        path = self.path(pattern)
        present = path.read_bytes()[8:].rpartition(b',"crc32c":')[0]
        path.write_bytes(sealed(text.replace(b"@", present[1:-1])))

    def rows(self, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """Change the object rows, or blocks of objects, of the newest manifest."""

        def change_rows(body: dict[str, Any]) -> None:
            change(body["objects"])

        forge_record(self.repository.store, self._key("manifests/*/*.json"), change_rows)

    def header(self, name: str, change: Change, *, lay_out: bool = True) -> None:
        """Change the header of an object of the newest checkpoint."""
        checkpoint = self._newest()
        key = next(row.key for row in self.repository.read_manifest(checkpoint).objects if row.key.endswith(name))
        forge_header(self.repository, checkpoint, key, change, lay_out=lay_out)

    def swap(self, first: str, second: str) -> None:
        """Exchange the contents of two objects of the newest checkpoint."""
        checkpoint = self._newest()
        keys = [row.key for row in self.repository.read_manifest(checkpoint).objects]
        one, two = (next(key for key in keys if key.endswith(name)) for name in (first, second))
        headers = {}
        for row in self.repository.read_manifest(checkpoint).objects:
            content = (self.root / row.key).read_bytes()
            headers[row.key] = (content[: row.header_bytes], content[row.header_bytes :])
        forge_object(self.repository, checkpoint, one, *headers[two])
        forge_object(self.repository, checkpoint, two, *headers[one])

    def _newest(self) -> CheckpointName:
        name = parse_manifest_key(self._key("manifests/*/*.json"))
        assert name is not None
        return name

    def _key(self, pattern: str) -> str:
        return str(self.path(pattern).relative_to(self.root))


@dataclass(frozen=True, slots=True)
class Case:
    """A change, what verify says about it, on which key, and its exit code; `words` None: nothing, it is harmless."""

    scenario: str
    change: Callable[[Broken], object]
    words: str | None
    key: str
    code: int = 4
    version: int = 1  # of the manifests


def _first(header: ObjectHeader, **fields: Any) -> ObjectHeader:
    shard = replace(header.shards[0].shard, **fields)
    return replace(header, shards=(replace(header.shards[0], shard=shard), *header.shards[1:]))


def _steps(header: ObjectHeader, step: int) -> ObjectHeader:
    return replace(header, shards=tuple(replace(stored, step=step) for stored in header.shards))


def _stale(*rows: list[int]) -> dict[str, object]:
    """Return the fields of a manifest whose stale experts all come from the golden checkpoint of two ranks itself."""
    return {"sources": [[1, 3, "01010003"]], "stale_experts": list(rows)}


def _text(**changes: bytes) -> Callable[[ObjectHeader], bytes]:
    """Return a header's bytes with pieces of its text replaced, padded anew."""

    def change(header: ObjectHeader) -> bytes:
        text = encode_header(header)[8:].rstrip(b" ")
        for old, new in changes.items():
            text = text.replace(old.replace("_", "\\").encode(), new)
        padded = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)
        return len(padded).to_bytes(8, "little") + padded

    return change


def _raw_header(broken: Broken, change: Callable[[ObjectHeader], bytes]) -> None:
    """Replace the header of the newest dense object by any bytes."""
    checkpoint = broken._newest()
    row = broken.repository.read_manifest(checkpoint).objects[0]
    header = broken.repository.read_header(row)
    data = (broken.root / row.key).read_bytes()[row.header_bytes :]
    forge_object(broken.repository, checkpoint, row.key, change(header), data)


def _row(**fields: object) -> Callable[[Broken], object]:
    return lambda broken: broken.rows(lambda rows: rows[0].update(fields))


def _key_of(key: str, words: str = "not an object key") -> Case:
    return Case(LIVES, _row(key=key), words, NEWEST)


def _victim(key: object, words: str = "not an object key") -> Case:
    return Case(LIVES, lambda b: b.record("victims/*", victims=[key]), words, "victims/")


def _manifest(words: str, **fields: object) -> Case:
    return Case(LIVES, lambda b: b.record("manifests/*/*.json", **fields), words, NEWEST)


def _life(words: str | None, **fields: object) -> Case:
    return Case(LIVES, lambda b: b.record("incarnations/*", **fields), words, "incarnations/000004")


def _json(text: bytes, words: str) -> Case:
    return Case(LIVES, lambda b: b.body("manifests/*/*.json", text), words, NEWEST)


def _format(content: bytes) -> Case:
    return Case(LIVES, lambda b: (b.root / "FORMAT").write_bytes(content), "url=", "", code=6)


def _other_life(broken: Broken) -> None:
    body = json.loads(broken.path("incarnations/*").read_bytes())["body"] | {"run": "other"}
    (broken.root / "incarnations/000004-other.json").write_bytes(sealed(body))


PARENT = {"attempt": "02010002", "incarnation": 1, "step": 2}
DAMAGED: Mapping[str, Case] = {
    "missing object": Case(LIVES, lambda b: b.path(f"objects/*/{NEWEST}/*").unlink(), "does not exist", DENSE),
    "missing FORMAT": Case(LIVES, lambda b: (b.root / "FORMAT").unlink(), "no FORMAT", "", code=6),
    "missing record of a life": Case(
        LIVES, lambda b: b.path("incarnations/000004*").unlink(), "no record", "incarnations/000004"
    ),
    "bit in FORMAT": Case(LIVES, lambda b: b.flip("FORMAT", 16), "url=", "", code=6),
    "bit in a life": Case(LIVES, lambda b: b.flip("incarnations/*", 20), "mismatch", "incarnations/000004"),
    "bit in a manifest": Case(LIVES, lambda b: b.flip("manifests/*/*", 20), "mismatch", NEWEST),
    "bit in a victim list": Case(LIVES, lambda b: b.flip("victims/*", 20), "mismatch", "victims/"),
    "bit in a header": Case(LIVES, lambda b: b.flip(f"objects/*/{NEWEST}/*", 300), "header checksum", DENSE),
    "bit in a shard": Case(LIVES, lambda b: b.flip(f"objects/*/{NEWEST}/*", 4097), "master/w@0", DENSE),
    "bit in a state": Case(LIVES, lambda b: b.flip(f"objects/*/{NEWEST}/*", 8200), "state", DENSE),
    "bit in a pad": Case(LIVES, lambda b: b.flip(f"objects/*/{NEWEST}/*", 5000), "__pad__", DENSE),
    "manifest cut": Case(LIVES, lambda b: b.cut("manifests/*/*", 100), "no whole envelope", NEWEST),
    "life cut": Case(LIVES, lambda b: b.cut("incarnations/*", 100), "no whole envelope", "incarnations/000004"),
    "victim list empty": Case(LIVES, lambda b: b.cut("victims/*", 0), "no whole envelope", "victims/"),
    "object cut": Case(LIVES, lambda b: b.cut(f"objects/*/{NEWEST}/*", 8192), "wrong size", DENSE),
    "object empty": Case(LIVES, lambda b: b.cut(f"objects/*/{NEWEST}/*", 0), "wrong size", DENSE),
}

CONTRADICTIONS: Mapping[str, Case] = {
    "gap": Case(TWO, lambda b: b.header(DENSE, lambda h: replace(h, shards=h.shards[1:])), "gap", "manifests/"),
    "tensor left out": Case(
        TWO, lambda b: b.header(EXPERTS, lambda h: replace(h, shards=h.shards[1:])), "number of tensors", "manifests/"
    ),
    "overlap": Case(
        TWO, lambda b: b.header("r00001-d.safetensors", lambda h: _first(h, offset=10)), "overlap", "manifests/"
    ),
    "shape of another tensor": Case(
        TWO, lambda b: b.header(DENSE, lambda h: _first(h, shape=(7, 5))), "disagree", "manifests/"
    ),
    "expert of two steps": Case(
        TWO,
        lambda b: b.header(EXPERTS, lambda h: replace(h, shards=(replace(h.shards[0], step=2), *h.shards[1:]))),
        "two steps",
        "manifests/",
    ),
    "expert of an undeclared step": Case(
        TWO, lambda b: b.header(EXPERTS, lambda h: _steps(h, 2)), "impossible step", EXPERTS
    ),
    "expert of a later step": Case(
        TWO, lambda b: b.header(EXPERTS, lambda h: _steps(h, 9)), "impossible step", EXPERTS
    ),
    "stale expert that is not stored": Case(
        TWO, lambda b: b.record("manifests/*/*", **_stale([0, 0, 1, 0, 0])), "not stored", "manifests/"
    ),
    "stale expert of a later step": Case(
        TWO, lambda b: b.record("manifests/*/*", **_stale([0, 0, 3, 0, 0])), "field=stale_experts", "manifests/"
    ),
    "experts of an abandoned later step": Case(
        TWO,
        lambda b: b.rows(lambda rows: rows[-1].update(key=rows[-1]["key"].replace("00000003-", "00000004-"))),
        "another attempt",
        "manifests/",
    ),
    "dense shard of an earlier step": Case(
        TWO, lambda b: b.header(DENSE, lambda h: _steps(h, 2)), "impossible step", DENSE
    ),
    "experts among dense shards": Case(
        TWO, lambda b: b.header(DENSE, lambda h: replace(h, piece="e00", state=None)), "another piece", DENSE
    ),
    "objects exchanged": Case(
        TWO, lambda b: b.swap("r00000-d.safetensors", "r00001-d.safetensors"), "another rank", "r00001-d"
    ),
    "another attempt": Case(
        LIVES,
        lambda b: b.header(DENSE, lambda h: replace(h, name=replace(h.name, attempt="ffffffff"))),
        "another checkpoint",
        DENSE,
    ),
    "state left out": Case(LIVES, lambda b: b.header(DENSE, lambda h: replace(h, state=None)), "missing", DENSE),
    "object of an earlier attempt": _key_of(
        f"objects/000004-golden-1/000000000005-01040005/{DENSE}", "another attempt"
    ),
    "object of another run": _key_of(f"objects/000001-other/000000000001-01010001/{EXPERTS}", "another attempt"),
    "object named twice": Case(LIVES, lambda b: b.rows(lambda rows: rows.append(rows[0])), "named twice", NEWEST),
    "objects out of order": Case(TWO, lambda b: b.rows(lambda rows: rows.reverse()), "", "manifests/"),
    "no objects": Case(LIVES, lambda b: b.rows(lambda rows: rows.clear()), "one per rank", NEWEST),
    "manifest of another version": Case(
        LIVES, lambda b: b.record("manifests/*/*", version=3), "another format version", NEWEST, code=6
    ),
    "life of another version": Case(
        LIVES, lambda b: b.record("incarnations/*", version=2), "another format version", "incarnations/", code=6
    ),
    "manifest under another step": Case(
        LIVES,
        lambda b: b.path("manifests/*/*").rename(b.path("manifests/*") / "000000000007-02040006.json"),
        "another checkpoint",
        "000000000007",
    ),
    "parent of a later life": _manifest("earlier moment", parent=PARENT | {"incarnation": 5}),
    "checkpoint that grew from itself": _manifest(
        "earlier moment", parent={"attempt": "02040006", "incarnation": 4, "step": 6}
    ),
    "world without ranks": _manifest("one per rank", topology={"world_size": 0, "node_of_rank": [], "ep_sizes": []}),
    "topology of a text": _manifest("field=topology", topology={"world_size": 1, "node_of_rank": "0", "ep_sizes": []}),
    "life that grew from itself": _life("earlier life", parent=PARENT | {"incarnation": 4}),
    "life that grew from a later one": _life("earlier life", parent=PARENT | {"incarnation": 5}),
    "life that grew from nothing known": _life("field=step", parent={"incarnation": 1}),
    "life with another number": _life("another life", number=5),
    "life with a strange reason": _life("field=reason", reason="\x1b[2J"),
    "life without parent field": Case(
        LIVES,
        lambda b: forge_record(b.repository.store, b._key("incarnations/*"), lambda body: body.pop("parent") and None),
        "field=parent",
        "incarnations/000004",
    ),
    "two runs with one number": Case(LIVES, _other_life, "one number", "incarnations/000004-other"),
    "grown from a step never committed": _life(None, parent=PARENT | {"step": 1_000_000}),
    "token of another life": _life(None, token="000000a1"),
    "FORMAT of another version": _format(b"moc repository 2\n"),
    "FORMAT with a feature": _format(b"moc repository 1\nrequires wings\n"),
    "FORMAT of foreign digits": _format("moc repository １\n".encode()),
    "FORMAT without its end": _format(b"moc repository 1"),
    "FORMAT too long": _format(b"moc repository 1\n" + b"\n" * 5000),
    "FORMAT empty": _format(b""),
}

SIZES: Mapping[str, Case] = {
    "size of 2^63": Case(LIVES, _row(size=2**63), "field=size", NEWEST),
    "size of 2^63-1": Case(LIVES, _row(size=2**63 - 1), "wrong size", DENSE),
    "size of 10^400": Case(LIVES, _row(size=10**400), "64 bits", NEWEST),
    "negative size": Case(LIVES, _row(size=-1), "field=size", NEWEST),
    "size of a fraction": Case(LIVES, _row(size=0.5), "float", NEWEST),
    "header longer than the limit": Case(LIVES, _row(header=2**40, size=2**41), "field=header", NEWEST),
    "header longer than the object": Case(LIVES, _row(header=2**20), "field=size", NEWEST),
    "header of odd length": Case(LIVES, _row(header=4100), "field=header", NEWEST),
    "step beyond any key": _manifest("field=step", step=10**12),
    "a trillion ranks": _manifest("one per rank", topology={"world_size": 10**12, "node_of_rank": [], "ep_sizes": []}),
    "many objects": Case(
        LIVES, lambda b: b.rows(lambda rows: rows.extend([{"key": "x"}] * 20_000)), "field=header", NEWEST
    ),
    "length prefix of 2^63": Case(
        LIVES, lambda b: _raw_header(b, lambda h: b"\xff" * 8 + encode_header(h)[8:]), "length is impossible", DENSE
    ),
    "shape whose product overflows": Case(
        LIVES,
        lambda b: b.header(DENSE, lambda h: _first(h, shape=(2**62, 2**62, 4)), lay_out=False),
        "gap",
        "manifests/",
    ),
    "shape of a thousand dimensions": Case(
        LIVES, lambda b: _raw_header(b, _text(**{"[2,2],0,4": b"[" + b"1," * 999 + b"4],0,4"})), "dimensions", DENSE
    ),
    "data beyond the end": Case(
        LIVES,
        lambda b: _raw_header(b, _text(**{",0,4,": b",0,4000000,"})),
        "malformed",
        DENSE,
    ),
    "tensors that share their place": Case(
        TWO,
        lambda b: b.header(
            EXPERTS, lambda h: replace(h, shards=tuple(replace(s, position=0) for s in h.shards)), lay_out=False
        ),
        "misplaced",
        EXPERTS,
    ),
}

LONG = "objects/000001-golden-1/000000000001-01010001/r00000-d.safetensors"
OUTSIDE = ("../outside", "/etc/passwd", "FORMAT", "incarnations/000001-golden-1.json", f"manifests/x/{NEWEST}.json")
TWISTED = (
    LONG + "\0",
    LONG + "\n",
    LONG.replace("/r", "/../r"),
    LONG.replace("/", "\\"),
    LONG.replace("/", "∕"),
    LONG.replace("000001", "00000１"),
    LONG.replace("r00000", "r000٠0"),
    "x" * 100_000,
)
PATHS: Mapping[str, Case] = {
    **{f"object at {key!r:.80}": _key_of(key) for key in OUTSIDE + TWISTED},
    **{f"victim {key!r:.80}": _victim(key) for key in OUTSIDE + TWISTED},
    "victim of another run": _victim(LONG.replace("golden-1", "other"), "another run"),
    "victim that is no text": _victim(5, "field=victims"),
    "victims that are none": Case(LIVES, lambda b: b.record("victims/*", victims={}), "field=victims", "victims/"),
}

JSON_TRICKS: Mapping[str, Case] = {
    "nested deep": _json(b'{@,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not readable"),
    "number of 1e400": _json(b'{@,"x":1e400}', "not readable"),
    "number of 100,000 digits": _json(b'{@,"x":' + b"9" * 100_000 + b"}", "not readable"),
    "a field twice": _json(b'{@,"version":1}', "not canonical"),
    "not a number": _json(b'{@,"x":NaN}', "not readable"),
    "a text of 2 MB": _json(b'{@,"a":"' + b"x" * 2_000_000 + b'"}', "not canonical"),
    "a lone surrogate": _json(b'{@,"x":"\xed\xa0\x80"}', "not readable"),
    "an escaped letter": _json(b'{@,"x":"\\u0041"}', "not canonical"),
    "no UTF-8": _json(b'{@,"x":"\xff"}', "not readable"),
    "UTF-16": _json('{"a":1}'.encode("utf-16"), "not canonical"),
    "a list": _json(b"[]", "not canonical"),
    "nothing": _json(b"", "not readable"),
}

CASES: Mapping[str, Case] = {**DAMAGED, **CONTRADICTIONS, **SIZES, **PATHS, **JSON_TRICKS}
