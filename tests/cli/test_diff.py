"""Comparison of checkpoints: equal is equal, a changed element is found and measured, the unknown is called unknown."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc._native import crc32c
from moc.diff import (
    DIFFERENT,
    EQUAL,
    UNKNOWN,
    CheckpointDiff,
    Side,
    compare_checkpoints,
    compare_elements,
    open_side,
    read_differences,
)
from moc.format.keys import CheckpointName, object_key
from moc.format.manifest import Manifest
from moc.format.object import encode_header
from moc.repository import Repository
from moc.store.local import LocalStore
from moc.store.memory import MemoryStore
from tests.cli.console import moc, moc_json
from tests.support.repository import Model, RepositoryBuilder, build_history


def _checkpoint(model: Model | None = None, **options: object) -> tuple[Repository, Manifest]:
    builder = RepositoryBuilder(MemoryStore(), model=model or Model(), **options)  # type: ignore[arg-type]
    builder.begin(1)
    return builder.repository, builder.commit(1, 10)


def _set_element(repository: Repository, manifest: Manifest, key: str, tensor: str, element: int, value: float) -> None:
    """Change one element of a stored shard, and all checksums with it: another checkpoint of the same name."""
    row = next(row for row in manifest.objects if row.key == key)
    header = repository.read_header(row)
    content = bytearray(repository.store.read(key, limit_bytes=1 << 30))
    shards = []
    for stored in header.shards:
        if f"{stored.shard.part}/{stored.shard.tensor}" == tensor:
            start = row.header_bytes + stored.position
            struct.pack_into("<f", content, start + 4 * (element - stored.shard.offset), value)
            stored = replace(stored, crc32c=crc32c(bytes(content[start : start + stored.shard.size_bytes])))
        shards.append(stored)
    encoded = encode_header(replace(header, shards=tuple(shards)))
    assert len(encoded) == row.header_bytes
    content[: len(encoded)] = encoded
    repository.store.delete(key)
    repository.store.put(key, [memoryview(content)])
    rows = [r._replace(header_crc32c=crc32c(encoded)) if r.key == key else r for r in manifest.objects]
    repository.delete_manifest(manifest.name)
    repository.put_manifest(replace(manifest, objects=tuple(rows)))


def _measured(a: Side, b: Side, progress: Callable[[int], None] | None = None) -> CheckpointDiff:
    return read_differences(compare_checkpoints(a, b), a, b, progress)


def test_a_checkpoint_equals_itself_and_shares_every_object() -> None:
    repository, manifest = _checkpoint()
    side = open_side(repository, manifest)

    diff = compare_checkpoints(side, side)

    assert diff.is_equal is True
    assert (diff.facts, diff.state) == ((), ())
    assert (diff.shared_objects, diff.shared_bytes) == (len(manifest.objects), manifest.size_bytes)
    assert {tensor.verdict for tensor in diff.tensors} == {EQUAL}


@pytest.mark.parametrize("value", [1000.0, math.nan, -0.0])
def test_one_changed_element_is_found_by_checksums_and_measured_by_data(value: float) -> None:
    a, b = _checkpoint(), _checkpoint()
    repository, manifest = b
    element = 97 * 24 - 5  # in the second rank's part of the embedding
    key = object_key(manifest.name, 1, "d")
    _set_element(repository, manifest, key, "exp_avg/embed.weight", element, value)
    changed = repository, repository.read_manifest(manifest.name)

    quick = compare_checkpoints(open_side(*a), open_side(*changed))
    whole = _measured(open_side(*a), open_side(*changed))

    for diff in (quick, whole):
        assert diff.is_equal is False
        assert [(t.part, t.tensor) for t in diff.tensors if t.verdict == DIFFERENT] == [("exp_avg", "embed.weight")]
        assert diff.state == ()
    found = next(t for t in whole.tensors if t.verdict == DIFFERENT)
    assert found.differing == 1
    if math.isfinite(value):
        assert found.max_abs == pytest.approx(value, abs=2)
    else:
        assert found.max_abs is None


def test_other_cuts_are_unknown_until_the_data_are_read() -> None:
    a, b = _checkpoint(Model(world_size=2)), _checkpoint(Model(world_size=4))

    quick = compare_checkpoints(open_side(*a), open_side(*b))
    seen: list[int] = []
    whole = _measured(open_side(*a), open_side(*b), seen.append)

    unknown = {t.tensor for t in quick.tensors if t.verdict == UNKNOWN}
    assert unknown == {"embed.weight", "norm.weight"}, "experts are whole on every number of ranks"
    assert {t.verdict for t in whole.tensors} == {EQUAL}
    assert sum(seen) == quick.unequal_bytes == 3 * 4 * (97 * 24 + 7)
    assert {s.rank for s in whole.state} == {2, 3}, "the ranks that only one of them has"
    assert "topology.world_size" in {name for name, _, _ in whole.facts}


def test_tensors_that_only_one_has_are_named() -> None:
    a = _checkpoint(Model(dense=(("embed.weight", (97, 24)),)))
    b = _checkpoint(Model(dense=(("embed.weight", (24, 97)), ("head.weight", (3,)))))

    diff = _measured(open_side(*a), open_side(*b))

    verdicts = {t.tensor: t.verdict for t in diff.tensors if t.verdict != EQUAL}
    assert verdicts == {"embed.weight": "other shape", "head.weight": "only in B"}
    assert diff.is_equal is False


@given(st.lists(st.tuples(st.floats(width=16), st.floats(width=16)), min_size=1, max_size=40), st.sampled_from("ehfdb"))
def test_elements_are_compared_as_plain_python_compares_them(pairs: list[tuple[float, float]], kind: str) -> None:
    """Floats of 16 bits are exact in every wider type; "b" stands for bfloat16, the upper half of a float32."""
    code = {"b": "f", "h": "e"}.get(kind, kind)
    dtype = {"e": "F16", "h": "F16", "f": "F32", "d": "F64", "b": "BF16"}[kind]

    def encode(values: list[float]) -> list[bytes]:
        cells = [struct.pack(f"<{code}", value) for value in values]
        return [cell[2:] for cell in cells] if kind == "b" else cells

    def decode(cell: bytes) -> float:
        value: float = struct.unpack(f"<{code}", b"\0\0" + cell if kind == "b" else cell)[0]
        return value

    left, right = encode([a for a, _ in pairs]), encode([b for _, b in pairs])
    apart = [(decode(a), decode(b)) for a, b in zip(left, right, strict=True) if a != b]
    finite = [abs(a - b) for a, b in apart if math.isfinite(a) and math.isfinite(b)]

    differing, largest = compare_elements(bytearray(b"".join(left)), bytearray(b"".join(right)), dtype)

    assert differing == len(apart)
    assert largest == max(finite, default=None)


@pytest.mark.parametrize(
    ("dtype", "left", "right", "expected"),
    [
        ("BOOL", b"\1\0\1", b"\1\1\1", (1, 1.0)),
        ("I8", b"\x80\x00", b"\x7f\x00", (1, 255.0)),
        ("U64", bytes(8), b"\xff" * 8, (1, 2.0**64)),
        ("I16", b"\x00\x80", b"\xff\x7f", (1, 65535.0)),
        ("F8_E4M3", b"\1\2", b"\1\3", (1, None)),
        ("F8_E5M2", b"\1\2", b"\1\2", (0, None)),
    ],
)
def test_every_kind_of_dtype_is_compared(
    dtype: str, left: bytes, right: bytes, expected: tuple[int, float | None]
) -> None:
    assert compare_elements(bytearray(left), bytearray(right), dtype) == expected


# The command


def test_the_command_tells_what_differs(history: Path) -> None:
    text = moc("diff", "10", "20", "--read-data", "--tensors", "-r", history)
    report = moc_json("diff", "10", "20", "--read-data", "-r", history)

    assert text.returncode == 0, text.stderr
    assert max(map(len, text.stdout.splitlines())) <= 80
    assert "verdict  different" in text.stdout
    assert "counters.global_steps" in text.stdout
    assert "master/norm.weight" in text.stdout
    assert set(report) == {
        "a",
        "b",
        "is_equal",
        "facts",
        "shared_objects",
        "shared_bytes",
        "parts",
        "layers",
        "tensors",
        "state",
        "state_values",
        "experts",
        "staleness",
    }
    assert set(report["layers"]) == {"embed", "norm", "layers.0", "layers.1"}
    assert report["parts"]["master"]["different"] == 10
    assert {"rank": 0, "path": "counters.global_steps", "a": "10", "b": "20"} in report["state"]


def test_a_difference_is_an_exit_code_only_on_request(history: Path) -> None:
    codes = [
        moc("diff", *steps, *option, "-r", history).returncode
        for steps in (("20", "20"), ("10", "20"))
        for option in ((), ("--exit-code",))
    ]

    assert codes == [0, 0, 0, 1]
    assert moc("diff", "10", "21", "-r", history).returncode == 3


def test_two_repositories_are_compared(history: Path, tmp_path: Path) -> None:
    twin = build_history(LocalStore(tmp_path / "twin"))
    other = RepositoryBuilder(LocalStore(tmp_path / "other"), seed=1, versions={"moc": "0.1.0", "torch": "2.14.0"})
    other.begin(1)
    name: CheckpointName = other.commit(1, 20).name

    same = moc_json("diff", "20", "20", "--other", tmp_path / "twin", "-r", history)
    apart = moc_json("diff", "20", str(name), "--other", tmp_path / "other", "-r", history)

    assert twin.repository.checkpoints()
    assert (same["is_equal"], same["facts"]) == (True, [])
    assert apart["is_equal"] is False
    assert apart["facts"] == [{"name": "versions.torch", "a": "2.13.0", "b": "2.14.0"}]
