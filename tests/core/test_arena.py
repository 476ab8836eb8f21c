"""The arena: torn seals, torn descriptors, adoption by descriptor only, and checks of what lies in it."""

from __future__ import annotations

import fcntl
import mmap
import os
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc._native import crc32c
from moc.errors import IntegrityError, InternalError, ShardCorruptError
from moc.plan.layout import arrange_arena
from moc.snapshot.arena import Arena, CorruptSeal, descriptor_room
from moc.snapshot.seal import SealRecord, decode_seal, encode_seal
from tests.core.values import attempts, runs
from tests.support.repository import Model

CATALOGS = Model(world_size=2, moe_layers=1, experts=2, hidden=4, dense=(("embed.weight", (50, 4)),)).catalogs()
VERSIONS = 3


def _descriptor(lives: int) -> dict[str, object]:
    return {
        "versions": VERSIONS,
        "catalogs": [catalog.to_json() for catalog in CATALOGS],
        "lineage": [f"life {number}" for number in range(lives)],
    }


@pytest.fixture
def arena() -> Iterator[Arena]:
    descriptor = _descriptor(1)
    layout = arrange_arena(CATALOGS, versions=VERSIONS, descriptor_bytes=descriptor_room(descriptor))
    made = Arena.create(descriptor, layout, name="test")
    yield made
    made.close()


