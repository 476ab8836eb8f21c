"""Memory that is limited by a real cgroup: foreseen where it can be, survived where the kernel kills."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from moc.agent.room import RESERVE_BYTES
from tests.support.cgroup import MemoryCgroup
from tests.support.job import Job, start_agent, wait_killed

MIB = 1 << 20
ROOM_BYTES = 48 * MIB  # more than a life needs beside its arena, less than a second arena may take
SCALE = 30  # an arena of 63 MB
RUN = "limited"
HOG = """
import os, select, sys
agent = os.pidfd_open(int(sys.argv[2]))
with open(f"/proc/{sys.argv[2]}/oom_score_adj", "w") as score:
    score.write("1000")  # it is the one to take
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
poll = select.poll()
poll.register(agent, select.POLLIN)
held = []
while not poll.poll(2):
    held.append(bytearray(os.urandom(1 << 20)))
"""


@pytest.fixture
def cgroup(request: pytest.FixtureRequest) -> Iterator[MemoryCgroup]:
    with MemoryCgroup(f"{abs(hash(request.node.name)):x}") as made:
        yield made


def test_an_arena_that_does_not_fit_into_the_cgroup_is_refused_before_anything_is_written(cgroup: MemoryCgroup) -> None:
    cgroup.limit(RESERVE_BYTES)
    with Job(size=2, cgroup=cgroup.folder) as job:
        words = job.start().refused("UsageError")

        assert "arena_bytes=" in words
        assert f"={RESERVE_BYTES}" in words, "the limit that counts is named"
        assert cgroup.folder.name in words
        assert not job.repository().incarnation_numbers()
        assert cgroup.oom_kills() == 0
        assert job.agent_pid() is not None, "the agent is there for the next attempt"

        cgroup.limit(2 * RESERVE_BYTES)
        job.start(steps=5).finished()


def test_a_limit_lowered_while_running_is_met_by_the_same_arena_and_refuses_a_second_one(cgroup: MemoryCgroup) -> None:
    cgroup.limit(4 * RESERVE_BYTES)
    with Job(size=2, cgroup=cgroup.folder, scale=SCALE, versions=3) as job:
        first = job.start()
        first.event("committed", step=5)
        cgroup.limit(cgroup.used_bytes() + ROOM_BYTES)
        lowered_at = first.newest_step("step")
        first.event("committed", step=lowered_at + 5)
        first.kill()
        known = first.newest_step("global")

        # Another number of ranks needs another arena, beside the one that is recovered from.
        words = job.start(size=1).refused("UsageError")
        assert "held for the earlier life" in words
        assert "arena_bytes=" in words
        assert cgroup.oom_kills() == 0
        assert [number for _, number in job.repository().incarnation_numbers()] == [1]

        again = job.start()
        attached = again.event("attached")
        assert (attached["source"], attached["step"] >= known) == ("memory", True)
        again.event("committed", step=attached["step"] + 5)
        again.kill()

        cgroup.limit(4 * RESERVE_BYTES)
        other = job.start(size=1)
        attached = other.event("attached")
        assert (attached["source"], attached["step"] >= again.newest_step("global")) == ("memory", True)
        other.event("committed", step=attached["step"] + 5)
        other.signal(signal.SIGTERM)
        other.finished()


def test_the_out_of_memory_killer_takes_the_agent_and_saves_go_on_with_another(cgroup: MemoryCgroup) -> None:
    with Job(size=2, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN)
        cgroup.add(agent.pid)
        life = job.start()
        committed = life.event("committed", step=5)["step"]
        cgroup.limit(cgroup.used_bytes() + 32 * MIB)

        hog = subprocess.Popen([sys.executable, "-c", HOG, str(cgroup.folder), str(agent.pid)])
        try:
            wait_killed(agent, life)
        finally:
            hog.kill()
            hog.wait()
        assert cgroup.oom_kills() >= 1
        at_kill = life.newest_step("step")
        life.event("committed", step=max(committed, at_kill) + 1)
        life.kill()

        second = job.start(steps=life.newest_step("step") + 3)
        attached = second.attached()
        assert (attached["source"], attached["step"] >= life.newest_step("global")) == ("memory", True)
        second.finished()
        life.exact()
        second.exact()
        job.sound()
