"""A trainer that sits in the kernel, where SIGKILL does not reach it: its memory is not written by anybody else."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.support.disk import FailingDisk
from tests.support.job import Job, Life

pytestmark = pytest.mark.slow  # the agent waits 10 s for the end of a process that it has killed


def _state(life: Life, rank: int) -> str:
    return Path(f"/proc/{life.pid(rank)}/stat").read_text().rpartition(")")[2].split()[0]


def _arenas(life: Life, rank: int) -> set[str]:
    """Return the inodes of the arenas that a trainer maps."""
    return set(re.findall(r"(\d+)\s+/memfd:moc-", Path(f"/proc/{life.pid(rank)}/maps").read_text()))


def test_a_trainer_that_cannot_be_killed_keeps_its_arena_and_the_next_life_gets_another(disk: FailingDisk) -> None:
    with Job(size=2, step_s=0.002) as job:
        first = job.start(logs_in={1: disk.folder})
        first.event("global", step=10)
        disk.freeze()
        try:
            # Rank 1 writes its diary to the frozen disk, and rank 0 waits for it.
            first.until(lambda: _state(first, 1) == "D", "rank 1 waits in the kernel")
            first.kill(0)
            known = first.newest_step("global")

            second = job.start()
            attached = second.attached()
            assert (attached["source"], attached["step"] >= known) == ("memory", True)
            assert any("cannot be killed" in note and str(first.pid(1)) in note for note in attached["notes"]), attached
            assert first.processes[1].is_alive()
            held = _arenas(first, 1)
            assert held
            assert all(not held & _arenas(second, rank) for rank in range(2)), "nobody else writes where it may write"
            second.event("global", step=attached["step"] + 5)
        finally:
            disk.thaw()
        first.ended()
        assert first.processes[1].exitcode == -signal.SIGKILL
        second.event("committed", step=second.newest_step("step") + 5)
        second.kill()
        second.exact()

        third = job.start(steps=second.newest_step("step") + 3)
        assert third.attached()["step"] >= second.newest_step("global")
        third.finished()
        third.exact()
        job.sound()
