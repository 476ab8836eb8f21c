"""Partial saves as the persist thread makes them, over a real arena and a model of an object store."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import pytest

from moc._native import crc32c
from moc.agent.jobs import Outcome, SaveJob
from moc.agent.persister import Persister
from moc.config import Config
from moc.format.keys import manifest_key, parse_object_key
from moc.format.manifest import Incarnation, Manifest, Parent, encode_lineage
from moc.format.tagged import encode_state
from moc.plan.layout import arrange_arena
from moc.repository import Repository
from moc.routing import KEPT, Capture, Routing
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import PERSIST, SealRecord
from moc.state import Expert, Shard, catalog_digest, check_coverage
from moc.trace import Trace
from moc.verify import verify_repository
from tests.enumeration.serial import SerialHost
from tests.support.faulty_store import Bucket, FaultyStore
from tests.support.plain import PlainState

LAYERS, VERSIONS = 2, 2
FIRST = Incarnation(run="run-7", number=1, token="1" * 8, parent=None, reason="start", fingerprint={"model": "plain"})


class Bench:
    """A job in this process: its state, its arena, the store, and the persist thread of its agent."""

    def __init__(
        self,
        *,
        experts: int,
        size: int = 2,
        expert_elements: int = 5,
        mode: str = "partial",
        k: int | None = 1,
        cuts: Sequence[tuple[Shard, ...]] | None = None,
        rotation: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """With an odd number of ranks every expert has a slice on each of them. `cuts` are the shards of each rank of a
        model that is cut otherwise, and `rotation` is what the descriptor says of its experts' order.
        """
        self.states = [
            PlainState(
                rank,
                size,
                layers=LAYERS,
                experts=experts,
                dense_elements=37,
                expert_elements=expert_elements,
                cut=None if cuts is None else cuts[rank],
            )
            for rank in range(size)
        ]
        self.experts = [Expert(layer=layer, index=index) for layer in range(LAYERS) for index in range(experts)]
        catalogs = tuple(state.catalog for state in self.states)
        self.config = asdict(Config(persist_every=1)) | {"mode": mode, "k_persist": k}
        self.facts = {
            "versions": VERSIONS,
            "catalogs": [catalog.to_json() for catalog in catalogs],
            "digest": catalog_digest(catalogs),
            "tensors": check_coverage(shard for catalog in catalogs for shard in catalog.shards),
            "topology": {
                "world_size": size,
                "node_of_rank": [0] * size,
                "ep_sizes": [["ep_size_2", 2]] * (size % 2 == 0),
            },
            "fingerprint": FIRST.fingerprint,
            "software": {"moc": "0"},
            "storage": "memory",
            "keep_last": 1,
            "keep_every": 0,
            "lineage": [],
            **({} if rotation is None else {"rotation": rotation}),
        }
        layout = arrange_arena(catalogs, versions=VERSIONS, descriptor_bytes=descriptor_room(self.facts))
        self.arena = Arena.create(self.facts, layout, name="bench")
        self.bucket = Bucket()
        self.store = FaultyStore(self.bucket)
        self.repository = Repository(self.store)
        self.repository.create()
        self.lives = [FIRST]
        self.repository.put_incarnation(FIRST)
        self.routing: Routing | None = None
        self.start_agent()

    def start_agent(self) -> None:
        """Let another agent take over; what the one before knew is gone."""
        self.outcomes: list[Outcome] = []
        self.host = SerialHost(lambda: FaultyStore(self.bucket))
        self.persister = Persister(
            on_end=lambda _, outcomes: self.outcomes.extend(outcomes), host=self.host, trace=Trace()
        )

    def begin(self, parent: Parent | None, *, reason: str = "recover") -> None:
        """Begin the next life."""
        number = self.lives[-1].number + 1
        record = replace(FIRST, number=number, token=f"{number}" * 8, parent=parent, reason=reason)
        self.lives.append(record)
        self.repository.put_incarnation(record)

    def advance(self) -> int:
        for state in self.states:
            state.advance()
        return self.states[0].step

    def seals(self, *, attempt: str = "00000000", older: Mapping[tuple[int, Expert], int] = {}) -> list[SealRecord]:
        """Copy the present state into the slots of its step; `older` are steps that ranks claim for experts instead."""
        return [self._seal(state, attempt, older) for state in self.states]

    def _seal(self, state: PlainState, attempt: str, older: Mapping[tuple[int, Expert], int]) -> SealRecord:
        units = self.arena.rank_layout(state.rank).units
        slots = array("I", [state.step % VERSIONS] * len(units))
        offsets = self.arena.shard_offsets(state.rank, slots)
        crcs = array("I", bytes(4 * len(offsets)))
        state.copy_shards(array("Q", (self.arena.address + offset for offset in offsets)), crcs)
        steps = [
            older.get((state.rank, unit.expert), state.step) if unit.expert is not None else state.step
            for unit in units
        ]
        tree = state.capture()
        if self.routing is not None:
            capture = Capture(
                routing=self.routing,
                captured=self.routing.learned,
                steps=tuple((state.step,) * n for n in self.routing.shape),
            )
            tree["routing"] = capture.to_tree()
        blob = encode_state(tree).to_bytes()
        with self.arena.view(self.arena.state_offset(state.rank, slots), len(blob)) as view:
            view[:] = blob
        return SealRecord(
            run=FIRST.run,
            incarnation=self.lives[-1].number,
            step=state.step,
            rank=state.rank,
            flags=PERSIST,
            attempt=attempt,
            digest=str(self.facts["digest"]),
            state_bytes=len(blob),
            state_crc32c=crc32c(blob),
            slots=slots,
            steps=array("Q", steps),
            crcs=crcs,
        )

    def offer(self, records: list[SealRecord], *, is_whole: bool = False) -> Outcome:
        descriptor = self.facts | {"config": self.config, "lineage": encode_lineage(self.lives)}
        job = SaveJob(
            arena=self.arena,
            records={record.rank: record for record in records},
            life=self.lives[-1],
            descriptor=descriptor,
            pinned=None,
            is_whole=is_whole,
        )
        self.outcomes.clear()
        assert self.persister.offer(job)
        self.host.work()
        (outcome,) = self.outcomes
        return outcome

    def save(self, *, is_whole: bool = False) -> Manifest:
        """Do a step and commit it; fails if it is not committed, or anything in the repository is not sound."""
        self.advance()
        outcome = self.offer(self.seals(), is_whole=is_whole)
        assert outcome.error is None, outcome.error
        self.sound()
        return self.repository.read_manifest(outcome.name)

    def sound(self) -> None:
        findings = verify_repository(self.repository, read_data_fraction=1.0).all_findings
        assert not findings, [str(finding) for finding in findings]

    def written(self, manifest: Manifest) -> list[Expert]:
        return [expert for expert in self.experts if manifest.version(expert)[0] == manifest.name]

    def close(self) -> None:
        self.arena.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(experts=4)
    yield made
    made.close()


def per_layer(bench: Bench, manifest: Manifest) -> list[int]:
    """Return how many experts of each layer a checkpoint has written."""
    written = bench.written(manifest)
    return [sum(expert.layer == layer for expert in written) for layer in range(LAYERS)]


def owners(manifest: Manifest) -> list[int]:
    """Return the steps of the attempts that a checkpoint has objects of."""
    return sorted({parse_object_key(row.key)[0].step for row in manifest.objects})


def test_the_first_checkpoint_is_whole_and_every_expert_is_written_in_turn(bench: Bench) -> None:
    manifests = [bench.save() for _ in range(9)]

    assert [per_layer(bench, manifest) for manifest in manifests] == [[4, 4]] + [[1, 1]] * 8
    for turn in (manifests[1:5], manifests[5:9]):
        assert sorted(expert for manifest in turn for expert in bench.written(manifest)) == bench.experts
    assert owners(manifests[4]) == [2, 3, 4, 5], "nothing of the first one is needed any more"
    assert [stored.name for stored in bench.repository.checkpoints()] == [manifests[-1].name]


def test_after_a_turn_the_repository_is_hardly_larger_than_one_full_checkpoint() -> None:
    bench = Bench(experts=16, expert_elements=40_000)
    full = bench.save()
    for _ in range(17):  # after the 16th the first one's objects are condemned, after the next they are gone
        newest = bench.save()

    stored = sum(entry.size_bytes for entry in bench.repository.objects())
    condemned = set(bench.repository.read_victims(FIRST.run, 1))
    dead = sum(entry.size_bytes for entry in bench.repository.objects() if entry.key in condemned)
    assert len(owners(newest)) == 16
    assert newest.size_bytes <= 1.1 * full.size_bytes, (newest.size_bytes, full.size_bytes)
    assert stored - dead == newest.size_bytes, "nothing else is kept"
    assert stored <= 1.1 * full.size_bytes, (stored, full.size_bytes)
    written = sum(row.size_bytes for row in newest.objects if parse_object_key(row.key)[0] == newest.name)
    assert written <= 0.1 * full.size_bytes, (written, full.size_bytes)
    bench.close()


def test_a_save_that_failed_advances_nothing(bench: Bench) -> None:
    bench.save()
    turn = []
    for _ in range(4):
        bench.advance()
        records = bench.seals()
        with bench.arena.view(bench.arena.state_offset(0, records[0].slots), 1) as byte:
            byte[0] ^= 1
        assert "ShardCorruptError" in str(bench.offer(records).error)
        turn.append(bench.save())

    assert sorted(expert for manifest in turn for expert in bench.written(manifest)) == bench.experts


def test_a_new_agent_goes_on_with_the_turn(bench: Bench) -> None:
    bench.save()
    turn = []
    for _ in range(4):
        bench.start_agent()
        turn.append(bench.save())

    assert sorted(expert for manifest in turn for expert in bench.written(manifest)) == bench.experts


def test_the_next_life_shares_experts_with_the_one_it_grew_from(bench: Bench) -> None:
    bench.save()
    second = bench.save()
    bench.start_agent()
    bench.begin(Parent(incarnation=1, step=second.name.step, attempt=second.name.attempt))

    third = bench.save()

    assert per_layer(bench, third) == [1, 1]
    assert owners(third) == [1, 2, 3]
    assert not set(bench.written(third)) & set(bench.written(second))


def test_a_life_that_goes_back_shares_nothing_with_what_it_has_given_up(bench: Bench) -> None:
    bench.facts["keep_last"] = 9
    bench.save()
    second = bench.save()
    bench.save()
    bench.start_agent()
    bench.begin(Parent(incarnation=1, step=second.name.step, attempt=second.name.attempt), reason="rewind")

    forth = bench.save()

    assert owners(forth) == [1, 2, 4]


def test_a_rewind_that_took_a_lifes_number_while_storage_was_away_is_followed(bench: Bench) -> None:
    bench.facts["keep_last"] = 9
    first = bench.save()
    second = bench.save()
    rewound = Parent(incarnation=1, step=first.name.step, attempt=first.name.attempt)
    bench.begin(rewound, reason="rewind")
    # Meanwhile a life of this number has gone on from memory, and its agent has seen nothing of the rewind.
    bench.lives[-1] = replace(
        bench.lives[-1], token="abcdef01", reason="recover", parent=Parent(incarnation=1, step=2, attempt=None)
    )
    bench.begin(Parent(incarnation=2, step=2, attempt=None))
    bench.start_agent()

    third = bench.save()

    assert owners(third) == [1, 3], "what the rewind has given up is no part of it"
    assert second.name.step == 2


def test_a_life_without_parent_begins_with_a_whole_checkpoint(bench: Bench) -> None:
    bench.save()
    bench.save()
    bench.begin(None, reason="load_checkpoint")

    third = bench.save()

    assert per_layer(bench, third) == [4, 4]
    assert third.stale_experts == ()
    assert per_layer(bench, bench.save()) == [1, 1]


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_base_that_cannot_be_read_makes_a_whole_checkpoint(
    bench: Bench, caplog: pytest.LogCaptureFixture, *, is_gone: bool
) -> None:
    bench.save()
    second = bench.save()
    bench.start_agent()
    key = manifest_key(second.name)
    content = bench.store.read(key, limit_bytes=1 << 20)
    bench.store.delete(key)
    if not is_gone:
        bench.store.put(key, [memoryview(content[:-9] + b"0" + content[-8:])])
    bench.advance()

    with caplog.at_level(logging.WARNING):
        outcome = bench.offer(bench.seals())

    assert outcome.error is None
    third = bench.repository.read_manifest(outcome.name)
    assert per_layer(bench, third) == [4, 4]
    assert ("made whole, because" in caplog.text) == (not is_gone), "one that is not listed is no base"
    forth = bench.advance()
    assert bench.offer(bench.seals()).name.step == forth
    assert bench.offer(bench.seals()).error is None, "once more is the same checkpoint"


def test_a_whole_save_writes_what_memory_has_newer_and_the_turn_goes_on(bench: Bench) -> None:
    bench.save()
    bench.save()

    third = bench.save(is_whole=True)

    assert per_layer(bench, third) == [4, 4]
    assert third.stale_experts == ()
    assert per_layer(bench, bench.save()) == [1, 1]


def test_an_expert_that_ranks_hold_at_different_steps_is_kept_and_the_next_one_has_its_turn() -> None:
    bench = Bench(experts=4, size=3)
    bench.save()
    bench.advance()
    torn, old = Expert(layer=0, index=0), Expert(layer=0, index=1)
    older = {(2, torn): 1} | {(rank, old): 1 for rank in range(3)}

    second = bench.repository.read_manifest(bench.offer(bench.seals(older=older)).name)

    assert [e.index for e in bench.written(second) if e.layer == 0] == [2]
    assert {second.version(expert)[1] for expert in (torn, old)} == {1}
    bench.sound()
    assert [e.index for e in bench.written(bench.save()) if e.layer == 0] == [3]
    assert [e.index for e in bench.written(bench.save()) if e.layer == 0] == [0]
    bench.close()


def test_a_torn_expert_that_no_checkpoint_has_fails_the_save() -> None:
    bench = Bench(experts=4, size=3)
    bench.advance()

    outcome = bench.offer(bench.seals(older={(2, Expert(layer=0, index=0)): 0}))

    assert "ranks hold an expert at different steps, and no earlier checkpoint has it" in str(outcome.error)
    assert bench.repository.objects() == [], "nothing was written for it"
    bench.save()
    bench.close()


def test_mode_full_refuses_a_snapshot_of_several_steps() -> None:
    bench = Bench(experts=2, mode="full", k=None)
    bench.save()
    bench.advance()

    outcome = bench.offer(bench.seals(older={(0, Expert(layer=1, index=0)): 1}))

    assert "a checkpoint of mode full would be of several steps" in str(outcome.error)
    bench.close()


def test_the_routes_of_a_snapshot_stand_in_its_manifest_and_decide_by_load(bench: Bench) -> None:
    bench.config["mode"] = "partial_by_load"
    bench.routing = _routes((9, 9, 9, 9), (9, 9, 9, 9))
    first = bench.save()
    bench.routing = _routes((10, 10, 99, 10), (10, 50, 10, 10))

    second = bench.save()

    assert first.routing == _routes((9, 9, 9, 9), (9, 9, 9, 9))
    assert second.routing == bench.routing
    assert bench.written(second) == [Expert(layer=0, index=2), Expert(layer=1, index=1)]
    assert {row.routed for row in second.stale_experts} == {9}


@pytest.mark.parametrize(("every", "is_from_storage", "written"), [(1, True, 1), (50, True, 4), (50, False, 1)])
def test_after_a_fault_k_grows_with_what_the_next_one_would_lose(
    bench: Bench, every: int, written: int, *, is_from_storage: bool
) -> None:
    """At step 2 a fault at K = 1 of 4 loses 1.5 intervals of the mean expert: with one step 75 %, with 50 all."""
    bench.config |= {"persist_every": every, "plt_limit": 0.9}
    bench.routing = Routing(basis=KEPT, routed=((9,) * 4,) * 2, learned=((8, 9, 9, 9), (9,) * 4))
    first = bench.save()
    attempt = first.name.attempt if is_from_storage else None
    bench.begin(Parent(incarnation=1, step=first.name.step, attempt=attempt))
    bench.start_agent()

    assert per_layer(bench, bench.save()) == [written] * LAYERS


def test_by_load_without_counts_experts_take_turns_and_the_log_says_so_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.config["mode"] = "partial_by_load"
    bench.save()
    with caplog.at_level(logging.WARNING):
        turn = [bench.save() for _ in range(4)]

    assert sorted(expert for manifest in turn for expert in bench.written(manifest)) == bench.experts
    assert caplog.text.count("nothing counts their tokens") == 1


def test_a_rotten_victim_list_does_not_end_the_saves_that_share(bench: Bench) -> None:
    bench.save()
    bench.save()
    (entry,) = bench.repository.victim_lists()
    bench.store.delete(entry.key)
    bench.store.put(entry.key, [memoryview(b"rotten")])

    third = bench.advance()
    outcome = bench.offer(bench.seals())

    assert outcome.error is None
    assert outcome.name.step == third
    assert bench.save().stale_experts


def _routes(*rows: tuple[int, ...]) -> Routing:
    return Routing(basis=KEPT, routed=rows, learned=rows)
