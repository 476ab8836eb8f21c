"""Golden checkpoints, partial or with relative states, with one thing wrong, each with what `moc verify` must say.

The newest one, of step 40, has experts of the steps 10, 20, 28 and 40, from four attempts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moc._native import crc32c
from moc.format.object import ObjectHeader, align, encode_header
from moc.format.tagged import decode_state, encode_state
from tests.golden.broken import Broken, Case
from tests.support.forge import forge_object, forge_record

__all__ = ["PARTIAL_CASES"]

PARTIAL = "partial"
NEWEST = "manifests/000002-golden-1/000000000040-"
OLD = "000000000010-9d5d5c10/r00001-e00.safetensors"
FIRST, SECOND = "r00000-d.safetensors", "r00001-d.safetensors"
OLDER_VERSION = "000000000030-da951ee4/r00000-e00.safetensors"


def _rows(words: str, change: Callable[[list[Any], list[Any]], object], key: str = NEWEST) -> Case:
    """Return a case whose newest manifest has other sources and rows of stale experts."""

    def change_body(body: dict[str, Any]) -> None:
        change(body["sources"], body["stale_experts"])

    return Case(
        PARTIAL, lambda b: forge_record(b.repository.store, b._key("manifests/*/*.json"), change_body), words, key
    )


def _row(words: str, given: object, key: str = NEWEST) -> Case:
    """Return a case whose first row is another; it is [0, 1, 10, 0, 1000]."""
    return _rows(words, lambda _, rows: rows.__setitem__(0, given), key)


def _first_source(words: str, given: object) -> Case:
    """Return a case whose first source is another; it is the one of step 10."""
    return _rows(words, lambda sources, _: sources.__setitem__(0, given))


def _step(header: ObjectHeader, shards: int, step: int) -> ObjectHeader:
    """Return the header with another step of its first shards."""
    changed = (replace(stored, step=step) for stored in header.shards[:shards])
    return replace(header, shards=(*changed, *header.shards[shards:]))


def _unlist(sources: list[Any], rows: list[Any]) -> None:
    """Take away the first source and what comes from it."""
    del sources[0]
    rows[:] = [[*place, number - 1, routed] for *place, number, routed in rows if number]


def _fork_earlier(broken: Broken) -> None:
    """Let the second life begin at step 20, so that step 30, which it takes experts from, did not lead to it."""
    before = json.loads(broken.path("manifests/000001-*/000000000020-*").read_bytes())["body"]
    parent = {name: before[name] for name in ("incarnation", "step", "attempt")}
    broken.record("incarnations/*", parent=parent)
    broken.record("manifests/*/*.json", parent=parent)


def _block(words: str, number: int, **fields: object) -> Case:
    """Return a case of the present version in which a block of the newest manifest's objects has other fields."""
    return Case(PARTIAL, lambda b: b.rows(lambda blocks: blocks[number].update(fields)), words, NEWEST, version=2)


def _relative(words: str, **fields: object) -> Case:
    """Return a case in which rank 1's state says something else of how it follows from rank 0's."""

    def change(broken: Broken) -> None:
        checkpoint = broken._newest()
        row = next(r for r in broken.repository.read_manifest(checkpoint).objects if r.key.endswith(SECOND))
        header = broken.repository.read_header(row)
        assert header.state is not None
        tree = decode_state(broken.repository.read_state(row, header))
        assert isinstance(tree, dict)
        blob = encode_state(tree | fields).to_bytes()
        begin = header.state[0]
        data = (broken.root / row.key).read_bytes()[row.header_bytes :][:begin] + blob.ljust(align(len(blob)), b"\0")
        changed = replace(header, state=(begin, len(blob), crc32c(blob)), data_bytes=len(data))
        forge_object(broken.repository, checkpoint, row.key, encode_header(changed), data)

    return Case("alike", change, words, SECOND, version=2)


