"""A real job that is killed many times, whoever it hits, equals the undisturbed job bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.e2e.launch import Event, Job, Life
from tests.e2e.matrix import Case
from tests.support.zygote import Zygote

pytestmark = [pytest.mark.world, pytest.mark.timeout(600)]

SEED = int(os.environ.get("MOC_CRASH_SEED", "20240607"))
VICTIMS = ("rank", "all", "agent", "both")
CASE = Case(
    model="native", zero="2", dtype="bf16", ranks=2, accumulation=1, optimizer="adamw", skips=False, boundary="step",
    killed="all", source="memory",
)  # fmt: skip
ENDLESS, LAST_STEPS = 100_000, 20
PERSIST_EVERY = 4
STEPS_OF_A_LIFE = 12  # at most, before it is killed
LONGEST_DELAY_S = 0.08  # more than a step takes


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 10])
def test_a_job_killed_many_times_equals_the_undisturbed(
    kills: int, zygote: Zygote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(SEED)
    with capsys.disabled():
        print(f" seed={SEED}", end="")
    common = {"case": asdict(CASE), "persist_every": PERSIST_EVERY, "is_attached": True}
    with Job(zygote, tmp_path) as job:
        lives: list[Life] = []
        promised = 0
        # Every kind once before one comes again.
        victims = [kind for _ in range(-(-kills // len(VICTIMS))) for kind in chance.sample(VICTIMS, len(VICTIMS))]
        for number, kind in enumerate(victims[:kills]):
            life = job.start(f"life{number}", CASE.ranks, {**common, "steps": ENDLESS, "seed": number + 1})
            attached = life.event("attached")
            assert attached["step"] >= promised, f"seed {SEED}: {promised} was promised\n{life.story()}"
            life.event("step", step=attached["step"] + chance.randint(1, STEPS_OF_A_LIFE))
            zygote.wait(chance.uniform(0, LONGEST_DELAY_S))
            promised = max(_kill(job, life, kind, chance), promised)
            lives.append(life)
        last = job.start("last", CASE.ranks, {**common, "steps": 0, "further": LAST_STEPS, "seed": 99})
        attached = last.event("attached")
        assert attached["step"] >= promised, f"seed {SEED}: {promised} was promised\n{last.story()}"
        plain_spec = {**common, "is_attached": False, "steps": attached["last_step"], "seed": 1}
        plain = job.start("plain", CASE.ranks, plain_spec)
        last.finished()
        plain.finished()
        for rank in range(CASE.ranks):
            _check_rank(plain, [*lives, last], rank)


def _kill(job: Job, life: Life, kind: str, chance: random.Random) -> int:
    """Kill, end the life, and return the newest step that had been announced as committed."""
    if kind in ("agent", "both"):
        assert job.kill_agents()
    if kind == "agent":  # training goes on, with another agent
        life.until(lambda: job.agent_pid() is not None, "another agent")
        life.event("step", step=_newest(life)["step"] + chance.randint(1, STEPS_OF_A_LIFE))
    life.signal(signal.SIGKILL, *([chance.randrange(CASE.ranks)] if kind == "rank" else []))
    if kind == "both":
        life.ended()
        job.kill_agents()  # one that a rank had just started
    return int(_newest(life)["committed"] or 0)


def _newest(life: Life) -> Event:
    return life.events(0, "step")[-1]


def _check_rank(plain: Life, lives: Sequence[Life], rank: int) -> None:
    """Compare the surviving lineage of one rank with the undisturbed run."""
    lineage: list[Event] = []
    for life in lives:
        resumed = life.event("attached", rank)["step"]
        lineage = [event for event in lineage if event["step"] <= resumed] + life.events(rank, "step")
    expected = plain.events(rank, "step")
    assert [event["step"] for event in lineage] == list(range(1, len(expected) + 1))
    for ours, theirs in zip(lineage, expected, strict=True):
        assert ours["ids"] == theirs["ids"], f"samples differ: rank={rank} step={theirs['step']} seed={SEED}"
        assert ours["losses"] == theirs["losses"], f"losses differ: rank={rank} step={theirs['step']} seed={SEED}"
    ids = [index for event in lineage for index in event["ids"]]
    assert len(set(ids)) == len(ids), f"a sample was used twice: rank={rank} seed={SEED}"
    assert lives[-1].event("final", rank)["digests"] == plain.event("final", rank)["digests"]
