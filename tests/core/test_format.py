"""Records and keys: round trips, and no flipped bit and no hostile byte goes unseen."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc._native import crc32c
from moc.errors import FormatUnsupportedError, ManifestCorruptError, UsageError
from moc.format import keys
from moc.format.canonical import canonical_json, open_record, seal_record
from moc.format.keys import CheckpointName
from moc.format.manifest import (
    Incarnation,
    Manifest,
    decode_format,
    decode_incarnation,
    decode_manifest,
    encode_format,
    encode_incarnation,
    encode_manifest,
)
from tests.core.values import incarnations, manifests, names, plain


@settings(max_examples=40, deadline=None)
@given(manifests())
def test_manifests_come_back(manifest: Manifest) -> None:
    encoded = encode_manifest(manifest)
    assert decode_manifest(encoded, name="m") == manifest
    assert encode_manifest(decode_manifest(encoded, name="m")) == encoded


@given(incarnations)
def test_incarnations_come_back(record: Incarnation) -> None:
    assert decode_incarnation(encode_incarnation(record), name="i") == record


@settings(max_examples=4, deadline=None)
@given(manifests())
def test_every_flipped_bit_of_a_manifest_is_seen(manifest: Manifest) -> None:
    encoded = encode_manifest(manifest)
    for position in range(len(encoded)):
        for bit in range(8):
            changed = bytearray(encoded)
            changed[position] ^= 1 << bit
            with pytest.raises(ManifestCorruptError, match="m"):
                decode_manifest(bytes(changed), name="m")


@settings(max_examples=4, deadline=None)
@given(incarnations)
def test_every_flipped_bit_and_every_cut_of_an_incarnation_is_seen(record: Incarnation) -> None:
    encoded = encode_incarnation(record)
    for position in range(len(encoded)):
        with pytest.raises(ManifestCorruptError):
            decode_incarnation(encoded[:position], name="i")
        for bit in range(8):
            changed = bytearray(encoded)
            changed[position] ^= 1 << bit
            with pytest.raises(ManifestCorruptError):
                decode_incarnation(bytes(changed), name="i")


json_bytes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())


@given(st.binary(max_size=64) | json_bytes | json_bytes.map(lambda b: b'{"body":' + b + b',"crc32c":0}'))
def test_hostile_records_raise_one_error(content: bytes) -> None:
    for decode in (decode_manifest, decode_incarnation):
        with pytest.raises(ManifestCorruptError):
            decode(content, name="hostile")


@settings(max_examples=60, deadline=None)
@given(manifests(), st.data())
def test_wrong_fields_behind_a_right_checksum_raise_one_error(manifest: Manifest, data: st.DataObject) -> None:
    for encoded, decode in (
        (encode_manifest(manifest), decode_manifest),
        (
            encode_incarnation(Incarnation(run="r", number=1, token="t", parent=None, reason="start")),
            decode_incarnation,
        ),
    ):
        body = json.loads(encoded)["body"]
        field = data.draw(st.sampled_from(sorted(body)))
        if data.draw(st.booleans()):
            del body[field]
        else:
            body[field] = data.draw(plain)
        with contextlib.suppress(ManifestCorruptError, FormatUnsupportedError):  # anything else would fly
            decode(seal_record(body), name="m")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"body":' * 5000,
        b'{"body":{"a":1e999},"crc32c":0}',
        b'{"body":{"a":"\\ud800"},"crc32c":0}',
        b"1" * 5000,
        b"NaN",
    ],
)
def test_deep_huge_and_ill_formed_json(text: bytes) -> None:
    with pytest.raises(ManifestCorruptError):
        open_record(text, name="deep")


@given(st.dictionaries(st.text(max_size=4), plain, max_size=4))
def test_canonical_means_one_encoding_per_value(body: dict[str, object]) -> None:
    shuffled = dict(reversed(list(body.items())))
    assert seal_record(shuffled) == seal_record(body)
    spaced = json.dumps({"body": body, "crc32c": crc32c(canonical_json(body))}, ensure_ascii=False).encode()
    with pytest.raises(ManifestCorruptError):
        open_record(spaced, name="spaced")
    with pytest.raises(TypeError, match="float"):
        canonical_json(body | {"x": 0.5})


@given(names, st.integers(0, 99_999), st.sampled_from(("d", "e00", "e17")))
def test_keys_come_back_and_sort_as_their_values(name: CheckpointName, rank: int, piece: str) -> None:
    assert keys.parse_manifest_key(keys.manifest_key(name)) == name
    assert keys.parse_object_key(keys.object_key(name, rank, piece)) == (name, rank, piece)
    assert keys.parse_incarnation_key(keys.incarnation_key(name.run, name.incarnation)) == (name.run, name.incarnation)
    assert keys.parse_victims_key(keys.victims_key(name.run, name.incarnation)) == (name.run, name.incarnation)


@given(names, names)
def test_manifest_keys_of_a_run_sort_by_incarnation_step_and_attempt(a: CheckpointName, b: CheckpointName) -> None:
    b = CheckpointName(run=a.run, incarnation=b.incarnation, step=b.step, attempt=b.attempt)
    assert (keys.manifest_key(a) < keys.manifest_key(b)) == (a < b)


GOOD = "objects/000001-run/000000000005-00abcdef/r00000-d.safetensors"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/" + GOOD,
        GOOD + "/",
        GOOD + "\n",
        "../" + GOOD,
        GOOD.replace("run", ".."),
        GOOD.replace("run", "a/b"),
        GOOD.replace("run", "RUN"),
        GOOD.replace("-d.", "-../../x."),
        GOOD.replace("00abcdef", "00ABCDEF"),
        GOOD.replace("000001", "00000١"),
        GOOD.replace("r00000", "r0000²"),
        GOOD.replace("objects", "manifests"),
        GOOD + "\0",
    ],
)
def test_no_other_path_is_an_object_key(key: str) -> None:
    with pytest.raises(ManifestCorruptError):
        keys.parse_object_key(key)


@pytest.mark.parametrize(
    "build",
    [
        lambda: keys.incarnation_key("run", 1_000_000),
        lambda: keys.incarnation_key("run", 0),
        lambda: keys.victims_key("RUN", 1),
        lambda: keys.manifest_key(CheckpointName(run="run", incarnation=1, step=10**12, attempt="00abcdef")),
        lambda: keys.object_key(CheckpointName(run="run", incarnation=1, step=1, attempt="00abcdef"), 10**6, "d"),
    ],
)
def test_a_key_that_no_listing_would_find_is_not_built(build: Callable[[], str]) -> None:
    with pytest.raises(UsageError, match="not a key"):
        build()


digits = st.text("0123456789١²", min_size=5, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        "objects/{}-{}/{}-{}/r{}-d.safetensors".format,
        st.sampled_from(("000001", "00000١", "1")),
        st.sampled_from(("run", "RUN", "-", "a/b", "..")),
        st.sampled_from(("000000000005", "5", "00000000000²")),
        st.sampled_from(("00abcdef", "00ABCDEF", "g0000000")),
        digits,
    )
)
def test_what_parses_is_what_would_be_built(text: str) -> None:
    try:
        name, rank, piece = keys.parse_object_key(text)
    except ManifestCorruptError:
        return
    assert keys.object_key(name, rank, piece) == text


@pytest.mark.parametrize("run", ["", "-a", "A", "a" * 33, "a/b", "..", "a b", "é", "a\n"])
def test_run_ids_are_plain(run: str) -> None:
    with pytest.raises(UsageError, match="allowed"):
        keys.check_run_id(run)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"moc repository 2\n",
        b"moc repository 1\nrequires x\n",
        b"moc repository 1\nx\n",
        b"\xff\xfe",
        b"restic",
    ],
)
def test_other_formats_are_refused(content: bytes) -> None:
    decode_format(encode_format(), url="u")
    with pytest.raises(FormatUnsupportedError, match="url=u"):
        decode_format(content, url="u")
