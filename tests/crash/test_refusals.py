"""What attach refuses: with clear words, on every rank, and without having changed anything."""

from __future__ import annotations

import pytest

from moc.format.keys import FORMAT_KEY
from tests.support.job import Job


def test_a_second_job_on_a_living_ones_repository_is_refused_and_harms_nothing() -> None:
    with Job(size=2, step_s=0.002, persist_every=5) as job, Job(size=2, root=job.root, storage=job.storage) as other:
        life = job.start()
        life.event("committed", step=5)
        words = other.start().refused("UsageError")
        assert str(life.pid(0)) in words
        assert str(life.pid(1)) in words
        at = life.newest_step("step")
        life.event("committed", step=at + 5)
        assert [n for _, n in job.repository().incarnation_numbers()] == [1]
        life.kill()
        life.exact()

        # Once the first has ended, the second may.
        second = other.start(steps=life.newest_step("step") + 3)
        assert second.attached()["step"] >= life.newest_step("global")
        second.finished()


def test_a_second_job_is_refused_although_an_earlier_life_had_ranks_that_the_living_one_has_not() -> None:
    with Job(size=2, step_s=0.002) as job, Job(size=1, root=job.root, storage=job.storage) as other:
        larger = job.start()
        larger.event("committed", step=5)
        larger.kill()
        life = job.start(size=1)
        life.event("committed", step=life.attached()["step"] + 5)
        words = other.start().refused("UsageError")
        assert str(life.pid(0)) in words
        life.event("step", step=(life.newest_step("step") or 0) + 5)


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"model": "another"}, "MismatchError", "another"),
        ({"run_id": "another"}, "MismatchError", "another"),
        ({"restore": "999"}, "NoCheckpointError", "999"),
        ({"budget_bytes": 100_000}, "UsageError", "memory_budget_bytes=100000"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(options: dict[str, object], error: str, part: str) -> None:
    with Job(size=2) as job, Job(size=2, storage=job.storage) as other:  # another node: it sees the storage only
        job.start(steps=6).finished()
        before = job.listing()
        words = other.start(**options).refused(error)
        assert part in words
        assert job.listing() == before
        life = job.start(steps=8)
        assert life.attached()["step"] == 6
        life.finished()


def test_an_arena_beyond_the_budget_is_refused_before_anything_exists() -> None:
    with Job(size=2) as job:
        words = job.start(budget_bytes=100_000).refused("UsageError")
        assert "memory_budget_bytes=100000" in words
        assert "arena_bytes=" in words
        assert not job.storage.exists() or not [
            p for p in job.storage.rglob("*") if p.is_file() and p.name != FORMAT_KEY
        ]


def test_an_empty_repository_whose_run_an_agent_still_holds_is_refused() -> None:
    with Job(size=2, step_s=0.002) as job:
        life = job.start()
        life.event("committed", step=5)
        life.kill()
        job.storage.rename(job.storage.with_name("gone"))  # at once: the agent may be writing
        words = job.start().refused("MismatchError")
        run = words.partition("run_id='")[2].partition("'")[0]
        assert run
        again = job.start(run_id=run, steps=life.newest_step("step") + 2)
        assert again.attached()["source"] == "memory"
        again.finished()
        again.exact()


@pytest.mark.parametrize(
    "content", [b"moc repository 2\n", b"moc repository 1\nrequires time-travel\n", b"something else\n"]
)
def test_another_format_is_refused_and_nothing_is_changed(content: bytes) -> None:
    with Job(size=2) as job:
        job.start(steps=6).finished()
        (job.storage / FORMAT_KEY).write_bytes(content)
        before = job.listing()
        job.start().refused("FormatUnsupportedError")
        assert job.listing() == before


def test_take_over_goes_on_with_the_other_runs_checkpoints() -> None:
    with Job(size=2) as job, Job(size=2, storage=job.storage) as other:
        job.start(steps=6).finished()
        life = other.start(run_id="heir", take_over=True, steps=9)
        attached = life.attached()
        assert (attached["step"], attached["source"]) == (6, "storage")
        life.finished()
        life.exact()
        job.sound()
        again = other.start(run_id="heir", take_over=True, steps=10)
        assert again.attached()["step"] == 9
        again.finished()


@pytest.mark.parametrize("restore", ["never", "weights"])
def test_a_fresh_start_is_not_the_parents_state(restore: str) -> None:
    with Job(size=2) as job:
        job.start(steps=6).finished()
        life = job.start(steps=3, restore=restore)
        event = life.event("attached")
        assert event["step"] == 0
        assert event["source"] == (None if restore == "never" else "storage")
        life.finished()
        again = job.start(steps=5)
        assert again.event("attached")["step"] == 3, "the newest life counts, not the highest step"
        again.finished()


def test_a_step_that_is_asked_for_is_resumed_although_memory_has_newer_ones() -> None:
    with Job(size=2, persist_every=5, keep_last=50) as job:
        first = job.start()
        first.event("committed", step=5)
        first.event("global", step=first.newest_step("committed") + 2)
        first.kill()
        target = job.committed_steps()[0]
        second = job.start(restore=str(target))
        assert second.attached()["step"] == target
        second.event("global", step=target + 2)
        second.kill()
        third = job.start(steps=second.newest_step("step") + 2)
        assert third.attached()["step"] >= second.newest_step("global")
        third.finished()
        for life in job.lives:
            life.exact()
