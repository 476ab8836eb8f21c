"""Two first starts of a job at once: at most one trains, the other is refused with words, and nothing is harmed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.job import Job, Life

SURVEYED = "attach.survey:end:1:SIGSTOP"


def _wait_stopped(life: Life) -> None:
    def is_stopped() -> bool:
        return Path(f"/proc/{life.pid(0)}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    life.until(is_stopped, "rank 0 has stopped after its survey")


@pytest.mark.parametrize(("run_id", "error"), [("race", "FencedError"), (None, "MismatchError")])
def test_a_start_that_has_looked_before_another_has_begun_is_refused(run_id: str | None, error: str) -> None:
    options = {"step_s": 0.002, "persist_every": 5, "run_id": run_id}
    with Job(size=2, **options) as job, Job(size=2, root=job.root, storage=job.storage, **options) as other:
        late = other.start(kill={0: SURVEYED})  # it has found an empty repository
        _wait_stopped(late)
        first = job.start()
        announced = first.event("committed", step=5)["step"]

        late.signal(signal.SIGCONT, 0)

        words = late.refused(error)
        assert "race" in words or first.last(0, "attached")["run"] in words, words
        first.event("committed", step=announced + 5)
        assert len(job.repository().incarnation_numbers()) == 1
        first.kill()
        first.exact()
        second = job.start(steps=first.newest_step("step") + 3, run_id=first.last(0, "attached")["run"])
        assert second.attached()["step"] >= first.newest_step("global")
        second.finished()
        job.sound()
