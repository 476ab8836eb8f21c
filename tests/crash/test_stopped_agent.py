"""An agent that is stopped (SIGSTOP, a frozen container, a machine that swaps): nobody waits for it without a limit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.job import Job, until

PATIENCE_S = 1


def _stop_agent(job: Job) -> int:
    """Stop the agent, wait until all its threads stand, and return its pid."""
    agent = job.agent_pid()
    assert agent is not None
    os.kill(agent, signal.SIGSTOP)

    def is_stopped() -> bool:
        stats = [path.read_text() for path in Path(f"/proc/{agent}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    until(is_stopped, "all threads of the agent stand")
    return agent


def test_training_goes_on_beside_a_stopped_agent_and_saves_go_on_after_it() -> None:
    with Job(size=2, step_s=0.002, timeout_s=5) as job:
        life = job.start()
        life.event("committed", step=5)
        agent = _stop_agent(job)
        stopped_at = life.newest_step("step")
        life.event("step", step=stopped_at + 20)
        announced = life.newest_step("committed")
        life.event("step", step=stopped_at + 200)
        assert life.newest_step("committed") == announced

        os.kill(agent, signal.SIGCONT)
        back_at = life.newest_step("step")
        life.event("committed", step=back_at + 1)
        assert job.agent_pid() == agent, "stopped is not dead: nobody has replaced it"
        life.signal(signal.SIGTERM)
        life.finished()
        life.exact()
        job.sound()


@pytest.mark.slow
def test_a_save_that_a_stopped_agent_does_not_make_fails_in_time_and_training_goes_on() -> None:
    with Job(size=1, step_s=0.002, timeout_s=PATIENCE_S, save_at=30, wait_s=PATIENCE_S) as job:
        life = job.start()
        life.event("global", step=5)
        agent = _stop_agent(job)
        failed = life.event("save_failed", step=30)
        life.event("step", step=failed["step"] + 50)
        os.kill(agent, signal.SIGCONT)
        life.event("global", step=failed["step"] + 50)


def test_attach_says_that_a_stopped_agent_does_not_answer() -> None:
    with Job(size=2, timeout_s=PATIENCE_S) as job:
        first = job.start()
        first.event("global", step=5)
        first.kill()
        agent = _stop_agent(job)
        agent_folder, before, began_s = job.runtime, job.listing(), time.monotonic()

        words = job.start().refused("WaitTimeoutError")

        assert "agent did not answer in time" in words
        assert f"timeout_s={PATIENCE_S}" in words
        assert str(agent_folder) in words, "whoever reads it must be able to find the agent"
        assert time.monotonic() - began_s < 30 * PATIENCE_S
        assert job.listing() == before

        os.kill(agent, signal.SIGCONT)
        again = job.start(steps=first.newest_step("step") + 3)
        assert again.attached()["step"] >= first.newest_step("global")
        again.finished()
