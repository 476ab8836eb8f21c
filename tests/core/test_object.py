"""Object headers: round trip, readable by safetensors itself, and every flipped bit is seen."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moc.errors import IntegrityError, ShardCorruptError
from moc.format.keys import CheckpointName
from moc.format.object import ALIGNMENT, ObjectHeader, StoredShard, align, encode_header, header_length, parse_header
from moc.repository import Repository
from moc.state import RankCatalog, Shard
from moc.store.local import LocalStore
from moc.store.memory import MemoryStore
from tests.core.values import catalogs, models, names
from tests.support.repository import RepositoryBuilder, shard_bytes


def _header(name: CheckpointName, catalog: RankCatalog, state_bytes: int | None) -> ObjectHeader:
    stored, reached = [], 0
    for shard in catalog.shards:
        stored.append(StoredShard(shard=shard, step=name.step, position=reached, crc32c=7))
        reached = align(reached + shard.size_bytes)
    state = None if state_bytes is None else (reached, state_bytes, 9)
    return ObjectHeader(
        name=name,
        rank=catalog.rank,
        piece="d",
        shards=tuple(stored),
        state=state,
        data_bytes=reached + align(state_bytes or 0),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_headers_come_back_and_keep_the_data_aligned(data: st.DataObject) -> None:
    model = data.draw(models())
    header = _header(data.draw(names), data.draw(catalogs(model, 1))[0], data.draw(st.none() | st.integers(0, 9000)))
    encoded = encode_header(header)
    assert parse_header(encoded, key="k") == header
    assert len(encoded) % ALIGNMENT == 0
    assert header_length(encoded[:8], key="k") == len(encoded)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=80), st.data())
def test_hostile_headers_raise_one_error(content: bytes, data: st.DataObject) -> None:
    with pytest.raises(ShardCorruptError, match="key=k"):
        parse_header(content, key="k")
    model = data.draw(models())
    encoded = bytearray(encode_header(_header(data.draw(names), data.draw(catalogs(model, 1))[0], 5)))
    begin = data.draw(st.integers(0, len(encoded.rstrip())))
    encoded[begin : begin + len(content)] = content
    with contextlib.suppress(ShardCorruptError):  # anything else would fly
        parse_header(bytes(encoded), key="k")


def test_every_flipped_bit_of_a_header_is_seen_by_the_repository(tmp_path: Path) -> None:
    builder = RepositoryBuilder(LocalStore(tmp_path / "repo"))
    manifest = builder.commit(1, 5)
    repository = builder.repository
    row = min(manifest.objects, key=lambda r: r.header_bytes)
    path = tmp_path / "repo" / row.key
    content = path.read_bytes()
    used = len(content[: row.header_bytes].rstrip())
    for position in [*range(0, used, 7), *range(used, row.header_bytes, 97), row.header_bytes - 1]:
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match="key="):
            repository.read_header(row)
    path.write_bytes(content)
    repository.read_header(row)


def test_objects_are_safetensors_files_with_the_right_values(tmp_path: Path) -> None:
    builder = RepositoryBuilder(LocalStore(tmp_path / "repo"))
    manifest = builder.commit(1, 5)
    seen = 0
    for row in manifest.objects:
        tensors = load_file(tmp_path / "repo" / row.key)
        for stored in builder.repository.read_header(row).shards:
            expected = np.frombuffer(shard_bytes(stored.shard, 5), dtype=np.float32)
            assert np.array_equal(tensors[stored.shard.name].reshape(-1), expected)
            seen += 1
    assert seen == sum(len(catalog.shards) for catalog in builder.model.catalogs())


def test_an_empty_shard_lies_before_the_one_at_its_place_whatever_their_names() -> None:
    shards = tuple(
        Shard(tensor=tensor, part="master", dtype="F32", shape=(4,), offset=offset, length=length)
        for tensor, offset, length in (("a", 0, 4), ("z", 2, 0), ("b", 0, 4))
    )
    positions = (0, 4096, 4096)
    header = ObjectHeader(
        name=CheckpointName(run="run-7", incarnation=1, step=5, attempt="00abcdef"),
        rank=0,
        piece="d",
        shards=tuple(
            StoredShard(shard=shard, step=5, position=position, crc32c=0)
            for shard, position in zip(shards, positions, strict=True)
        ),
        state=None,
        data_bytes=8192,
    )

    assert parse_header(encode_header(header), key="k") == header


def test_a_header_of_another_object_is_refused() -> None:
    builder = RepositoryBuilder(MemoryStore())
    first, second = builder.commit(1, 5), builder.commit(1, 6)
    repository: Repository = builder.repository
    own, other = first.objects[0], second.objects[0]
    content = repository.store.read(own.key, limit_bytes=1 << 20)
    repository.store.delete(other.key)
    repository.put_object(other.key, [memoryview(content)])
    with pytest.raises(ShardCorruptError, match=other.key):
        repository.read_header(other)
