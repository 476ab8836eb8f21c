"""Experts of a checkpoint that are older than it: which rows a manifest may have, and what they say."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from moc.errors import InternalError, ManifestCorruptError, UsageError
from moc.format.canonical import Fields, seal_record
from moc.format.keys import CheckpointName, object_key
from moc.format.manifest import Manifest, ObjectRow, decode_manifest, encode_manifest
from moc.format.stale import StaleExpert, decode_stale, encode_stale, sources
from moc.state import Expert
from tests.core.values import manifests

NAME = CheckpointName(run="run-7", incarnation=2, step=40, attempt="000000aa")
BEFORE = CheckpointName(run="run-7", incarnation=2, step=30, attempt="000000bb")
FORMER = CheckpointName(run="run-7", incarnation=1, step=35, attempt="000000cc")
STALE = (
    StaleExpert(expert=Expert(layer=0, index=1), step=20, source=FORMER, routed=7),
    StaleExpert(expert=Expert(layer=0, index=2), step=39, source=NAME, routed=0),
    StaleExpert(expert=Expert(layer=3, index=0), step=30, source=BEFORE, routed=9),
)
KEYS = tuple(
    sorted([*(object_key(NAME, 0, p) for p in ("d", "e00")), *(object_key(n, 5, "e00") for n in (BEFORE, FORMER))])
)


@settings(max_examples=40, deadline=None)
@given(manifests())
def test_every_expert_has_one_source_and_one_step(manifest: Manifest) -> None:
    rows = {row.expert: (row.source, row.step) for row in manifest.stale_experts}

    assert {expert: manifest.version(expert) for expert in rows} == rows
    for expert in rows:
        for other in (Expert(layer=expert.layer, index=expert.index + 1), Expert(layer=expert.layer + 1, index=0)):
            assert manifest.version(other) == rows.get(other, (manifest.name, manifest.name.step))


def test_rows_come_back_and_old_manifests_have_no_list_of_sources() -> None:
    body = _body()
    assert body["sources"] == [[1, 35, "000000cc"], [2, 30, "000000bb"], [2, 40, "000000aa"]]
    assert body["stale_experts"] == [[0, 1, 20, 0, 7], [0, 2, 39, 2, 0], [3, 0, 30, 1, 9]]
    assert sources(STALE) == (FORMER, BEFORE, NAME)

    whole = json.loads(encode_manifest(_manifest(stale=(), keys=KEYS[2:])))["body"]

    assert whole["stale_experts"] == []
    assert "sources" not in whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stale_experts": []}, "only attempts that a stale expert comes from"),
        ({"stale_experts": {}}, "expected=a list"),
        ({"stale_experts": [[0, 1, 20]]}, "lists of layer"),
        ({"stale_experts": [[0, 1, 20, 0, 7, 0]]}, "lists of layer"),
        ({"stale_experts": [[0, 1, 20, 0, True]]}, "lists of layer"),
        ({"stale_experts": [[0, 1, 20, 0, "7"]]}, "lists of layer"),
        ({"stale_experts": [[0, -1, 20, 0, 7]]}, "lists of layer"),
        ({"stale_experts": [[0, 1, 20, 0, 2**63]]}, "lists of layer"),
        ({"stale_experts": [[0, 1, 20, 3, 7]]}, "a source below 3"),
        ({"stale_experts": [[0, 2, 40, 2, 0]]}, "a step below 40"),
        ({"stale_experts": [[0, 1, 36, 0, 7]]}, "a step below 40, at most that of 000001-run-7/000000000035-000000cc"),
        ({"stale_experts": [[0, 1, 20, 0, 7], [0, 1, 19, 0, 7]]}, "sorted by expert, each once"),
        ({"stale_experts": [[0, 1, 20, 0, 7], [0, 0, 20, 0, 7]]}, "sorted by expert, each once"),
        ({"stale_experts": [[0, 1, 20, 0, 7], [3, 0, 30, 1, 9]]}, "only attempts that a stale expert comes from"),
        ({"sources": None}, "field=sources"),
        ({"sources": []}, "a source below 0"),
        ({"sources": [[1, 35], [2, 30, "000000bb"], [2, 40, "000000aa"]]}, "lists of incarnation"),
        ({"sources": [[0, 35, "000000cc"], [2, 30, "000000bb"], [2, 40, "000000aa"]]}, "field=incarnation"),
        ({"sources": [[1, 35, "x"], [2, 30, "000000bb"], [2, 40, "000000aa"]]}, "field=attempt"),
        ({"sources": [[2, 30, "000000bb"], [1, 35, "000000cc"], [2, 40, "000000aa"]]}, "sorted, each once"),
        ({"sources": [[1, 35, "000000cc"], [1, 35, "000000cc"], [2, 40, "000000aa"]]}, "sorted, each once"),
        ({"sources": [[1, 35, "000000cc"], [2, 30, "000000bb"], [2, 40, "000000ab"]]}, "no later moment"),
        ({"sources": [[1, 41, "000000cc"], [2, 30, "000000bb"], [2, 40, "000000aa"]]}, "no later moment"),
        ({"sources": [[1, 35, "000000cc"], [2, 30, "000000bb"], [3, 1, "000000aa"]]}, "no later moment"),
        ({"sources": [[1, 35, "000000cd"], [2, 30, "000000bb"], [2, 40, "000000aa"]]}, "object is of another attempt"),
    ],
)
def test_rows_that_nobody_wrote_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ManifestCorruptError, match=words):
        _decode({**_body(), **changes})


def test_a_source_without_an_object_and_an_object_without_a_source_are_refused() -> None:
    body = _body()
    body["objects"] = [block for block in body["objects"] if block["attempt"] != FORMER.attempt]
    with pytest.raises(ManifestCorruptError, match=f"no object: name=m source={FORMER}"):
        _decode(body)

    body = _body()
    body["objects"][0]["piece"] = "d"  # of FORMER
    with pytest.raises(ManifestCorruptError, match="object is of another attempt"):
        _decode(body)


def test_more_rows_than_any_model_has_are_neither_written_nor_read() -> None:
    with pytest.raises(UsageError, match="too many stale experts: given=250001 allowed=250000"):
        encode_stale([STALE[0]] * 250_001)
    with pytest.raises(ManifestCorruptError, match="given=250001 rows expected=at most 250000 rows"):
        decode_stale(Fields({"stale_experts": [[]] * 250_001}, "m"), NAME)


def test_a_value_that_no_manifest_can_have_is_never_made() -> None:
    with pytest.raises(InternalError, match="not sorted"):
        _manifest(stale=STALE[::-1])
    with pytest.raises(InternalError, match="step at most the source's"):
        StaleExpert(expert=Expert(layer=0, index=0), step=36, source=FORMER, routed=0)


def _manifest(*, stale: tuple[StaleExpert, ...] = STALE, keys: tuple[str, ...] = KEYS) -> Manifest:
    return Manifest(
        name=NAME,
        parent=None,
        topology={"world_size": 1, "node_of_rank": [0], "ep_sizes": []},
        catalog_digest="0" * 16,
        tensors=1,
        objects=tuple(ObjectRow(key=key, size_bytes=8192, header_bytes=4096, header_crc32c=0) for key in keys),
        fingerprint={},
        versions={},
        is_finite=True,
        stale_experts=stale,
    )


def _body() -> dict[str, object]:
    encoded = encode_manifest(_manifest())
    assert decode_manifest(encoded, name="m") == _manifest()
    body = json.loads(encoded)["body"]
    assert isinstance(body, dict)
    return body


def _decode(body: dict[str, object]) -> Manifest:
    return decode_manifest(seal_record(body), name="m")
