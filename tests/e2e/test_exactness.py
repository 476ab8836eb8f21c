"""A job that was killed and recovered equals the undisturbed job bit for bit: losses, samples, and all final state."""

from __future__ import annotations

import random
import signal
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.e2e.launch import Event, Job, Life
from tests.e2e.matrix import CASES, QUICK, Case, admissible_pairs, pairs_of
from tests.support.zygote import Zygote

pytestmark = [pytest.mark.world, pytest.mark.timeout(600)]

STEPS, FURTHER_STEPS = 60, 50  # the last step at least, and how many are compared after the recovery at least
ENDLESS = 100_000
FIRST_KILL, LAST_KILL = 8, 16
PERSIST_EVERY = 4
STEPS_LOST = 6  # a snapshot may be skipped where the machine is busy, some in a row hardly
LONGEST_DELAY_S = 0.08  # more than a step takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """When ranks die: `delay_s` after a step's line was seen, which is any moment of that step or the next ones."""

    step: int
    delay_s: float
    ranks: tuple[int, ...]


def planned_kill(case: Case) -> Kill:
    """Return the moment, drawn from the case's name."""
    chance = random.Random(zlib.crc32(case.name.encode()))
    step, delay_s = chance.randint(FIRST_KILL, LAST_KILL), chance.uniform(0, LONGEST_DELAY_S)
    ranks = tuple(range(case.ranks)) if case.killed == "all" else (chance.randrange(case.ranks),)
    return Kill(step=step, delay_s=delay_s, ranks=ranks)


def test_combinations_cover_every_admissible_pair() -> None:
    covered = set().union(*(pairs_of(asdict(case)) for case in CASES))

    assert covered == admissible_pairs()
    assert len(CASES) >= 10
    assert set(QUICK) <= set(CASES)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_killed_and_recovered_job_equals_the_undisturbed(
    case: Case, zygote: Zygote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill = planned_kill(case)
    with Job(zygote, tmp_path) as job:
        common = {"case": asdict(case), "persist_every": PERSIST_EVERY, "is_attached": True}
        first = job.start("first", case.ranks, {**common, "steps": ENDLESS, "seed": 1})
        awaited = PERSIST_EVERY if case.source == "storage" else 0
        begun = first.event("step", step=kill.step, committed=awaited)

        disturb(job, first, kill, case)
        second = job.start("second", case.ranks, {**common, "steps": STEPS, "further": FURTHER_STEPS, "seed": 99})
        attached = second.event("attached")
        first.ended(deadline_s=10.0)  # survivors are gone before the next life chooses
        last_step = attached["last_step"]
        plain = job.start("plain", case.ranks, {**common, "is_attached": False, "steps": last_step, "seed": 1})
        second.finished()
        plain.finished()

        seen = first.events(0, "step")[-1]["step"]
        check_recovery(case, attached, seen=seen, committed=begun["committed"])
        for rank in range(case.ranks):
            check_rank(case, plain, (first, second), rank, attached["step"])
    with capsys.disabled():
        ranks = ",".join(map(str, kill.ranks))
        killed = f"killed={ranks} in step {seen} ({1e3 * kill.delay_s:.0f} ms after {begun['step']} began)"
        print(
            f"\n{case.name:76} {killed:42} recovered={attached['step']} from {attached['source']} "
            f"compared={last_step - attached['step']} equal"
        )


def disturb(job: Job, life: Life, kill: Kill, case: Case) -> None:
    """Kill ranks, and for a recovery from storage the agent and thereby the memory."""
    job_agent = job.agent_pid()
    assert job_agent is not None, life.story()
    life.zygote.wait(kill.delay_s)
    life.signal(signal.SIGKILL, *kill.ranks)
    if case.source == "memory":
        return  # survivors hang in a collective or have noticed: the next life has to cope with them
    job.kill_agents()
    life.ended()  # survivors hold the memory too, and their leader would start another agent
    job.kill_agents()


def check_recovery(case: Case, attached: Event, *, seen: int, committed: int | None) -> None:
    assert attached["source"] == case.source, attached
    assert not attached["rejected"], attached
    if case.source == "memory":
        assert attached["step"] >= seen - STEPS_LOST, f"more was lost than must be: {seen=} {attached}"
    else:
        assert committed is not None
        # On a busy machine a save that a rank has missed is made up for at a step that is no multiple of PERSIST_EVERY.
        assert attached["step"] >= committed, f"an announced commit was not recovered: {committed=} {attached}"


def check_rank(case: Case, plain: Life, lives: tuple[Life, Life], rank: int, resumed: int) -> None:
    """Compare the surviving lineage of one rank with the undisturbed run."""
    expected = plain.events(rank, "step")
    lineage = [e for e in lives[0].events(rank, "step") if e["step"] <= resumed] + lives[1].events(rank, "step")
    assert [e["step"] for e in lineage] == list(range(1, len(expected) + 1))
    for ours, theirs in zip(lineage, expected, strict=True):
        assert ours["ids"] == theirs["ids"], f"samples differ: rank={rank} step={theirs['step']}"
        assert ours["losses"] == theirs["losses"], f"losses differ: rank={rank} step={theirs['step']}"
    ids = [index for event in lineage for index in event["ids"]]
    assert len(set(ids)) == len(ids)
    ours, theirs = lives[1].event("final", rank), plain.event("final", rank)
    differing = [name for name in theirs["digests"] if ours["digests"].get(name) != theirs["digests"][name]]
    assert not differing, f"final state differs: rank={rank} {differing}"
    assert ours["digests"].keys() == theirs["digests"].keys()
    assert ours["skipped"] == (2 if case.skips else 0)
    assert ours["boundary"] == ("manager.step()" if case.boundary == "step" else "hook")
