"""Storage that goes away, fills up, or is down at recovery: training goes on, and what was promised is kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disk import FailingDisk
from tests.support.job import Job, Life


def _failure(job: Job, words: str) -> bool:
    """Return whether the agent counts failed saves and says these words of the last one."""
    status, _ = job.ask_agent("status")
    return bool(status["counters"]["failed"]) and words in (status["last_error"] or "")


def _terminated(life: Life) -> None:
    life.signal(signal.SIGTERM)
    life.finished()


def test_storage_that_is_moved_away_costs_saves_only() -> None:
    with Job(size=2, step_s=0.002, persist_every=5) as job:
        life = job.start()
        life.event("committed", step=5)
        away = job.folder / "away"
        job.storage.rename(away)
        job.storage.write_text("a file where the folder was")
        gone_at = life.newest_step("step")
        life.until(lambda: _failure(job, str(job.storage)), "a failed save is reported")
        life.event("global", step=gone_at + 20)

        job.storage.unlink()
        away.rename(job.storage)
        back_at = life.newest_step("step")
        life.event("committed", step=back_at + 1)
        _terminated(life)
        job.sound()
        life.exact()


def test_a_repository_that_vanishes_is_not_made_anew_in_its_place() -> None:
    # As when a mount goes away: what would be written to the bare mount point is out of sight once it is back.
    with Job(size=1, step_s=0.002, persist_every=5) as job:
        life = job.start()
        life.event("committed", step=10)
        away = job.folder / "away"
        job.storage.rename(away)
        life.until(lambda: _failure(job, "vanished"), "a failed save is reported")
        assert not job.storage.exists()
        away.rename(job.storage)
        back_at = life.newest_step("step")
        announced = life.event("committed", step=back_at + 1)["step"]
        job.kill_agent()
        life.kill()

        second = job.start(steps=announced + 3)
        attached = second.attached()
        assert attached["source"] == "storage"
        assert attached["step"] >= announced
        second.finished()
        job.sound()


def test_a_failing_disk_costs_saves_only(disk: FailingDisk) -> None:
    with Job(size=2, storage=disk.folder / "repo", step_s=0.002, persist_every=5) as job:
        life = job.start()
        life.event("committed", step=5)
        disk.fail()
        failed_at = life.newest_step("step")
        life.until(lambda: _failure(job, "StoreUnavailableError"), "a failed save is reported")
        life.event("global", step=failed_at + 20)
        disk.repair()
        back_at = life.newest_step("step")
        life.event("committed", step=back_at + 1)
        _terminated(life)
        life.exact()
        job.sound()


def test_storage_that_turns_read_only_costs_saves_only(disk: FailingDisk) -> None:
    with Job(size=2, storage=disk.folder / "repo", step_s=0.002, persist_every=5) as job:
        life = job.start()
        life.event("committed", step=5)
        disk.make_read_only()
        failed_at = life.newest_step("step")
        life.until(lambda: _failure(job, "Read-only file system"), "a failed save is reported")
        life.event("global", step=failed_at + 20)
        life.kill()
        known = life.newest_step("global")

        # A life cannot begin without its record, and says why.
        assert "Read-only file system" in job.start().refused("StoreDeniedError")

        disk.make_writable()
        second = job.start()
        attached = second.attached()
        assert (attached["source"], attached["step"] >= known) == ("memory", True)
        second.event("committed", step=attached["step"] + 1)
        _terminated(second)
        second.exact()
        job.sound()


def test_a_repository_that_is_deleted_costs_saves_and_a_start_is_refused_until_it_is_asked_for() -> None:
    with Job(size=2, step_s=0.002, persist_every=5) as job:
        life = job.start()
        life.event("committed", step=5)
        # At once, as for anybody who looks at the name; what an unlinked file holds is of no use to a later life.
        gone = job.storage.with_name("gone")
        job.storage.rename(gone)
        shutil.rmtree(gone)
        deleted_at = life.newest_step("step")
        life.until(lambda: _failure(job, "vanished"), "a failed save is reported")
        life.event("global", step=deleted_at + 20)
        assert not job.storage.exists()
        life.kill()

        assert job.run in job.start().refused("MismatchError")
        second = job.start(run_id=job.run)
        attached = second.attached()
        assert (attached["source"], attached["step"] >= life.newest_step("global")) == ("memory", True)
        second.event("committed", step=attached["step"] + 1)
        _terminated(second)
        second.exact()
        job.sound()


@pytest.mark.parametrize(("lives_before", "lives_without"), [(1, 1), (2, 1), (1, 2)])
def test_storage_down_at_recovery_with_memory_complete(
    disk: FailingDisk, lives_before: int, lives_without: int
) -> None:
    with Job(size=2, storage=disk.folder / "repo", step_s=0.002, persist_every=5) as job:
        for _ in range(lives_before):
            life = job.start()
            attached = life.attached()
            life.event("committed", step=attached["step"] + 5)
            life.kill()
        known = life.newest_step("global")
        disk.fail()

        for _ in range(lives_without):
            life.kill()
            life = job.start()
            attached = life.attached()
            assert attached["source"] == "memory"
            assert attached["step"] >= known
            assert any("unavailable" in note for note in attached["notes"]), attached["notes"]
            life.event("global", step=attached["step"] + 5)
            known = life.newest_step("global")

        disk.repair()
        committed = life.event("committed", step=attached["step"] + 6)["step"]
        records, findings = job.repository().incarnations()
        assert [record.number for record in records] == list(range(1, lives_before + lives_without + 1))
        assert all(record.fingerprint == records[0].fingerprint for record in records)
        assert not findings
        job.kill_agent()
        life.kill()

        last = job.start(steps=committed + 3)
        attached = last.attached()
        assert (attached["source"], attached["step"] >= committed) == ("storage", True)
        last.finished()
        last.exact()
        job.sound()


def test_a_life_that_began_without_storage_gets_its_record_from_the_next(disk: FailingDisk) -> None:
    with Job(size=2, storage=disk.folder / "repo", step_s=0.002, persist_every=5) as job:
        first = job.start()
        first.event("committed", step=5)
        first.kill()
        disk.fail()
        second = job.start()
        second.event("global", step=second.attached()["step"] + 2)
        second.kill()
        disk.repair()

        third = job.start()
        third.event("committed", step=third.attached()["step"] + 6)

        records, _ = job.repository().incarnations()
        assert [record.number for record in records] == [1, 2, 3]
        assert all(link.is_known for link in job.repository().lineage())


def test_storage_down_and_nothing_in_memory_is_refused(disk: FailingDisk) -> None:
    with Job(size=2, storage=disk.folder / "repo") as job:
        job.start(steps=5).finished()
        disk.fail()
        assert str(job.storage) in job.start().refused("StoreUnavailableError")
        disk.repair()
        life = job.start(steps=6)
        assert life.attached()["step"] == 5
        life.finished()


def test_a_power_failure_after_an_announced_commit(disk: FailingDisk) -> None:
    # Everything that was not flushed is gone: data, directory entries, renames.
    with Job(size=2, storage=disk.folder / "repo", persist_every=3, keep_last=2) as job:
        announced = 0
        for _ in range(4):
            life = job.start()
            attached = life.attached()
            assert attached["step"] >= announced
            life.event("committed", step=attached["step"] + 3)
            disk.fail()
            life.kill()
            if job.agent_pid() is not None:
                job.kill_agent()
            announced = life.newest_step("committed")
            disk.repair()
            life.exact()
        job.sound()


def test_retention_keeps_the_last_and_deletes_objects_after_a_later_commit() -> None:
    with Job(size=2, step_s=0.002, persist_every=2, keep_last=2) as job:
        life = job.start()
        first = life.event("committed", step=2)["step"]
        for _ in range(6):
            first = life.event("committed", step=first + 1)["step"]
        _terminated(life)
        kept = job.committed_steps()
        assert len(kept) <= 3  # the explicit save at the end is one more attempt, whose retention follows it
        assert kept[-1] == life.newest_step("step")
        repository = job.repository()
        named = {row.key for c in repository.checkpoints() for row in repository.read_manifest(c.name).objects}
        stored = {entry.key for entry in repository.objects()}
        assert named <= stored
        condemned = set(repository.read_victims(job.run, 1))
        assert stored - named <= condemned, (
            "objects without a manifest are condemned ones that wait for the next commit"
        )
        assert len(stored - named) <= 2 * len(named)
        job.sound()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem with 3 MB of space."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=3m") != 0:
        # Mounting needs rights that a user's container may not give; with them (CI runs as root) this always runs.
        pytest.skip(f"cannot mount a small filesystem: errno={ctypes.get_errno()}")
    yield folder
    assert libc.umount2(os.fsencode(folder), 2) == 0  # MNT_DETACH


def test_a_disk_that_fills_up_costs_periodic_saves_and_gets_them_back(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with Job(size=2, storage=small_disk / "repo", step_s=0.002, persist_every=5, keep_last=1) as job:
        life = job.start()
        life.event("committed", step=5)
        with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(65536))
        full_at = life.newest_step("step")
        life.until(lambda: _failure(job, "StoreFullError"), "a failed save is reported")
        life.event("global", step=full_at + 20)
        assert len(job.committed_steps()) >= 1, "what was committed before is kept"
        ballast.unlink()
        back_at = life.newest_step("step")
        life.event("committed", step=back_at + 1)
        _terminated(life)
        life.exact()
        job.sound()
        assert not list(job.storage.rglob(".*~*")), "no temporary file is left of the failed saves"


def test_a_full_disk_fails_the_save_and_nothing_else(small_disk: Path) -> None:
    storage = small_disk / "repo"
    ballast = small_disk / "ballast"
    with Job(size=1, storage=storage, step_s=0.002, persist_every=0) as job:
        first = job.start(save_at=4, steps=8)
        first.event("saved", step=4)
        first.finished()
        with ballast.open("wb") as stream:
            stream.write(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 65536))

        second = job.start(save_at=12)
        assert second.attached()["step"] == 8
        failed = second.event("save_failed", step=12)
        assert "StoreFullError" in failed["words"], failed
        second.event("global", step=20)
        ballast.unlink()
        _terminated(second)
        assert second.last(0, "saved") is not None, second.story()
        second.exact()
        job.sound()
        assert not list(storage.rglob(".*~*")), "no temporary file is left of the failed save"
