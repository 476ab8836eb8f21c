"""The objects of a manifest in columns: they come back, and nothing that `encode_blocks` never makes is taken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import ManifestCorruptError, UsageError
from moc.format.canonical import Fields, seal_record
from moc.format.columns import OBJECT_LIMIT, ObjectRow, decode_blocks, encode_blocks, objects_of
from moc.format.keys import CheckpointName, object_key, parse_object_key, parse_object_keys
from moc.format.manifest import decode_manifest, encode_manifest
from tests.core.values import manifests, names

BODY = {"incarnation": 1, "step": 5, "attempt": "00abcdef", "piece": "d", "ranks": [[0, 2], [4, 1]]} | {
    "size": [8192, 4096, 9000],
    "header": [4096, 4096, 8192],
    "header_crc32c": [0, 7, 2**32 - 1],
}


@st.composite
def rows(draw: st.DrawFn) -> tuple[ObjectRow, ...]:
    """Return objects of any attempts of one run, with ranks of five and of six digits."""
    run, found = draw(names).run, {}
    for owner in draw(st.lists(names, max_size=3)):
        owner = CheckpointName(run=run, incarnation=owner.incarnation, step=owner.step, attempt=owner.attempt)
        first = draw(st.sampled_from((0, 99_995)))
        for rank in draw(st.sets(st.integers(first, first + 9))):
            for piece in draw(st.sets(st.sampled_from(("d", "e00", "e17")))):
                header = draw(st.integers(1, 9)) * 4096
                found[object_key(owner, rank, piece)] = (header + draw(st.integers(0, 2**40)), header)
    crcs = st.integers(0, 2**32 - 1)
    return tuple(
        ObjectRow(key=key, size_bytes=size, header_bytes=header, header_crc32c=draw(crcs))
        for key, (size, header) in sorted(found.items())
    )


@settings(max_examples=60, deadline=None)
@given(rows(), st.randoms())
def test_rows_come_back_whatever_order_they_are_given_in(given_rows: tuple[ObjectRow, ...], chance: Any) -> None:
    run = parse_object_key(given_rows[0].key)[0].run if given_rows else "run"
    shuffled = list(given_rows)
    chance.shuffle(shuffled)

    encoded = encode_blocks(shuffled)

    assert encoded == encode_blocks(given_rows), "two committers write equal bytes"
    assert objects_of(decode_blocks(Fields({"objects": json.loads(json.dumps(encoded))}, "m"), run)) == given_rows


@given(rows())
def test_many_keys_are_parsed_as_each_alone(given_rows: tuple[ObjectRow, ...]) -> None:
    keys = [row.key for row in given_rows]

    assert list(parse_object_keys(keys)) == [parse_object_key(key) for key in keys]
    for key in keys:
        for broken in (
            key + "x",
            key.replace("objects", "manifests"),
            key.replace("/r", "/../r"),
            key.rpartition("/")[2],
        ):
            with pytest.raises(ManifestCorruptError, match="not an object key"):
                list(parse_object_keys([*keys, broken]))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("incarnation", 0, "field=incarnation"),
        ("step", 10**12, "field=step"),
        ("attempt", "00ABCDEF", "field=attempt"),
        ("piece", "e0", "field=piece"),
        ("piece", "../x", "field=piece"),
        ("ranks", [], "field=ranks"),
        ("ranks", {}, "expected=a list"),
        ("ranks", [[0, 3, 0]], "field=ranks"),
        ("ranks", [[0, True], [4, 2]], "field=ranks"),
        ("ranks", [[-1, 3]], "field=ranks"),
        ("ranks", [[0, 0], [4, 3]], "field=ranks"),
        ("ranks", [[0, 2], [2, 1]], "each rank once"),
        ("ranks", [[0, 2], [1, 1]], "field=ranks"),
        ("ranks", [[4, 1], [0, 2]], "field=ranks"),
        ("ranks", [[0, 2]], "3 below 1000000 together"),
        ("ranks", [[0, 4]], "field=ranks"),
        ("ranks", [[0, 10**12]], "field=ranks"),
        ("ranks", [[0, 2], [10**6, 1]], "field=ranks"),
        ("size", [8192, 4096], "field=ranks"),
        ("size", [8192, 4096, 8191], "no size below its header's"),
        ("size", [8192, 4096, 2**63], "field=size"),
        ("size", [8192, 4096, "9000"], "field=size"),
        ("size", None, "field=size"),
        ("header", [4096, 4096], "as many as sizes"),
        ("header", [4096, 4096, 8191], "multiples of 4096"),
        ("header", [4096, 0, 8192], "field=header"),
        ("header", [4096, 4096, 2**40], "field=header"),
        ("header_crc32c", [0, 7], "as many as sizes"),
        ("header_crc32c", [0, 7, -1], "field=header_crc32c"),
        ("header_crc32c", [0, 7, 2**32], "field=header_crc32c"),
        ("header_crc32c", [0, False, 1], "field=header_crc32c"),
    ],
)
def test_a_block_that_nobody_wrote_is_refused(field: str, value: object, words: str) -> None:
    assert len(objects_of(decode_blocks(Fields({"objects": [BODY]}, "m"), "run"))) == 3

    with pytest.raises(ManifestCorruptError, match=f"name=m.objects.0. .*{words}"):
        decode_blocks(Fields({"objects": [BODY | {field: value}]}, "m"), "run")


def test_more_objects_than_any_manifest_has_are_refused_before_they_are_rows() -> None:
    many = [None] * (OBJECT_LIMIT // 2 + 1)  # of which no row could be made
    body = {"objects": [BODY | {"size": many}, BODY | {"size": many, "piece": "e00"}]}
    with pytest.raises(ManifestCorruptError, match="too many objects"):
        decode_blocks(Fields(body, "m"), "run")
    with pytest.raises(UsageError, match="too many objects"):
        encode_blocks([ObjectRow("", 8192, 4096, 0)] * (OBJECT_LIMIT + 1))


def test_blocks_are_sorted_each_once() -> None:
    later = BODY | {"step": 6}
    for blocks in ([BODY, BODY], [later, BODY], [BODY | {"piece": "e00"}, BODY]):
        with pytest.raises(ManifestCorruptError, match="not sorted, each once: name=m"):
            decode_blocks(Fields({"objects": blocks}, "m"), "run")


@settings(max_examples=20, deadline=None)
@given(manifests(), st.data())
def test_a_changed_column_is_refused_or_is_another_value(manifest: Any, data: st.DataObject) -> None:
    """Behind a right checksum: whatever is read encodes to the bytes that were read."""
    body = json.loads(encode_manifest(manifest))["body"]
    block = data.draw(st.sampled_from(body["objects"]))
    column = block[data.draw(st.sampled_from(("ranks", "size", "header", "header_crc32c")))]
    match data.draw(st.sampled_from(("drop", "twice", "number"))):
        case "drop":
            column.pop()
        case "twice":
            column.append(column[-1])
        case _:
            column[-1] = data.draw(st.integers(-1, 2**64 - 1))
    changed = seal_record(body)

    try:
        found = decode_manifest(changed, name="m")
    except ManifestCorruptError:
        return

    assert encode_manifest(found) == changed
