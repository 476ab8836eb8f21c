"""Canonical JSON with a self-checksum: the envelope of every small record in a repository.

A record is one line of UTF-8 JSON, keys sorted, no spaces, ending in a newline: ``{"body":{...},"crc32c":N}`` where N
is the crc32c of the canonical encoding of ``body``. Equal values give equal bytes, so two committers of one checkpoint
write the same object.
"""

from __future__ import annotations

import json
from typing import Any

from moc._native import crc32c
from moc.errors import ManifestCorruptError

__all__ = ["Fields", "canonical_json", "load_json", "open_record", "seal_record"]

DEPTH_LIMIT = 32
INTEGER_LIMIT = 1 << 63
STRUCTURE_LIMIT = 16_000_000
"""Commas and opening brackets of a JSON text that is read; parsed, each takes up to 70 bytes of memory."""


def load_json(text: bytes) -> Any:
    """Return the value of a JSON text from storage; raises ValueError for one that would take gigabytes of memory."""
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > STRUCTURE_LIMIT:
        raise ValueError(f"too many values: bytes={len(text)} allowed={STRUCTURE_LIMIT} commas and opening brackets")
    return json.loads(text)


def canonical_json(value: object) -> bytes:
    """Return the canonical encoding; floats are refused because their text is not canonical."""
    _refuse_floats(value, 0)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal_record(body: dict[str, object]) -> bytes:
    """Wrap a body in the checksummed envelope."""
    encoded = canonical_json(body)
    return b'{"body":' + encoded + b',"crc32c":' + str(crc32c(encoded)).encode() + b"}\n"


def open_record(record: bytes, *, name: str) -> Fields:
    """Return the body of a record whose checksum is right; raises ManifestCorruptError naming `name`."""
    try:
        envelope = load_json(record)
        body, expected = envelope["body"], envelope["crc32c"]
        actual = crc32c(canonical_json(body))
    except (ValueError, TypeError, KeyError, RecursionError, UnicodeError) as error:
        raise ManifestCorruptError(
            f"record is not readable: name={name} bytes={len(record)} reason={error!s:.300}"
        ) from error
    # The bytes themselves must be canonical too: a flipped bit in white space or key order must not pass unseen.
    if actual != expected or not isinstance(body, dict) or seal_record(body) != record:
        raise ManifestCorruptError(f"record checksum mismatch: name={name} expected={expected} actual={actual}")
    return Fields(body, name)


def _refuse_floats(value: object, depth: int) -> None:
    if depth > DEPTH_LIMIT:
        raise ValueError("nested too deep")
    if isinstance(value, float):
        raise TypeError(f"a canonical record holds no floats: value={value}")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a canonical record has string keys only")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item, depth + 1)


class Fields:
    """Typed access to a JSON object from storage; every mismatch is a ManifestCorruptError naming record and field."""

    def __init__(self, body: dict[str, Any], name: str) -> None:
        self.body = body
        self.name = name

    def integer(self, key: str, *, minimum: int = 0) -> int:
        value = self.body.get(key)
        if type(value) is not int or not minimum <= value < INTEGER_LIMIT:
            raise self._wrong(key, f"an integer >= {minimum} of 63 bits")
        return value

    def text(self, key: str) -> str:
        value = self.body.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def boolean(self, key: str) -> bool:
        value = self.body.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.body.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return value

    def rows(self, key: str) -> list[Any]:
        value = self.body.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def optional(self, key: str) -> Fields | None:
        """Return a nested object, or None where the field is null."""
        return None if self.body.get(key) is None else Fields(self.mapping(key), f"{self.name}.{key}")

    def objects(self, key: str) -> list[Fields]:
        rows = self.rows(key)
        if not all(isinstance(row, dict) for row in rows):
            raise self._wrong(key, "a list of objects")
        return [Fields(row, f"{self.name}.{key}[{i}]") for i, row in enumerate(rows)]

    def _wrong(self, key: str, expected: str) -> ManifestCorruptError:
        given = repr(self.body.get(key))[:80]
        return ManifestCorruptError(
            f"record field is wrong: name={self.name} field={key} given={given} expected={expected}"
        )
