"""Every bit of a small repository flipped, every file cut at every length and made longer: all of it is found.

The only bytes that may change unseen are those of objects that no manifest names: nobody reads them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import pytest

from moc.errors import FormatUnsupportedError
from moc.format.manifest import Parent
from moc.repository import Repository
from moc.state import Expert
from moc.store.memory import MemoryStore
from moc.store.port import StoreProperties
from moc.verify import verify_repository
from tests.golden.scenarios import Golden, small_state, tiny_catalog, tiny_shard
from tests.support.repository import Model, RepositoryBuilder

FLIPS = 60  # of each file in the quick version
CUTS = 25


class LocalMemory(MemoryStore):
    """A store in memory that is read by as few threads as a local one."""

    @property
    def properties(self) -> StoreProperties:
        return replace(super().properties, is_local=True)


@cache
def _files() -> dict[str, bytes]:
    """Return a repository of two lives, one checkpoint with an expert, a victim list, and what it condemns."""
    store = MemoryStore()
    shards = [tiny_shard("w", "master", (2, 2)), tiny_shard("e", "master", (3,), expert=Expert(layer=0, index=0))]
    golden = Golden(store, (tiny_catalog(0, shards),), small_state)
    grown = Parent(incarnation=1, step=1, attempt="01010001")
    golden.begin(1, "start")
    golden.save(1, {1: None})
    golden.begin(2, "recover", grown)
    golden.save(2, {2: grown})
    golden.retain(2, keep_last=1)
    return {entry.key: store.read(entry.key, limit_bytes=1 << 20) for entry in store.list("")}


@cache
def _shared_files() -> dict[str, bytes]:
    """Return a repository of a whole checkpoint and a partial one, which shares an expert of two with it."""
    store = MemoryStore()
    model = Model(world_size=1, moe_layers=1, experts=2, hidden=2, dense=(("w", (2, 2)),))
    builder = RepositoryBuilder(store, run="run-7", model=model)
    builder.begin(1)
    base = builder.commit(1, 10)
    grown = Parent(incarnation=1, step=10, attempt=base.name.attempt)
    newest = builder.commit(1, 20, parent=grown, base=base, written=builder.turn(20))
    assert [row.source for row in newest.stale_experts] == [base.name]
    return {entry.key: store.read(entry.key, limit_bytes=1 << 20) for entry in store.list("")}


def _is_harmless(key: str) -> bool:
    """Return whether nobody reads this file: an object that no manifest names."""
    return key.startswith("objects/000001-")


KINDS = ("FORMAT", "incarnations/000001", "incarnations/000002", "manifests/", "victims/", "r00000-d", "r00000-e00")


SHARED_KINDS = ("manifests/*10-", "manifests/*20-", "objects/*10-*-e00", "objects/*20-*-d", "objects/*20-*-e00")


def _key(kind: str) -> str:
    (key,) = (key for key in _files() if kind in key and not _is_harmless(key))
    return key


def _shared_key(kind: str) -> str:
    (key,) = (key for key in _shared_files() if fnmatch(key, f"{kind}*"))
    return key


def _unseen(key: str, changes: Iterable[bytes], files: Mapping[str, bytes] | None = None) -> Iterator[int]:
    """Yield the numbers of the changes that verify says nothing about, or whose finding names another file."""
    store = LocalMemory()
    for name, content in (_files() if files is None else files).items():
        store.put(name, [memoryview(content)])
    repository = Repository(store)
    assert verify_repository(repository, read_data_fraction=1).all_findings == ()
    for number, changed in enumerate(changes):
        store.put(key, [memoryview(changed)])
        try:
            findings = verify_repository(repository, read_data_fraction=1).all_findings
        except FormatUnsupportedError:
            continue
        # A life's number or a manifest's name that has changed shows at its key; nothing else may be blamed.
        if not findings or {finding.key for finding in findings} != {key}:
            yield number


def _flipped(content: bytes, bits: Iterable[int]) -> Iterator[bytes]:
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_found_and_named(kind: str) -> None:
    key = _key(kind)
    content = _files()[key]
    bits = random.Random(kind).sample(range(8 * len(content)), min(FLIPS, 8 * len(content)))

    assert [bits[i] for i in _unseen(key, _flipped(content, bits))] == []


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_lengthened_files_are_found_and_named(kind: str) -> None:
    key = _key(kind)
    content = _files()[key]
    lengths = [0, len(content) - 1, *random.Random(kind).sample(range(len(content)), min(CUTS, len(content)))]
    tails = (b"\0", b"\n", b" ", bytes(4096), content)

    assert [lengths[i] for i in _unseen(key, (content[:length] for length in lengths))] == []
    assert [tails[i] for i in _unseen(key, (content + tail for tail in tails))] == []


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_flipped_bits_and_other_lengths_are_found_where_checkpoints_share_experts(kind: str) -> None:
    files, key = _shared_files(), _shared_key(kind)
    content, chance = files[key], random.Random(kind)
    bits = chance.sample(range(8 * len(content)), FLIPS)
    lengths = [0, len(content) - 1, *chance.sample(range(len(content)), CUTS)]

    assert [bits[i] for i in _unseen(key, _flipped(content, bits), files)] == []
    assert [lengths[i] for i in _unseen(key, (content[:length] for length in lengths), files)] == []
    assert list(_unseen(key, [content + bytes(4096)], files)) == []


def test_what_nobody_reads_may_change_unseen() -> None:
    keys = [key for key in _files() if _is_harmless(key)]
    assert len(keys) == 2, "the objects of the checkpoint that was dropped"
    for key in keys:
        content = _files()[key]
        assert list(_unseen(key, _flipped(content, range(0, 8 * len(content), 4999)))) == list(
            range(len(range(0, 8 * len(content), 4999)))
        )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_and_every_length(kind: str) -> None:
    key = _key(kind)
    content = _files()[key]

    assert list(_unseen(key, _flipped(content, range(8 * len(content))))) == []
    assert list(_unseen(key, (content[:length] for length in range(len(content))))) == []
    print(f"{key}: {8 * len(content)} bits, {len(content)} lengths")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_every_bit_and_every_length_where_checkpoints_share_experts(kind: str) -> None:
    files, key = _shared_files(), _shared_key(kind)
    content = files[key]

    assert list(_unseen(key, _flipped(content, range(8 * len(content))), files)) == []
    assert list(_unseen(key, (content[:length] for length in range(len(content))), files)) == []
    print(f"{key}: {8 * len(content)} bits, {len(content)} lengths")
