"""Advice from a real job's own measurements: in the agent's log, now and then, and in `moc status`."""

from __future__ import annotations

from moc.agent.runtime import LOG_NAME
from tests.cli.console import moc
from tests.support.job import Job

STEP_S = 0.01


def test_a_job_is_advised_from_what_it_has_measured() -> None:
    with Job(size=2, persist_every=3, step_s=STEP_S, keep_last=2) as job:
        life = job.start()
        life.event("committed", step=3)
        life.until(lambda: job.ask_agent("status")[0]["advice"], "advice")
        life.event("committed", step=40)
        advice = job.ask_agent("status")[0]["advice"]
        life.kill()

        assert advice["experts"] == 4
        assert advice["present"] == {"k_snapshot": 4, "k_persist": 4, "snapshot_every": 1, "persist_every": 3}
        assert advice["pass_s"] >= STEP_S
        assert advice["full_copy_s"] > 0
        assert advice["storage_rate"] > 0
        assert advice["faults"] == 1
        assert advice["steps"] > 3

        shown = moc("status", "--runtime-root", job.root).stdout
        assert "advice" in shown
        assert f"K_snapshot {advice['advised']['k_snapshot']} of 4" in shown

        log = (job.runtime / LOG_NAME).read_text()
        lines = [line for line in log.splitlines() if " advice after" in line]
        assert 1 <= len(lines) <= 1 + job.ask_agent("status")[0]["counters"]["saves"] // 10, lines
        assert all("eq. 10" in line and "eq. 4, 16" in line for line in lines)
        again = job.start()
        again.event("global", step=life.newest_step("committed"))
        assert "advice by the former life" in (job.runtime / LOG_NAME).read_text()
        again.kill()
