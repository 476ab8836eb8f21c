"""Verification as a library: whatever is changed in a checkpoint is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from moc.errors import CoverageError, MocError, ShardCorruptError, StoreUnavailableError
from moc.format.canonical import open_record, seal_record
from moc.format.keys import CheckpointName, manifest_key, object_key
from moc.format.manifest import Manifest
from moc.readback import Region, windows
from moc.repository import Repository
from moc.store.memory import MemoryStore
from moc.verify import data_bytes, verify_checkpoint, verify_repository
from tests.support.forge import Change, forge_header
from tests.support.repository import Model, RepositoryBuilder, build_history

FLIPS = 300


def test_a_sound_repository_has_no_findings_and_every_byte_is_counted() -> None:
    builder = build_history(MemoryStore())
    seen: list[int] = []

    report = verify_repository(builder.repository, read_data_fraction=1.0, progress=seen.append)

    assert report.all_findings == ()
    assert report.notes == ()
    assert [r.shards for r in report.checkpoints] == [36] * 5
    manifest = builder.repository.read_manifest(report.checkpoints[0].name)
    assert 0 < sum(seen) <= 5 * data_bytes(manifest)


def test_every_flipped_bit_that_a_checksum_covers_is_found_and_named() -> None:
    store = MemoryStore()
    builder = RepositoryBuilder(store)
    builder.begin(1)
    manifest = builder.commit(1, 10)
    chance = random.Random(20)
    for _ in range(FLIPS):
        key, offset = _covered_byte(builder.repository, manifest, chance)
        bit = chance.randrange(8)
        with _Changed(store, key, lambda content, o=offset, b=bit: _flipped(content, o, b)):
            report = verify_checkpoint(builder.repository, manifest.name, read_data_fraction=1.0)

        assert key in {finding.key for finding in report.findings}, f"{key=} {offset=} {bit=}"
    assert verify_checkpoint(builder.repository, manifest.name, read_data_fraction=1.0).is_sound


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: replace(h, rank=1), "another rank"),
        (lambda h: replace(h, piece="e01"), "another piece"),
        (lambda h: replace(h, name=replace(h.name, step=11)), "another checkpoint"),
        (lambda h: replace(h, shards=h.shards[1:]), "number of tensors differs"),
        (lambda h: replace(h, shards=tuple(replace(s, step=9) for s in h.shards)), "not declared"),
        (lambda h: replace(h, shards=(replace(h.shards[0], step=9), *h.shards[1:])), "two steps"),
        (lambda h: replace(h, shards=tuple(replace(s, step=99) for s in h.shards)), "impossible step"),
        (lambda h: replace(h, state=(0, 8, 0)), "not expected"),
    ],
)
def test_a_header_that_contradicts_its_key_or_manifest_is_found(change: Change, words: str) -> None:
    builder = RepositoryBuilder(MemoryStore())
    builder.begin(1)
    manifest = builder.commit(1, 10)

    name = _with_header(builder, manifest, rank=0, piece="e00", change=change)

    messages = [str(finding) for finding in verify_checkpoint(builder.repository, name).findings]
    assert any(words in message for message in messages), messages


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensors": 29}, "number of tensors differs"),
        ({"sources": [[1, 10, "9d5d5c10"]], "stale_experts": [[0, 1, 9, 0, 0]]}, "declared but not stored"),
        ({"topology": {"world_size": 3}}, "not one per rank"),
        ({"topology": {}}, "not one per rank"),
    ],
)
def test_a_manifest_that_contradicts_its_objects_is_found(fields: dict[str, object], words: str) -> None:
    store = MemoryStore()
    builder = RepositoryBuilder(store)
    builder.begin(1)
    manifest = builder.commit(1, 10)
    key = manifest_key(manifest.name)
    body = dict(open_record(store.read(key, limit_bytes=1 << 20), name=key).body)

    store.put(key, [memoryview(seal_record({**body, **fields}))])

    messages = [str(finding) for finding in verify_checkpoint(builder.repository, manifest.name).findings]
    assert any(words in message for message in messages), messages


def test_an_object_listed_twice_or_left_out_is_found() -> None:
    builder = RepositoryBuilder(MemoryStore())
    builder.begin(1)
    manifest = builder.commit(1, 10)

    builder.repository.put_manifest(replace(manifest, objects=(*manifest.objects, manifest.objects[1])))
    twice = verify_checkpoint(builder.repository, manifest.name)
    builder.repository.put_manifest(replace(manifest, objects=manifest.objects[:-1]))
    less = verify_checkpoint(builder.repository, manifest.name)

    assert any("each rank once" in str(finding) for finding in twice.findings)
    assert any("number of tensors" in str(finding) for finding in less.findings)


def test_objects_that_nothing_references_and_unknown_files_are_notes() -> None:
    store = MemoryStore()
    builder = build_history(store)
    lost = builder.name(3, 50)
    builder.write_objects(lost, builder.model.catalogs()[0])
    store.put("notes/readme.txt", [memoryview(b"hello")])

    report = verify_repository(builder.repository)

    assert report.all_findings == ()
    assert [note.split(":")[0] for note in report.notes] == [
        "unknown file",
        "object that no checkpoint references",
        "object that no checkpoint references",
    ]


def test_a_store_without_answers_is_an_error_and_not_a_finding() -> None:
    class Silent(MemoryStore):
        def size_bytes(self, key: str) -> int:
            raise StoreUnavailableError(f"no answer key={key}")

    builder = RepositoryBuilder(Silent())
    builder.begin(1)
    manifest = builder.commit(1, 10)

    with pytest.raises(StoreUnavailableError):
        verify_checkpoint(builder.repository, manifest.name)


def test_shards_larger_than_a_window_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moc.readback.WINDOW_BYTES", 8192)
    store = MemoryStore()
    builder = RepositoryBuilder(store, model=Model(hidden=48))
    builder.begin(1)
    manifest = builder.commit(1, 10)
    key = object_key(manifest.name, 1, "e00")
    row = next(row for row in manifest.objects if row.key == key)
    stored = builder.repository.read_header(row).shards[4]
    assert stored.shard.size_bytes > 8192

    sound = verify_checkpoint(builder.repository, manifest.name, read_data_fraction=1.0)
    with _Changed(
        store, key, lambda c: _flipped(c, row.header_bytes + stored.position + stored.shard.size_bytes - 1, 0)
    ):
        broken = verify_checkpoint(builder.repository, manifest.name, read_data_fraction=1.0)

    assert sound.is_sound
    (finding,) = broken.findings
    assert isinstance(finding.error, ShardCorruptError)
    assert stored.shard.name in str(finding)


def test_windows_join_neighbours_and_keep_order() -> None:
    def region(position: int, length: int) -> Region:
        return Region(name=str(position), position=position, length=length, crc32c=0)

    mib = 2**20
    regions = [region(0, mib), region(mib, mib), region(4 * mib, mib), region(8 * mib, 70 * mib), region(80 * mib, 0)]

    runs = list(windows(regions))

    assert [[int(r.name) // mib for r in run] for run in runs] == [[0, 1], [4], [8], [80]]
    assert [r for run in runs for r in run] == regions


def test_coverage_errors_are_findings_of_the_manifest() -> None:
    builder = RepositoryBuilder(MemoryStore())
    builder.begin(1)
    manifest = builder.commit(1, 10)

    name = _with_header(builder, manifest, rank=0, piece="d", change=lambda h: replace(h, shards=tuple(h.shards[:-1])))

    errors: list[MocError] = [finding.error for finding in verify_checkpoint(builder.repository, name).findings]
    assert [type(error) for error in errors] == [CoverageError]


def _with_header(
    builder: RepositoryBuilder, manifest: Manifest, *, rank: int, piece: str, change: Change
) -> CheckpointName:
    forge_header(builder.repository, manifest.name, object_key(manifest.name, rank, piece), change)
    return manifest.name


def _covered_byte(repository: Repository, manifest: Manifest, chance: random.Random) -> tuple[str, int]:
    """Return the key and offset of a random byte of the checkpoint that is not padding."""
    places = [(manifest_key(manifest.name), 0, repository.store.size_bytes(manifest_key(manifest.name)))]
    for row in manifest.objects:
        header = repository.read_header(row)
        places.append((row.key, 0, row.header_bytes))
        places += [(row.key, row.header_bytes + s.position, s.shard.size_bytes) for s in header.shards]
        if header.state is not None:
            places.append((row.key, row.header_bytes + header.state[0], header.state[1]))
    key, begin, length = chance.choice(places)
    return key, begin + chance.randrange(length)


def _flipped(content: bytes, offset: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[offset] ^= 1 << bit
    return bytes(changed)


class _Changed:
    """An object with other bytes while the block lasts."""

    def __init__(self, store: MemoryStore, key: str, change: Callable[[bytes], bytes]) -> None:
        self._store, self._key = store, key
        self._before = store.read(key, limit_bytes=1 << 30)
        self._after = change(self._before)

    def __enter__(self) -> None:
        self._store.put(self._key, [memoryview(self._after)])

    def __exit__(self, *_: object) -> None:
        self._store.put(self._key, [memoryview(self._before)])


def test_the_seed_chooses_which_shards_a_sample_reads() -> None:
    builder = RepositoryBuilder(MemoryStore(), model=Model(experts=16))
    builder.begin(1)
    name = builder.commit(1, 10).name
    read: dict[int, list[int]] = {}
    for seed in (0, 1, 2):
        for _ in range(2):
            seen: list[int] = []
            report = verify_checkpoint(
                builder.repository, name, read_data_fraction=0.3, seed=seed, progress=seen.append
            )
            assert read.setdefault(seed, [report.shards, report.bytes_read]) == [report.shards, report.bytes_read]

    assert len({tuple(counts) for counts in read.values()}) == 3
