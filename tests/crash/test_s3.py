"""A job whose repository lies on a real S3 server: faults on the way cost saves at most, and recovery is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from moc.agent.runtime import LOG_NAME
from tests.cli.console import moc
from tests.support.fault_proxy import Fault, FaultProxy, Harm, expired_token, slow_down
from tests.support.job import Job, Life
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

MULTIPART_SCALE = 150  # makes the dense object of one rank larger than the 32 MiB from which on it is sent in parts


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Run a proxy that this process, and what it starts, takes for the S3 service."""
    with FaultProxy(s3_server.port) as running:
        for name, value in s3_server.environment(running.endpoint).items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def storage(s3_bucket: str) -> str:
    return f"s3://{s3_bucket}/{uuid4().hex}/run"


def no_secret_in(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            text = path.read_bytes()
            assert SECRET_KEY.encode() not in text, path
            assert ACCESS_KEY.encode() not in text, path


def commits_after(life: Life, step: int | None) -> int:
    assert step is not None
    return int(life.event("committed", step=step + 1)["step"])


def test_faults_on_the_way_cost_saves_at_most_and_recovery_from_s3_is_exact(proxy: FaultProxy, storage: str) -> None:
    with Job(size=2, storage=storage, step_s=0.02, persist_every=20) as job:
        life = job.start()
        life.event("committed", step=20)

        # What passes costs nothing but time: no save fails.
        for target, harm in (
            ("objects/", slow_down()),
            ("objects/", Harm.FLIP_REQUEST),
            ("manifests/", Harm.ERROR_AFTER),
            ("manifests/", Harm.RESET_AFTER),
        ):
            fault = proxy.inject(Fault(harm=harm, method="PUT", target=target, count=1))
            life.until(fault.is_hit.is_set, f"{harm} is met")
            commits_after(life, life.newest_step("step"))
        assert "save failed" not in (job.runtime / LOG_NAME).read_text(), life.story()

        # What stays costs saves: training goes on, and a later save is committed.
        proxy.inject(Fault(harm=expired_token()))
        life.until(lambda: "StoreDeniedError" in str(job.ask_agent("status")[0]["last_error"]), "a save fails")
        life.event("global", step=(life.newest_step("step") or 0) + 10)
        proxy.heal()
        announced = commits_after(life, life.newest_step("step"))
        job.kill_agent()
        life.kill()
        life.exact()

        second = job.start(steps=announced + 12)
        attached = second.attached()
        assert (attached["source"], attached["step"] >= announced) == ("storage", True)
        second.finished()
        second.exact()
        job.sound()
        newest = job.committed_steps()[-1]

        # A bit that flips on the way out: found, named, and the next checkpoint is used.
        with proxy.injected(Fault(harm=Harm.FLIP_ANSWER, method="GET", target=rf"objects/.*{newest:012d}-.*-d\.")):
            checked = moc("verify", "--read-data", "-r", storage)
            assert checked.returncode == 4, checked.stderr
            assert f"{newest:012d}-" in checked.stdout
            third = job.start(steps=newest + 2)
            attached = third.attached()
            assert (attached["source"], attached["step"] < newest) == ("storage", True)
            assert f"step={newest} " in " ".join(attached["rejected"]), attached
            third.finished()
        no_secret_in(job.folder)


@pytest.mark.slow  # the same without a job: store/test_s3.py
def test_an_agent_killed_in_the_middle_of_an_upload_leaves_nothing_visible(
    proxy: FaultProxy, storage: str, s3_server: S3Server, s3_bucket: str
) -> None:
    with Job(size=1, storage=storage, scale=MULTIPART_SCALE, persist_every=2) as job:
        job.start(steps=2).finished()
        before = {entry.key for entry in job.repository().store.list("")}
        stuck = proxy.inject(Fault(harm=Harm.STALL, method="PUT", target="partNumber=2"))

        second = job.start()
        assert second.event("attached")["step"] == 2
        second.until(stuck.is_hit.is_set, "an upload is under way")
        job.kill_agent()
        second.kill()

        left = s3_server.uploads(s3_bucket)
        assert len(left) == 1, left
        objects = sorted(key.split("run/", 1)[1] for key in left)
        assert not {entry.key for entry in job.repository().store.list("")} & set(objects), (
            "half an object is not listed"
        )
        assert {entry.key for entry in job.repository().store.list("")} >= before
        proxy.heal()

        third = job.start(steps=6)
        attached = third.event("attached")
        assert (attached["source"], attached["step"]) == ("storage", 2)
        third.finished()
        assert job.committed_steps()[-1] == 6
        assert moc("verify", "--read-data", "-r", storage).returncode == 0
        job.repository().store.sweep(older_than_s=0)
        assert s3_server.uploads(s3_bucket) == []
