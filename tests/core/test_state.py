"""Coverage: a set of shards is accepted exactly if it holds every element once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import CoverageError, InternalError
from moc.state import RankCatalog, Shard, catalog_digest, check_coverage
from tests.core.values import catalogs, models


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_cut_of_a_model_is_covered_and_every_missing_or_double_shard_is_not(data: st.DataObject) -> None:
    model = data.draw(models())
    held = data.draw(catalogs(model, data.draw(st.integers(1, 3))))
    shards = [shard for catalog in held for shard in catalog.shards]
    assert check_coverage(shards) == len(model)
    filled = [index for index, shard in enumerate(shards) if shard.length]
    victim = data.draw(st.sampled_from(filled))
    missing = [shard for index, shard in enumerate(shards) if index != victim]
    others = [s for s in missing if (s.tensor, s.part) == (shards[victim].tensor, shards[victim].part)]
    if others:  # a tensor nobody knows of cannot be missed
        with pytest.raises(CoverageError):
            check_coverage(missing)
    with pytest.raises(CoverageError):
        check_coverage([*shards, shards[victim]])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shards_that_disagree_are_refused(data: st.DataObject) -> None:
    first = Shard(tensor="t", part="p", dtype="F32", shape=(8,), offset=0, length=4)
    second = replace(
        first, offset=4, **data.draw(st.sampled_from(({"dtype": "I32"}, {"shape": (2, 4)}, {"shape": (9,)})))
    )
    with pytest.raises(CoverageError, match="tensor=t"):
        check_coverage([first, second])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_catalogs_survive_json_and_digests_tell_them_apart(data: st.DataObject) -> None:
    model = data.draw(models())
    held = data.draw(catalogs(model, 2))
    again = tuple(RankCatalog.from_json(json.loads(json.dumps(catalog.to_json()))) for catalog in held)
    assert again == held
    assert catalog_digest(reversed(held)) == catalog_digest(held)
    other = data.draw(catalogs(model, 2))
    same = [c.shards for c in other] == [c.shards for c in held]
    assert (catalog_digest(other) == catalog_digest(held)) == same


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 9), (8, 1), (9, 0)])
def test_a_shard_stays_inside_its_tensor(offset: int, length: int) -> None:
    with pytest.raises(InternalError, match="shard outside"):
        Shard(tensor="t", part="p", dtype="F32", shape=(2, 4), offset=offset, length=length)


def test_a_catalog_is_in_order() -> None:
    a = Shard(tensor="a", part="p", dtype="F32", shape=(1,), offset=0, length=1)
    with pytest.raises(InternalError, match="order"):
        RankCatalog(rank=0, shards=(replace(a, tensor="b"), a), state_capacity_bytes=0)
