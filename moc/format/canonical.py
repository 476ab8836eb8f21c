"""Canonical JSON with a self-checksum: the envelope of every small record in a repository.

A record is one line of UTF-8 JSON, keys sorted, no spaces, ending in a newline: ``{"body":{...},"crc32c":N}`` where N
is the crc32c of the canonical encoding of ``body``. Equal values give equal bytes, so two committers of one checkpoint
write the same object. The checksum is tested on the bytes as they are, before anything is parsed.
"""

from __future__ import annotations

import json
import re
from typing import Any

from moc._native import crc32c
from moc.errors import ManifestCorruptError, UsageError

__all__ = ["FIELD_LIMIT", "RECORD_LIMIT_BYTES", "Fields", "canonical_json", "load_json", "open_record", "seal_record"]

DEPTH_LIMIT = 32
RECORD_LIMIT_BYTES = 1 << 26  # 64 MiB: a manifest of two million objects
INTEGER_RANGE = range(-(1 << 63), 1 << 64)  # what other languages can hold; Python's own are unbounded
FIELD_LIMIT = (1 << 63) - 1  # of a number with a meaning: nobody counts further
STRUCTURE_LIMIT = 16_000_000
"""Commas and opening brackets of a JSON text that is read; parsed, each takes up to 70 bytes of memory."""

_HEAD = b'{"body":'
_TAIL = re.compile(rb',"crc32c":(\d{1,10})\}\n')


def load_json(text: bytes) -> Any:
    """Return the value of a JSON text from storage; raises ValueError for one that would take gigabytes of memory."""
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > STRUCTURE_LIMIT:
        raise ValueError(f"too many values: bytes={len(text)} allowed={STRUCTURE_LIMIT} commas and opening brackets")
    return json.loads(text)


def canonical_json(value: object) -> bytes:
    """Return the canonical encoding; raises TypeError or ValueError for what has none, such as a float."""
    _refuse_others(value, 0)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal_record(body: dict[str, object]) -> bytes:
    """Wrap a body in the checksummed envelope; raises UsageError for one that no reader would take."""
    encoded = canonical_json(body)
    record = b'%s%s,"crc32c":%d}\n' % (_HEAD, encoded, crc32c(encoded))
    if len(record) > RECORD_LIMIT_BYTES:
        raise UsageError(f"record is too long: bytes={len(record)} allowed={RECORD_LIMIT_BYTES}")
    return record


def open_record(record: bytes, *, name: str) -> Fields:
    """Return the body of a record whose checksum is right; raises ManifestCorruptError naming `name`."""
    end = record.rfind(b',"crc32c":')
    tail = _TAIL.fullmatch(record, end) if end >= 0 else None
    if tail is None or not record.startswith(_HEAD) or len(record) > RECORD_LIMIT_BYTES:
        raise ManifestCorruptError(f"record is not readable: name={name} bytes={len(record)} reason=no whole envelope")
    encoded = record[len(_HEAD) : end]
    expected, actual = int(tail[1]), crc32c(encoded)
    if expected != actual:
        raise ManifestCorruptError(f"record checksum mismatch: name={name} expected={expected} actual={actual}")
    try:
        body = load_json(encoded)
        is_canonical = isinstance(body, dict) and canonical_json(body) == encoded and b"%d" % expected == tail[1]
    except (ValueError, TypeError, RecursionError) as error:
        raise ManifestCorruptError(
            f"record is not readable: name={name} bytes={len(record)} reason={error!s:.300}"
        ) from error
    if not is_canonical:
        raise ManifestCorruptError(f"record is not canonical: name={name} bytes={len(record)}")
    return Fields(body, name)


def _refuse_others(value: object, depth: int) -> None:
    if depth > DEPTH_LIMIT:
        raise ValueError("nested too deep")
    if isinstance(value, float):
        raise TypeError(f"a canonical record holds no floats: value={value}")
    if isinstance(value, int) and value not in INTEGER_RANGE:
        raise ValueError(f"integer needs more than 64 bits: bits={value.bit_length()}")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a canonical record has string keys only")
        value = list(value.values())
    if isinstance(value, list | tuple):
        if value and set(map(type, value)) == {int} and min(value) in INTEGER_RANGE and max(value) in INTEGER_RANGE:
            return  # a long column is looked at as a whole
        for item in value:
            _refuse_others(item, depth + 1)


class Fields:
    """Typed access to a JSON object from storage; every mismatch is a ManifestCorruptError naming record and field."""

    def __init__(self, body: dict[str, Any], name: str) -> None:
        self.body = body
        self.name = name

    def integer(self, key: str, *, minimum: int = 0, maximum: int = FIELD_LIMIT) -> int:
        value = self.body.get(key)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(key, f"an integer, {minimum} to {maximum}")
        return value

    def text(self, key: str, pattern: str = "(?s:.*)") -> str:
        """Return a string that matches the pattern as a whole."""
        value = self.body.get(key)
        if not isinstance(value, str) or re.fullmatch(pattern, value, re.ASCII) is None:
            raise self.wrong(key, f"text like {pattern}")
        return value

    def boolean(self, key: str) -> bool:
        value = self.body.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.body.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def rows(self, key: str) -> list[Any]:
        value = self.body.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def integers(self, key: str, *, minimum: int = 0, maximum: int = FIELD_LIMIT) -> list[int]:
        values = self.rows(key)
        if values and (set(map(type, values)) != {int} or min(values) < minimum or max(values) > maximum):
            raise self.wrong(key, f"integers, {minimum} to {maximum}")
        return values

    def optional(self, key: str) -> Fields | None:
        """Return a nested object, or None where the field is null."""
        return None if self.is_null(key) else Fields(self.mapping(key), f"{self.name}.{key}")

    def is_null(self, key: str) -> bool:
        """Return whether a field is null; one that is missing is wrong."""
        if key not in self.body:
            raise self.wrong(key, "a value or null")
        return self.body[key] is None

    def objects(self, key: str) -> list[Fields]:
        rows = self.rows(key)
        if not all(isinstance(row, dict) for row in rows):
            raise self.wrong(key, "a list of objects")
        return [Fields(row, f"{self.name}.{key}[{i}]") for i, row in enumerate(rows)]

    def wrong(self, key: str, expected: str) -> ManifestCorruptError:
        """Return the error that says what a field should have been."""
        given = repr(self.body.get(key))[:80]
        return ManifestCorruptError(
            f"record field is wrong: name={self.name} field={key} given={given} expected={expected}"
        )