def _copy(arena: Arena, content: bytes | bytearray | None = None) -> int:
    """Return a descriptor of a memfd with these bytes (default: the arena's)."""
    fd = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, arena.size_bytes)
    os.pwrite(fd, bytes(arena.view(0, arena.size_bytes)) if content is None else content, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def _record(rank: int, step: int, *, slot: int, arena: Arena | None = None) -> SealRecord:
    catalog = CATALOGS[rank]
    units = 2
    slots = array("I", [slot] * units)
    crcs = array("I", [7] * len(catalog.shards))
    if arena is not None:
        for index, (shard, offset) in enumerate(zip(catalog.shards, arena.shard_offsets(rank, slots), strict=True)):
            view = arena.view(offset, shard.size_bytes)
            view[:] = os.urandom(shard.size_bytes)
            crcs[index] = crc32c(view)
            view.release()
    return SealRecord(
        run="run-7",
        incarnation=3,
        step=step,
        rank=rank,
        flags=1,
        attempt="00abcdef",
        digest="0123456789abcdef",
        state_bytes=0,
        state_crc32c=0,
        slots=slots,
        steps=array("Q", [step] * units),
        crcs=crcs,
    )


# Seal records

records = st.integers(1, 4).flatmap(
    lambda units: st.builds(
        SealRecord,
        run=runs,
        incarnation=st.integers(1, 2**32 - 1),
        step=st.integers(0, 2**63),
        rank=st.integers(0, 2**32 - 1),
        flags=st.integers(0, 3),
        attempt=attempts,
        digest=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
        state_bytes=st.integers(0, 2**63),
        state_crc32c=st.integers(0, 2**32 - 1),
        slots=st.lists(st.integers(0, 7), min_size=units, max_size=units).map(lambda v: array("I", v)),
        steps=st.lists(st.integers(0, 2**63), min_size=units, max_size=units).map(lambda v: array("Q", v)),
        crcs=st.lists(st.integers(0, 2**32 - 1), max_size=5).map(lambda v: array("I", v)),
    )
)


@given(records)
def test_seals_come_back(record: SealRecord) -> None:
    encoded = encode_seal(record)
    assert encoded[:8] == bytes(8)
    assert decode_seal(memoryview(encoded.ljust(4096, b"\xff"))) == record


@settings(max_examples=30, deadline=None)
@given(records, records, st.data())
def test_a_torn_seal_is_none(old: SealRecord, new: SealRecord, data: st.DataObject) -> None:
    """Any prefix of the new record over the old one, in any order of the writes: the old, the new, or nothing."""
    before, after = encode_seal(old).ljust(512, b"\0"), encode_seal(new).ljust(512, b"\0")
    cut = data.draw(st.integers(8, 512))
    for torn in (after[:cut] + before[cut:], before[:cut] + after[cut:]):
        assert decode_seal(memoryview(torn)) in (None, old, new)
    encoded = bytearray(encode_seal(new))
    position = data.draw(st.integers(8, len(encoded) - 1))
    encoded[position] ^= 1 << data.draw(st.integers(0, 7))
    assert decode_seal(memoryview(encoded)) is None


def test_every_flipped_bit_of_a_seal_is_seen() -> None:
    encoded = encode_seal(_record(0, 5, slot=1))
    for position in range(8, len(encoded)):
        for bit in range(8):
            changed = bytearray(encoded)
            changed[position] ^= 1 << bit
            assert decode_seal(memoryview(changed)) is None


@given(st.binary(min_size=256, max_size=600))
def test_hostile_seals_are_none(content: bytes) -> None:
    assert decode_seal(memoryview(content)) is None
    assert decode_seal(memoryview(b"\0" * 8 + b"seal" + content)) is None


def test_a_seal_counts_from_its_state_word_on(arena: Arena) -> None:
    assert arena.seals(1) == {}
    arena.seal(2, _record(1, 5, slot=0))
    assert arena.words(1).sealed_step == 5
    assert {index: record.step for index, record in arena.seals(1).items()} == {2: 5}
    assert arena.seals(0) == {}
    other = Arena.attach(_copy(arena))
    assert {index: record.step for index, record in other.seals(1).items()} == {2: 5}
    other.close()
    arena.free(1, 2)
    assert arena.is_free(1, 2)
    assert arena.seals(1) == {}


def test_a_record_of_another_rank_or_with_impossible_slots_is_corrupt(arena: Arena) -> None:
    offset = arena._record_offset(0, 0)
    for record in (_record(1, 5, slot=0), _record(0, 5, slot=VERSIONS)):
        encoded = encode_seal(record)
        view = arena.view(offset, len(encoded))
        view[:] = encoded
        view[:8] = (1).to_bytes(8, "little")
        view.release()
        assert arena.read_seal(0, 0) == CorruptSeal(rank=0, record=0)
        assert arena.corrupt_seals(0) == [CorruptSeal(rank=0, record=0)]
        assert arena.seals(0) == {}


def test_a_changed_byte_in_a_slot_is_named(arena: Arena) -> None:
    record = _record(1, 5, slot=1, arena=arena)
    arena.check(record)
    shard = arena.catalog(1).shards[2]
    view = arena.view(arena.shard_offsets(1, record.slots)[2] + 3, 1)
    view[0] ^= 1
    view.release()
    with pytest.raises(ShardCorruptError, match=shard.name):
        arena.check(record)


# Descriptors


def test_a_descriptor_is_replaced_whole_or_not_at_all(arena: Arena) -> None:
    for lives in range(2, 5):  # both areas, in turn
        held = dict(arena.descriptor)
        before = bytes(arena.view(0, arena.size_bytes))
        arena.describe(_descriptor(lives))
        after = bytes(arena.view(0, arena.size_bytes))
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        selector = [i for i in changed if i < mmap.PAGESIZE]
        assert len(selector) == 1, "the selector changes in one byte"
        body = [i for i in changed if i >= mmap.PAGESIZE]
        for count in [*range(0, len(body), max(1, len(body) // 40)), len(body)]:
            for some in (body[:count], body[len(body) - count :]):
                torn = bytearray(before)
                for position in some:
                    torn[position] = after[position]
                other = Arena.attach(_copy(arena, torn))
                assert other.descriptor == held
                other.close()
        other = Arena.attach(_copy(arena, after))
        assert other.descriptor == _descriptor(lives)
        other.close()


def test_a_descriptor_that_does_not_fit_changes_nothing(arena: Arena) -> None:
    held = dict(arena.descriptor)
    with pytest.raises(InternalError, match="does not fit"):
        arena.describe(_descriptor(1) | {"padding": "x" * (1 << 20)})
    arena.reload()
    assert arena.descriptor == held


def test_adoption_needs_nothing_but_the_memory(arena: Arena) -> None:
    arena.seal(0, _record(0, 4, slot=0))
    arena.publish(global_step=4, committed_step=None)
    arena.beat(1, incarnation=3, step=9, now_ns=100)
    arena.beat(1, incarnation=3, step=10, now_ns=150)
    other = Arena.attach(os.dup(arena.fd))
    assert other.layout == arena.layout
    assert other.catalogs == CATALOGS
    assert other.published() == (4, None)
    assert other.words(1).beat_interval_ns == 50
    assert other.seals(0) == arena.seals(0)
    other.clear_words(1)
    assert arena.words(1).beat_ns == 0
    other.close()


@pytest.mark.parametrize("size", [0, 100, 4096, 20_000])
def test_other_memory_is_refused(size: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fd = os.memfd_create("other", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    with pytest.raises(IntegrityError, match="not an arena"):
        Arena.attach(fd)
    assert len(os.listdir("/proc/self/fd")) == before, "nothing is left open"


def test_memory_that_its_owner_may_cut_short_is_refused(arena: Arena) -> None:
    """Whoever reads what has been cut off dies of SIGBUS."""
    fd = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, bytes(arena.view(0, arena.size_bytes)))

    with pytest.raises(IntegrityError, match="not an arena"):
        Arena.attach(fd)


def test_no_bit_of_the_valid_descriptor_is_trusted_blindly(arena: Arena) -> None:
    content = bytes(arena.view(0, arena.size_bytes))
    begin = content.index(b'{"versions"')
    for position in range(begin - 12, begin + 400, 7):
        changed = bytearray(content)
        changed[position] ^= 4
        with pytest.raises(IntegrityError, match="arena"):
            Arena.attach(_copy(arena, changed))
