"""Partial checkpoints, whose experts lie in objects of several attempts: every reader takes the right bytes of each,
and nothing that a listed checkpoint names is deleted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from moc.collect import collect
from moc.commit import commit
from moc.diff import DIFFERENT, EQUAL, compare_checkpoints, open_side, read_differences
from moc.errors import PlanDivergedError
from moc.extract import extract
from moc.format.contents import live_shards
from moc.format.keys import manifest_key, parse_object_key, victims_key
from moc.format.manifest import Manifest, Parent
from moc.gc import Retention
from moc.host import SystemHost
from moc.plan.read import Placed
from moc.recover import StorageSource
from moc.repository import Repository
from moc.state import Expert, Shard
from moc.store.memory import MemoryStore
from moc.trace import Trace
from moc.verify import verify_checkpoint, verify_repository
from tests.support.repository import Model, RepositoryBuilder, build_partial_history, shard_bytes

STEPS = (10, 20, 30, 40, 50)
SMALL = Model(hidden=4, dense=(("embed.weight", (5, 4)),))


@pytest.fixture
def builder() -> RepositoryBuilder:
    return build_partial_history(MemoryStore(), model=SMALL)


def _manifest(builder: RepositoryBuilder, step: int) -> Manifest:
    return builder.repository.read_manifest(builder.name(1 if step <= 30 else 2, step))


def _step_of(manifest: Manifest, shard: Shard) -> int:
    return manifest.name.step if shard.expert is None else manifest.version(shard.expert)[1]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_recovery_reads_of_every_expert_the_version_that_the_manifest_declares(
    builder: RepositoryBuilder, step: int, world_size: int
) -> None:
    manifest = _manifest(builder, step)
    for catalog in replace(SMALL, world_size=world_size).catalogs():
        source = StorageSource(builder.repository, manifest, rank=catalog.rank)
        stored: dict[tuple[str, str, int], Placed] = {}
        for row in source.placed(catalog.shards).rows:
            assert stored.setdefault((row.shard.tensor, row.shard.part, row.shard.offset), row) is row, (
                "only one version"
            )
            with source.read(row) as view:
                assert bytes(view) == shard_bytes(row.shard, _step_of(manifest, row.shard))
        assert {(s.tensor, s.part) for s in catalog.shards} <= {key[:2] for key in stored}


def test_each_element_of_the_model_is_live_once(builder: RepositoryBuilder) -> None:
    superseded = 0
    for step in STEPS:
        manifest = _manifest(builder, step)
        headers = [(row, builder.repository.read_header(row)) for row in manifest.objects]
        live = [stored for row, header in headers for stored in live_shards(manifest, row, header)]
        superseded += sum(len(header.shards) for _, header in headers) - len(live)

        assert sum(stored.shard.length for stored in live) == _elements()
        assert len({stored.shard.name for stored in live}) == len(live)
        assert all(stored.step == _step_of(manifest, stored.shard) for stored in live)
    assert superseded, "else the history shows nothing"


def test_a_superseded_shard_is_verified_and_not_needed(builder: RepositoryBuilder) -> None:
    manifest = _manifest(builder, 40)
    row, position, length = next(
        (row, row.header_bytes + stored.position, stored.shard.size_bytes)
        for row in manifest.objects
        for header in [builder.repository.read_header(row)]
        for stored in header.shards
        if stored not in live_shards(manifest, row, header)
    )
    store = builder.repository.store
    content = bytearray(store.read(row.key, limit_bytes=1 << 20))
    content[position + length // 2] ^= 1
    store.delete(row.key)
    store.put(row.key, [memoryview(content)])

    report = verify_checkpoint(builder.repository, manifest.name, read_data_fraction=1.0)

    assert [finding.key for finding in report.findings] == [row.key]
    test_recovery_reads_of_every_expert_the_version_that_the_manifest_declares(builder, 40, 2)


def test_a_difference_is_what_was_written_between(builder: RepositoryBuilder) -> None:
    sides = [open_side(builder.repository, _manifest(builder, step)) for step in (40, 50)]

    diff = read_differences(compare_checkpoints(*sides), *sides)

    written = {(expert.layer, expert.index) for expert in builder.turn(50)}
    assert diff.shared_objects == 5
    assert sum(tensor.elements for tensor in diff.tensors) == _elements()
    for tensor in diff.tensors:
        is_equal = tensor.expert is not None and tensor.expert not in written
        assert tensor.verdict == (EQUAL if is_equal else DIFFERENT), tensor


@pytest.mark.parametrize("step", STEPS)
def test_a_checkpoint_that_is_taken_out_has_all_its_objects(builder: RepositoryBuilder, step: int) -> None:
    manifest, target = _manifest(builder, step), Repository(MemoryStore())

    report = extract(builder.repository, manifest.name, target)

    assert report.expert_steps == {
        layer: tuple(manifest.version(Expert(layer=layer, index=index))[1] for index in range(SMALL.experts))
        for layer in range(SMALL.moe_layers)
    }
    found = verify_repository(target, read_data_fraction=1.0)
    assert (found.all_findings, found.notes) == ((), ())
    assert {entry.key for entry in target.objects()} == {row.key for row in manifest.objects}

    # A job goes on from it: the next checkpoint shares what it names.
    copy = RepositoryBuilder(target.store, model=builder.model)
    name = manifest.name
    parent = Parent(incarnation=name.incarnation, step=name.step, attempt=name.attempt)
    copy.begin(9, parent=parent)
    copy.commit(9, 60, parent=parent, base=manifest, written=copy.turn(60))
    _retention(copy, 9, keep_last=1).after_commit()
    found = verify_repository(target, read_data_fraction=1.0)
    assert (found.all_findings, len(found.checkpoints)) == ((), 1)


def test_experts_of_an_abandoned_future_are_found(builder: RepositoryBuilder) -> None:
    """A third life forks at step 20 of the first and yet takes experts that were written at step 30."""
    wrong = _manifest(builder, 30)
    parent = Parent(incarnation=1, step=20, attempt=builder.name(1, 20).attempt)
    builder.begin(3, parent=parent)
    builder.model = SMALL
    builder.commit(3, 60, parent=parent, base=wrong, written={})
    builder.commit(3, 70, parent=parent, base=_manifest(builder, 20), written={})

    report = verify_repository(builder.repository)

    (finding,) = report.all_findings
    assert finding.key == manifest_key(builder.name(3, 60))
    assert f"did not lead to this one: name={builder.name(3, 60)} source={builder.name(1, 30)}" in str(finding)


def test_retention_keeps_what_a_later_checkpoint_shares_and_drops_the_rest(builder: RepositoryBuilder) -> None:
    stored = _keys(builder)
    newest = _manifest(builder, 50)
    retention = _retention(builder, 2, keep_last=1)

    assert len(retention.after_commit()) == 4
    for step in (60, 70, 80):
        newest = builder.commit(2, step, base=newest, written=builder.turn(step))
        retention.after_commit()

    report = verify_repository(builder.repository, read_data_fraction=1.0)
    assert (report.all_findings, len(report.checkpoints)) == ((), 1)
    named = {row.key for row in newest.objects}
    left = _keys(builder) - named
    assert left == set(builder.repository.read_victims(builder.run, 2))
    assert {parse_object_key(key)[0].step for key in named & stored} == {50}, "every expert's turn has come since"


@pytest.mark.parametrize("is_condemned", [False, True])
def test_retention_keeps_what_a_manifest_may_name_that_cannot_be_read(
    builder: RepositoryBuilder, is_condemned: bool
) -> None:
    """Step 40 cannot be read for a while; nothing else names the experts that it has from step 20."""
    store, manifest = builder.repository.store, _manifest(builder, 40)
    key = manifest_key(manifest.name)
    content = bytearray(store.read(key, limit_bytes=1 << 20))
    retention = _retention(builder, 2, keep_last=1)
    if is_condemned:  # by a round that died before it had dropped all whose objects it condemned, 40 too
        builder.repository.put_victims(builder.run, 2, sorted({row.key for row in manifest.objects}))
        for step in (10, 20, 30, 50):
            builder.repository.delete_manifest(_manifest(builder, step).name)
    _replace(store, key, content[:-9] + b"0" + content[-8:])
    builder.model = SMALL
    for step in (60, 70, 80):
        builder.commit(2, step)
        retention.after_commit()

    _replace(store, key, content)

    assert manifest.name in {stored.name for stored in builder.repository.checkpoints()}
    assert verify_checkpoint(builder.repository, manifest.name, read_data_fraction=1.0).is_sound
    if is_condemned:
        return
    # It shares them again, and no list forbids it.
    again = builder.commit(2, 90, base=manifest, written={})
    builder.repository.delete_manifest(again.name)
    commit(builder.repository, again, trace=Trace())


def test_a_collection_keeps_what_a_checkpoint_on_the_lineage_shares(builder: RepositoryBuilder) -> None:
    """A third life forks at step 40; step 50 goes, and of its objects nothing is shared."""
    parent = Parent(incarnation=2, step=40, attempt=builder.name(2, 40).attempt)
    builder.begin(3, parent=parent)
    builder.commit(3, 60, parent=parent, base=_manifest(builder, 40), written=builder.turn(60))
    for step in (10, 20, 30):
        builder.repository.delete_manifest(builder.name(1, step))

    report = collect(
        builder.repository,
        with_off_lineage=True,
        settle_s=0.0,
        host=SystemHost(),
        trace=Trace(),
        on_wait=lambda _seconds: None,
    )

    assert report.dropped == (builder.name(2, 50),)
    found = verify_repository(builder.repository, read_data_fraction=1.0)
    assert (found.all_findings, found.notes) == ((), ())
    assert [checkpoint.name.step for checkpoint in found.checkpoints] == [40, 60]
    assert {parse_object_key(entry.key)[0].step for entry in report.objects} == {10, 20, 30, 50}


def test_a_commit_that_shares_a_condemned_object_fails(builder: RepositoryBuilder) -> None:
    manifest = builder.commit(2, 60, base=_manifest(builder, 50), written={})
    builder.repository.delete_manifest(manifest.name)
    shared = next(row.key for row in manifest.objects if parse_object_key(row.key)[0].step == 20)
    builder.repository.put_victims(builder.run, 2, [shared])

    with pytest.raises(PlanDivergedError, match=shared):
        commit(builder.repository, manifest, trace=Trace())


def test_a_rotten_victim_list_stops_no_commit_that_shares(builder: RepositoryBuilder) -> None:
    manifest = builder.commit(2, 60, base=_manifest(builder, 50), written={})
    builder.repository.delete_manifest(manifest.name)
    _replace(builder.repository.store, victims_key(builder.run, 2), b"rotten")

    commit(builder.repository, manifest, trace=Trace())

    assert builder.repository.read_manifest(manifest.name) == manifest


def _elements() -> int:
    return sum(shard.length for catalog in SMALL.catalogs() for shard in catalog.shards)


def _retention(builder: RepositoryBuilder, incarnation: int, *, keep_last: int) -> Retention:
    return Retention(
        builder.repository, run=builder.run, incarnation=incarnation, keep_last=keep_last, keep_every=0, trace=Trace()
    )


def _keys(builder: RepositoryBuilder) -> set[str]:
    return {entry.key for entry in builder.repository.objects()}


def _replace(store: MemoryStore, key: str, content: bytes | bytearray) -> None:
    store.delete(key)
    store.put(key, [memoryview(content)])
