"""A real job on two "nodes" (two runtime roots, two agents): killed, and a node lost, it equals the undisturbed one."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from moc.repository import Repository
from moc.store.open import open_store
from moc.verify import verify_repository
from tests.e2e.launch import Event, Job, Life
from tests.e2e.matrix import Case
from tests.support.zygote import Zygote

pytestmark = [pytest.mark.world, pytest.mark.timeout(600)]

ENDLESS, PERSIST_EVERY, FURTHER_STEPS = 100_000, 4, 6


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_job_on_two_nodes_equals_the_undisturbed_after_a_kill_and_a_lost_node(
    ranks: int, zygote: Zygote, tmp_path: Path
) -> None:
    case = Case(
        model="native", zero="2", dtype="bf16", ranks=ranks, accumulation=1, optimizer="adamw", skips=False,
        boundary="step", killed="all", source="memory",
    )  # fmt: skip
    common = {"case": asdict(case), "persist_every": PERSIST_EVERY, "is_attached": True, "nodes": 2}
    with Job(zygote, tmp_path) as job:
        first = job.start("first", ranks, {**common, "steps": ENDLESS, "seed": 1})
        seen = first.event("step", step=6, committed=PERSIST_EVERY)["step"]
        first.signal(signal.SIGKILL, ranks - 1)  # of node 1; the others hang in a collective or notice

        second = job.start("second", ranks, {**common, "steps": ENDLESS, "seed": 2})
        attached = second.event("attached")
        # Every rank needs all of the frozen tensors, of which each has saved a share.
        assert attached["source"] == "peer memory", second.story()
        assert any("from the memory of other nodes" in note for note in attached["notes"]), attached["notes"]
        assert attached["step"] >= seen - 2
        assert not attached["rejected"]
        assert not [note for note in attached["notes"] if "bit-exact" in note], attached["notes"]
        committed = second.event("step", committed=attached["step"] + 1)["committed"]
        second.signal(signal.SIGKILL)
        second.ended()
        assert job.kill_agents(job.node(1)) == 1
        shutil.rmtree(job.node(1))

        last = job.start("last", ranks, {**common, "steps": 0, "further": FURTHER_STEPS, "seed": 3})
        attached = last.event("attached")
        assert attached["source"] == "storage", last.story()
        assert attached["step"] >= committed
        assert any("snapshot is incomplete" in note for note in attached["notes"]), attached["notes"]
        plain_spec = {**common, "is_attached": False, "steps": attached["last_step"], "seed": 1}
        plain = job.start("plain", ranks, plain_spec)
        last.finished()
        plain.finished()
        for rank in range(ranks):
            _check_rank(plain, [first, second, last], rank)


@pytest.mark.slow
def test_with_a_node_lost_in_a_partial_mode_the_experts_of_the_other_are_as_new_as_the_checkpoint(
    zygote: Zygote, tmp_path: Path
) -> None:
    case = Case(
        model="native", zero="2", dtype="bf16", ranks=2, accumulation=1, optimizer="adamw", skips=False,
        boundary="step", killed="all", source="storage",
    )  # fmt: skip
    common = {"case": asdict(case), "persist_every": PERSIST_EVERY, "is_attached": True, "nodes": 2, "is_watched": True}
    common |= {"config": {"mode": "partial", "k_persist": 1, "plt_limit": 1.0}}
    with Job(zygote, tmp_path) as job:
        first = job.start("first", 2, {**common, "steps": ENDLESS, "seed": 1})
        committed = first.event("step", committed=3 * PERSIST_EVERY)["committed"]
        first.signal(signal.SIGKILL, 1)
        assert job.kill_agents(job.node(1)) == 1
        shutil.rmtree(job.node(1))
        first.signal(signal.SIGKILL)
        first.ended()

        last = job.start("last", 2, {**common, "steps": 0, "further": FURTHER_STEPS, "seed": 2})
        attached = last.event("attached")
        step = attached["step"]
        assert attached["source"] == "storage", last.story()
        assert step >= committed
        rows = {index: (level, of) for index, level, of in attached["experts"]}
        # Each rank has two of the four experts, and one expert is written at a time.
        assert {of for _, of in (rows[0], rows[1])} == {step}, last.story()
        assert "memory" in {level for level, _ in (rows[0], rows[1])}
        assert {level for level, _ in (rows[2], rows[3])} == {"storage"}
        assert min(of for _, of in (rows[2], rows[3])) < step
        assert 0 < attached["plt"] < 1
        for rank in (0, 1):
            states = {event["step"]: event["digests"] for event in first.events(rank, "state")}
            _check_versions(last.event("attached", rank)["digests"], states, step, rank, rows)
        last.finished()


def _check_versions(
    actual: dict[str, str],
    states: dict[int, dict[str, str]],
    step: int,
    rank: int,
    rows: dict[int, tuple[str, int]],
) -> None:
    """Compare a rank's restored state with what it was: dense parts at one step, every expert at its own."""
    assert actual.keys() == states[step].keys()
    is_mixed = any(rows[2 * rank + local][1] < step for local in (0, 1))
    for name, digest in actual.items():
        kind, _, rest = name.partition(" ")
        local = rest.partition(".deepspeed_experts.")[2][:1] if kind == "module" else ""
        if is_mixed and kind in ("master", "exp_avg", "exp_avg_sq"):
            continue  # flat: a rank's experts are in one tensor, and here they are of several steps
        assert digest == states[rows[2 * rank + int(local)][1] if local else step][name], name


