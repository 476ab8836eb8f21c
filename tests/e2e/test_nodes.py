"""A real job on two "nodes" (two runtime roots, two agents): killed, and a node lost, it equals the undisturbed one."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.e2e.launch import Job, Life, Zygote
from tests.e2e.matrix import Case

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
    common["has_frozen"] = False  # frozen tensors are needed everywhere, and memory of other nodes is not read
    with Job(zygote, tmp_path) as job:
        first = job.start("first", ranks, {**common, "steps": ENDLESS, "seed": 1})
        seen = first.event("step", step=6, committed=PERSIST_EVERY)["step"]
        first.signal(signal.SIGKILL, ranks - 1)  # of node 1; the others hang in a collective or notice

        second = job.start("second", ranks, {**common, "steps": ENDLESS, "seed": 2})
        attached = second.event("attached")
        assert attached["source"] == "memory", second.story()
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


def _check_rank(plain: Life, lives: Sequence[Life], rank: int) -> None:
    """Compare the surviving lineage of one rank with the undisturbed run."""
    lineage = lives[0].events(rank, "step")
    for life in lives[1:]:
        resumed = life.event("attached", rank)["step"]
        lineage = [event for event in lineage if event["step"] <= resumed] + life.events(rank, "step")
    expected = plain.events(rank, "step")
    assert [event["step"] for event in lineage] == list(range(1, len(expected) + 1))
    for ours, theirs in zip(lineage, expected, strict=True):
        assert (ours["ids"], ours["losses"]) == (theirs["ids"], theirs["losses"]), f"rank={rank} step={theirs['step']}"
    assert lives[-1].event("final", rank)["digests"] == plain.event("final", rank)["digests"]
