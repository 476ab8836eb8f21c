"""A sequential model of what the documents promise, apart from moc's code: lineage, retention, what an object holds.

Everything here reads stored bytes with `json` and `struct` alone (docs/format.md).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Links",
    "Record",
    "StoredName",
    "chain",
    "due_to_go",
    "newest_on",
    "object_entries",
    "parse_name",
    "parse_record",
    "position",
]


@dataclass(frozen=True, slots=True)
class Record:
    """What an incarnation record says."""

    run: str
    number: int
    token: str
    parent: tuple[int, int, str | None] | None


@dataclass(frozen=True, slots=True, order=True)
class StoredName:
    """What a manifest's key says."""

    number: int
    step: int
    attempt: str
    run: str


Links = list[tuple[int, int | None, str | None]]
"""Lives from the newest back: number, last step that counts, attempt at that step (None: any)."""


def parse_name(key: str) -> StoredName:
    """Read the key of a manifest, or of an object (its folder)."""
    _, life, moment = key.removesuffix(".json").split("/")[:3]
    number, _, run = life.partition("-")
    step, attempt = moment.split("-")
    return StoredName(int(number), int(step), attempt, run)


def parse_record(content: bytes) -> Record:
    body = json.loads(content)["body"]
    parent = body["parent"]
    grown = None if parent is None else (parent["incarnation"], parent["step"], parent["attempt"])
    return Record(body["run"], body["number"], body["token"], grown)


def chain(records: Mapping[int, Record]) -> Links:
    """Follow the parents from the newest life."""
    links: Links = []
    number, step, attempt = max(records, default=0), None, None
    while number and (not links or number < links[-1][0]):
        links.append((number, step, attempt))
        record = records.get(number)
        number, step, attempt = (0, None, None) if record is None or record.parent is None else record.parent
    return links


def position(links: Links, number: int, step: int, attempt: str | None = None) -> tuple[int, int] | None:
    """Return where a moment is in the order of preference (smaller is better), None off the lineage."""
    for depth, (life, last_step, last_attempt) in enumerate(links):
        if life != number or (last_step is not None and step > last_step):
            continue
        if step == last_step and last_attempt is not None and attempt not in (None, last_attempt):
            continue
        return (depth, -step)
    return None


def newest_on(links: Links, names: Iterable[StoredName]) -> StoredName | None:
    """Return the checkpoint that recovery prefers, of two of a step the later one; None if none is on the lineage."""
    placed = [(position(links, n.number, n.step, n.attempt), n) for n in names]
    admitted = [(-place[0], -place[1], n.attempt, n) for place, n in placed if place is not None]
    return max(admitted)[3] if admitted else None


def due_to_go(name: StoredName, listed: list[StoredName], links: Links, *, keep_last: int, keep_every: int) -> bool:
    """Return whether retention may drop a checkpoint, by its documented rule."""
    on_chain = sorted(n for n in listed if position(links, n.number, n.step, n.attempt) is not None)
    if name in on_chain:
        is_multiple = bool(keep_every) and name.step % keep_every == 0
        return name not in on_chain[-keep_last:] and not is_multiple
    return sum(1 for other in on_chain if other.number > name.number) >= keep_last


def object_entries(content: bytes) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """Yield tensor, part, first element and values of each shard of an object."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    for entry, facts in header.items():
        if entry.startswith("__"):
            continue
        (part, _, rest) = entry.partition("/")
        tensor, _, offset = rest.partition("@")
        first, last = facts["data_offsets"]
        values = np.frombuffer(content[8 + length + first : 8 + length + last], dtype=np.float32)
        yield tensor, part, int(offset or 0), values
