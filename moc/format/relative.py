"""State blobs without what ranks have alike: a *relative* blob names another rank's, and holds only what differs.

Nobody knows beforehand what ranks have alike: schedulers and counts of routes always, buffers often, random numbers
never. So content decides. The *outline* of a tree is a set of digests, one for the keys of each dict and one for each
value in it, two levels deep, each together with its path; what is in the outline of another rank's tree, that tree has
too, at the same place. An outline is small enough to be told to other nodes.

A relative blob has the length and checksum of the whole one. A reader takes the other rank's tree, puts in what
differs, encodes the result and compares, so it returns what was captured, or raises. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from moc._native import crc32c
from moc.errors import ManifestCorruptError, UsageError
from moc.format.tagged import decode_state, encode_state

__all__ = ["Outline", "StateBase", "outline_of", "relative_state", "whole_state"]

FIELDS = ("relative_to", "size", "crc32c", "changes")
LEVELS = 2  # one for each module buffer, each of the user's objects, each list of routes
KEY_LIMIT = 256  # of a dict that is looked into
DIGEST_BYTES = 16

Outline = frozenset[bytes]
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBase:
    """The rank whose blob is stored whole, and the outline of its tree."""

    rank: int
    outline: Outline


def outline_of(tree: object) -> Outline:
    """Return the digests of what a tree has, and where."""
    return frozenset(_outline(tree, ()))


def relative_state(blob: memoryview | bytes, base: StateBase) -> bytes | None:
    """Return a blob that says how this one differs from the base's; None where that would not be shorter, or beyond the
    limits of a blob.

    Raises: ManifestCorruptError for what is no blob.
    """
    changes: list[object] = [[list(path), value] for path, value in _changes(decode_state(blob), (), base.outline)]
    fields = (base.rank, len(blob), crc32c(blob), changes)
    try:
        encoded = encode_state(dict(zip(FIELDS, fields, strict=True)))
    except UsageError:  # a change lies deeper than in the tree: one that is at the limits is stored whole
        return None
    return encoded.to_bytes() if encoded.size_bytes < len(blob) else None


def whole_state(rank: int, ranks: Container[int], fetch: Callable[[int], bytes]) -> object:
    """Return the tree that a rank captured; `fetch` returns the blob of any of the ranks, its checksum compared.

    Raises: ManifestCorruptError for what no writer makes, and what `fetch` raises.
    """
    tree = decode_state(fetch(rank))
    if not _is_relative(tree):
        return tree
    base = tree["relative_to"]
    if type(base) is not int or base == rank or base not in ranks:
        raise ManifestCorruptError(f"state is relative to no other rank: rank={rank} given={str(base)[:40]}")
    there = decode_state(fetch(base))
    if _is_relative(there):
        raise ManifestCorruptError(f"state is relative to one that is relative itself: rank={rank} base={base}")
    return _resolved(tree, there, f"rank={rank} base={base}")


def _resolved(tree: Mapping[str, object], base: object, where: str) -> object:
    changes, result = tree["changes"], base
    if not isinstance(changes, list) or not all(isinstance(row, list) and len(row) == 2 for row in changes):
        raise ManifestCorruptError(f"relative state is malformed: {where}")
    for path, value in changes:
        if not isinstance(path, list) or len(path) > LEVELS or not all(isinstance(key, str) for key in path):
            raise ManifestCorruptError(f"relative state is malformed: {where} path={str(path)[:80]}")
        result = _replaced(result, path, value, where)
    try:
        whole = encode_state(result).to_bytes()
    except UsageError as error:  # each tree is within the limits, and both together are not
        raise ManifestCorruptError(f"relative state is malformed: {where} {error}") from error
    if (len(whole), crc32c(whole)) != (tree["size"], tree["crc32c"]):
        raise ManifestCorruptError(
            f"state does not follow from the one that it is relative to: {where} "
            f"expected={tree['crc32c']} actual={crc32c(whole)} bytes={len(whole)}"
        )
    return result


def _replaced(tree: object, path: list[str], value: object, where: str) -> object:
    """Return a tree with another value at a path that it has."""
    if not path:
        return value
    key = path[0]
    if not isinstance(tree, dict) or len(tree) > KEY_LIMIT or key not in tree:  # large ones would be copied each time
        raise ManifestCorruptError(f"state differs where the other has nothing: {where} path={str(path)[:80]}")
    return {**tree, key: _replaced(tree[key], path[1:], value, where)}


def _is_relative(tree: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(tree, dict) and tuple(tree) == FIELDS


def _outline(value: object, path: Path) -> Iterator[bytes]:
    if not _is_looked_into(value, path):
        yield _digest("value", path, value)
        return
    yield _digest("keys", path, list(value))
    for key, item in value.items():
        yield from _outline(item, (*path, key))


def _changes(value: object, path: Path, base: Outline) -> Iterator[tuple[Path, object]]:
    """Yield what is not in the outline, as deep in the tree as can be."""
    if not _is_looked_into(value, path):
        if _digest("value", path, value) not in base:
            yield path, value
    elif _digest("keys", path, list(value)) not in base:
        yield path, value
    else:
        for key, item in value.items():
            yield from _changes(item, (*path, key), base)


def _is_looked_into(value: object, path: Path) -> TypeGuard[dict[str, object]]:
    is_small = isinstance(value, dict) and 0 < len(value) <= KEY_LIMIT and len(path) < LEVELS
    return is_small and all(type(key) is str for key in value)  # type: ignore[attr-defined]  # a dict, if it is small


def _digest(kind: str, path: Path, content: object) -> bytes:
    place = encode_state([kind, *path]).to_bytes()  # says its own length, so place and content cannot be mistaken
    return hashlib.blake2b(place + encode_state(content).to_bytes(), digest_size=DIGEST_BYTES).digest()
