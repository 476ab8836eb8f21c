"""Small resource limits of a trainer: moc needs few, and says which one is in its way."""

from __future__ import annotations

from tests.support.job import Job


def test_no_memory_is_locked() -> None:
    with Job(size=2, limit=["MEMLOCK=0"]) as job:
        job.start(steps=5).finished()


def test_too_few_descriptors_are_named_and_another_attempt_works() -> None:
    with Job(size=2) as job:
        life = job.start(limit=["NOFILE=9"])
        life.ended()
        events = [life.last(rank, kind) for rank in range(2) for kind in ("refused", "failed")]
        assert any("Too many open files" in str(event) for event in events), events
        job.start(steps=5).finished()


def test_a_limit_on_files_that_the_arena_exceeds_is_refused_before_anything_is_written() -> None:
    with Job(size=2) as job:
        words = job.start(limit=["FSIZE=1000000"]).refused("UsageError")
        assert "allowed=1000000" in words
        assert "RLIMIT_FSIZE" in words
        assert not job.repository().incarnation_numbers()
        job.kill_agent()  # it has inherited the limit
        job.start(steps=5).finished()