@pytest.mark.slow
def test_a_partial_job_on_two_nodes_is_exact_from_memory_and_goes_on_after_a_lost_node(
    zygote: Zygote, tmp_path: Path
) -> None:
    """Every node has a slice of every expert, and one of four experts has its turn at each commit."""
    ranks = 4
    case = Case(
        model="native", zero="2", dtype="bf16", ranks=ranks, accumulation=1, optimizer="adamw", skips=False,
        boundary="step", killed="all", source="memory",
    )  # fmt: skip
    common = {"case": asdict(case), "persist_every": 2, "is_attached": True, "nodes": 2}
    common["config"] = {"mode": "partial", "k_persist": 1, "keep_last": 6, "plt_limit": 1.0}
    with Job(zygote, tmp_path) as job:
        first = job.start("first", ranks, {**common, "steps": ENDLESS, "seed": 1})
        first.event("step", step=24, committed=20)
        first.signal(signal.SIGKILL, ranks - 1)

        second = job.start("second", ranks, {**common, "steps": ENDLESS, "seed": 2})
        attached = second.event("attached")
        assert attached["source"] == "peer memory", second.story()  # of frozen tensors each rank has a part
        assert not attached["rejected"]
        assert attached["plt"] == 0.0, "memory has all experts of its newest step"
        resumed = attached["step"]
        committed = second.event("step", step=resumed + 10, committed=resumed + 1)["committed"]
        second.signal(signal.SIGKILL)
        second.ended()
        assert job.kill_agents(job.node(1)) == 1
        shutil.rmtree(job.node(1))

        last = job.start("last", ranks, {**common, "steps": 0, "further": FURTHER_STEPS, "seed": 3})
        attached = last.event("attached")
        assert attached["source"] == "storage", last.story()
        assert attached["step"] >= committed
        seen = resumed + 8  # rank 0 was two steps further, so every rank has noted as many
        plain = job.start("plain", ranks, {**common, "is_attached": False, "steps": seen, "seed": 1})
        last.finished()
        plain.finished()
        for rank in range(ranks):
            expected = plain.events(rank, "step")
            _check_steps(_lineage([first, second], rank)[:seen], expected, rank)

        repository = Repository(open_store(str(job.storage)))
        assert not verify_repository(repository, read_data_fraction=1.0).all_findings
        manifests = [repository.read_manifest(stored.name) for stored in repository.checkpoints()]
        assert manifests[-1].name.step == attached["last_step"]
        assert manifests[-1].stale_experts == (), "a job that ends well has stored all of its last step"
        assert any(manifest.stale_experts for manifest in manifests[:-1])
        counts = [manifest.routing for manifest in manifests]
        assert all(routing is not None and sum(map(sum, routing.routed)) for routing in counts)
        repository.close()


def _lineage(lives: Sequence[Life], rank: int) -> list[Event]:
    """Return what a rank has seen at the steps that count in the end."""
    lineage = lives[0].events(rank, "step")
    for life in lives[1:]:
        resumed = life.event("attached", rank)["step"]
        lineage = [event for event in lineage if event["step"] <= resumed] + life.events(rank, "step")
    return lineage


def _check_steps(lineage: Sequence[Event], expected: Sequence[Event], rank: int) -> None:
    """Compare what a rank has seen with the undisturbed run."""
    assert [event["step"] for event in lineage] == list(range(1, len(expected) + 1))
    for ours, theirs in zip(lineage, expected, strict=True):
        assert (ours["ids"], ours["losses"]) == (theirs["ids"], theirs["losses"]), f"rank={rank} step={theirs['step']}"


def _check_rank(plain: Life, lives: Sequence[Life], rank: int) -> None:
    """Compare the surviving lineage of one rank with the undisturbed run."""
    _check_steps(_lineage(lives, rank), plain.events(rank, "step"), rank)
    assert lives[-1].event("final", rank)["digests"] == plain.event("final", rank)["digests"]
