"""An agent of another version: drained and replaced when its job has ended, left alone while its job trains."""

from __future__ import annotations

from pathlib import Path

import pytest

import moc
from tests.support.disk import FailingDisk
from tests.support.edition import make_edition
from tests.support.job import Job, start_agent

RUN = "versions"
OTHER = "0.0.999"


@pytest.fixture(scope="module")
def edition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_edition(tmp_path_factory.mktemp("edition"), version=OTHER)


def _version(job: Job) -> str:
    return str(job.ask_agent("status")[0]["version"])


def test_an_agent_of_another_version_is_drained_and_replaced_and_what_it_held_is_recovered(edition: Path) -> None:
    with Job(size=2, persist_every=0, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, edition=edition)
        first = job.start(edition=edition)
        first.event("global", step=10)
        assert _version(job) == OTHER
        first.kill()
        known = first.newest_step("global")

        second = job.start(steps=first.newest_step("step") + 5)
        attached = second.attached()
        assert agent.wait(60) == 0, "drained, not killed"
        assert (attached["source"], attached["step"] >= known) == ("storage", True), "it has persisted what it held"
        assert _version(job) == moc.__version__
        second.finished()
        first.exact()
        second.exact()
        job.sound()


def test_an_agent_of_another_version_whose_job_trains_is_left_alone(edition: Path) -> None:
    with Job(size=2, persist_every=5, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, edition=edition)
        first = job.start(edition=edition)
        first.event("committed", step=5)

        words = job.start().refused("UsageError")

        assert "another job of this run is training" in words
        assert agent.poll() is None
        at = first.newest_step("step")
        first.event("committed", step=at + 5)
        first.exact()


def test_an_agent_of_another_version_is_not_drained_while_its_snapshots_cannot_be_stored(
    edition: Path, disk: FailingDisk
) -> None:
    with Job(size=2, storage=disk.folder / "repo", persist_every=0, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, edition=edition)
        first = job.start(edition=edition)
        first.event("global", step=10)
        first.kill()
        disk.fail()

        words = job.start().refused("StoreUnavailableError")

        assert "another version" in words
        assert agent.poll() is None
        disk.repair()
        second = job.start(steps=first.newest_step("step") + 5)
        assert second.attached()["step"] >= first.newest_step("global")
        second.finished()
