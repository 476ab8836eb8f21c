"""The seal record: what makes a rank's snapshot real, in 256 fixed bytes and three arrays.

The record lies in the arena's header area. Its state word is separate and published last with release order, so a
trainer that dies while writing has written nothing. The record's crc32c covers everything but the state word.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

from moc._native import crc32c
from moc.plan.layout import RECORD_FIXED_BYTES

__all__ = ["EXPLICIT", "FREE", "PERSIST", "REPLICATE", "SEALED", "SealRecord", "decode_seal", "encode_seal"]

FREE = 0
SEALED = 1
PERSIST = 1
"""Flag: the agent persists this snapshot."""
EXPLICIT = 2
"""Flag: somebody waits for this save, so it is queued and not skipped when another one is under way."""
REPLICATE = 4
"""Flag: the agents of other nodes get replicas of this snapshot."""

_FIXED = struct.Struct("<8x4sI32sQQII8s16sQIII")  # 8x: the state word
_MAGIC = b"seal"
_CRC_POSITION = RECORD_FIXED_BYTES - 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SealRecord:
    """One rank's sealed snapshot: for unit u its slot (version) and the step of its bytes, for shard i its crc32c, and
    the state blob's.
    """

    run: str
    incarnation: int
    step: int
    rank: int
    flags: int
    attempt: str
    digest: str
    state_bytes: int
    state_crc32c: int
    slots: array[int]
    steps: array[int]
    crcs: array[int]


def encode_seal(record: SealRecord) -> bytes:
    """Return the record's bytes with a zero state word."""
    fixed = _fixed(record)
    body = record.slots.tobytes() + record.steps.tobytes() + record.crcs.tobytes()
    return fixed + struct.pack("<I", crc32c(body, crc32c(fixed[8:]))) + body


def _fixed(record: SealRecord) -> bytes:
    """Return the fixed part without its checksum."""
    return _FIXED.pack(
        _MAGIC,
        1,
        record.run.encode(),
        record.incarnation,
        record.step,
        record.rank,
        record.flags,
        record.attempt.encode(),
        record.digest.encode(),
        record.state_bytes,
        record.state_crc32c,
        len(record.slots),
        len(record.crcs),
    ).ljust(_CRC_POSITION, b"\0")


def decode_seal(view: memoryview) -> SealRecord | None:
    """Return the record in these bytes, None if there is none that a writer can have made. Ignores the state word."""
    if view.nbytes < RECORD_FIXED_BYTES:
        return None
    magic, version, run, incarnation, step, rank, flags, attempt, digest, state_bytes, state_crc, units, shards = (
        _FIXED.unpack_from(view)
    )
    end = RECORD_FIXED_BYTES + 12 * units + 4 * shards
    if magic != _MAGIC or version != 1 or end > view.nbytes:
        return None
    (expected,) = struct.unpack_from("<I", view, _CRC_POSITION)
    if crc32c(view[RECORD_FIXED_BYTES:end], crc32c(view[8:_CRC_POSITION])) != expected:
        return None
    slots, steps, crcs = array("I"), array("Q"), array("I")
    slots.frombytes(view[RECORD_FIXED_BYTES : RECORD_FIXED_BYTES + 4 * units])
    steps.frombytes(view[RECORD_FIXED_BYTES + 4 * units : RECORD_FIXED_BYTES + 12 * units])
    crcs.frombytes(view[RECORD_FIXED_BYTES + 12 * units : end])
    if not (run + attempt + digest).isascii():
        return None
    record = SealRecord(
        run=run.rstrip(b"\0").decode(),
        incarnation=incarnation,
        step=step,
        rank=rank,
        flags=flags,
        attempt=attempt.rstrip(b"\0").decode(),
        digest=digest.decode(),
        state_bytes=state_bytes,
        state_crc32c=state_crc,
        slots=slots,
        steps=steps,
        crcs=crcs,
    )
    return record if _fixed(record)[8:] == view[8:_CRC_POSITION] else None