PARTIAL_CASES: Mapping[str, Case] = {
    "missing object of an earlier attempt": Case(
        PARTIAL, lambda b: b.path(f"objects/*/{OLD}").unlink(), "does not exist", OLD
    ),
    "object of an earlier attempt that is not listed": Case(
        PARTIAL, lambda b: b.rows(lambda rows: rows.pop(1)), "not stored", NEWEST
    ),
    "source without an object": Case(
        PARTIAL, lambda b: b.rows(lambda rows: [rows.pop(0), rows.pop(0)]), "no object", NEWEST
    ),
    "source that is not listed": _rows("another attempt", _unlist),
    "two steps of one expert": Case(
        PARTIAL, lambda b: b.header(OLDER_VERSION, lambda h: _step(h, 1, 27)), "two steps", NEWEST
    ),
    "another step than the declared one": Case(
        PARTIAL, lambda b: b.header(OLDER_VERSION, lambda h: _step(h, 3, 27)), "impossible step", OLDER_VERSION
    ),
    "a row with another step": _row("impossible step", [0, 1, 9, 0, 1000], "000000000010-9d5d5c10/r00000-e00"),
    "a row that names an object without the expert": _row("declared but not stored", [0, 1, 10, 1, 1000]),
    "a row of an expert that nobody has": _rows(
        "declared but not stored", lambda _, rows: rows.append([7, 7, 5, 0, 0])
    ),
    "experts of an abandoned future": Case(PARTIAL, _fork_earlier, "did not lead to this one", NEWEST),
    "bit in a superseded shard": Case(PARTIAL, lambda b: b.flip(f"objects/*/{OLD}", 45056 + 8), "checksum", OLD),
    "a row twice": _rows("each once", lambda _, rows: rows.insert(0, rows[0])),
    "rows out of order": _rows("sorted", lambda _, rows: rows.reverse()),
    "a row of the present step": _row("a step below 40", [0, 1, 40, 0, 1000]),
    "a row of a step after its source": _row("at most that of", [0, 1, 11, 0, 1000]),
    "a row with a source beyond the list": _row("a source below 3", [0, 1, 10, 3, 1000]),
    "a row with a negative source": _row("field=stale_experts", [0, 1, 10, -1, 1000]),
    "a row with a count of 2^63": _row("field=stale_experts", [0, 1, 10, 0, 2**63]),
    "a row of lists": _row("field=stale_experts", [[[[]]]] * 5),
    "a row that is a text": _row("field=stale_experts", "\x1b[2J" * 1000),
    "rows of a fraction": _row("float", [0, 1, 10, 0, 0.5]),
    "many rows": _rows("each once", lambda _, rows: rows.extend([[0, 0, 0, 0, 0]] * 5_000)),
    "a source of a later life": _first_source("field=sources", [3, 10, "9d5d5c10"]),
    "a source of a later step": _first_source("field=sources", [1, 41, "9d5d5c10"]),
    "a source of no life": _first_source("field=incarnation", [0, 10, "9d5d5c10"]),
    "a source outside the grammar": _first_source("field=attempt", [1, 10, "../../.."]),
    "a source that is a text": _first_source("field=sources", "000001-golden-1"),
    "a source twice": _rows("field=sources", lambda sources, _: sources.insert(0, sources[0])),
    "a source that nothing comes from": _rows("field=sources", lambda sources, _: sources.append([2, 40, "ae76cf31"])),
    "sources of nothing": _rows("field=sources", lambda _, rows: rows.clear()),
    "a block of dense objects of an earlier attempt": _block("another attempt", 0, piece="d"),
    "a block of an attempt that is no source": _block("another attempt", 0, attempt="9d5d5c11"),
    "a block outside the grammar": _block("field=attempt", 0, attempt="../../.."),
    "a block of a trillion ranks": _block("field=ranks", -1, ranks=[[0, 10**12]]),
    "a block without ranks": _block("field=ranks", 0, ranks=[], size=[], header=[], header_crc32c=[]),
    "a block with a size too many": _block("field=ranks", -1, size=[8192] * 3),
    "a block of a fraction": _block("float", -1, size=[0.5, 8192]),
    "blocks out of order": Case(
        PARTIAL, lambda b: b.rows(lambda blocks: blocks.reverse()), "sorted", NEWEST, version=2
    ),
    "blocks of another version": Case(
        PARTIAL, lambda b: b.record("manifests/*/*.json", version=1), "field=header", NEWEST, version=2
    ),
    "a state relative to itself": _relative("no other rank", relative_to=1),
    "a state relative to a rank that is not there": _relative("no other rank", relative_to=7),
    "a state that does not follow": _relative("does not follow", changes=[]),
    "a state of another checksum": _relative("does not follow", crc32c=1),
    "a state with a change where nothing is": _relative("the other has nothing", changes=[[["x", "y"], 1]]),
    "a state with changes of another kind": _relative("malformed", changes=[1]),
    "bit in a state that another one is relative to": Case(
        "alike", lambda b: b.flip(f"objects/*/*/{FIRST}", -4000), "state", FIRST, version=2
    ),
    "routes that are not all there": Case(
        PARTIAL, lambda b: b.record("manifests/*/*.json", plt={"basis": "kept"}), "field=plt", NEWEST
    ),
}
