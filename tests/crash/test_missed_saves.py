"""A flagged step that one rank could not snapshot is made up for at the next one, not a whole `persist_every` later."""

from __future__ import annotations

import signal

import pytest

from tests.support.job import Job

PERSIST_EVERY = 40


@pytest.mark.parametrize("snapshot_every", [1, 4])
def test_a_checkpoint_that_one_rank_has_missed_is_made_at_the_next_snapshot(snapshot_every: int) -> None:
    options = {"persist_every": PERSIST_EVERY, "snapshot_every": snapshot_every, "step_s": 0.002, "keep_last": 50}
    with Job(size=2, **options) as job:
        life = job.start(only={1: {"defect_at": PERSIST_EVERY}})
        life.event("committed", step=2 * PERSIST_EVERY)
        life.signal(signal.SIGTERM)
        life.finished()

        made = job.committed_steps()
        assert PERSIST_EVERY not in made
        # At the next snapshot that all ranks take: on a busy machine one of them may have no free slot yet.
        assert PERSIST_EVERY < made[0] < 2 * PERSIST_EVERY, made
        # On a busy machine a save may still be under way at the next flagged step; the last one is SIGTERM's.
        assert made[1:-1], made
        assert all(step % PERSIST_EVERY == 0 for step in made[1:-1]), f"the rhythm stays: {made}"
        assert life.last(1, "done")["skipped"] >= 1
        life.exact()
        job.sound()


def test_a_loop_that_marks_its_micro_batches_as_well_has_missed_nothing() -> None:
    with Job(size=2, persist_every=20, step_s=0.01, boundaries=3) as job:
        life = job.start()
        life.event("committed", step=60)

        saves = job.ask_agent("status")[0]["counters"]["saves"]
        assert saves <= life.newest_step("step") // 20, "one per flagged step, whatever became of it"
        life.exact()


def test_a_save_fails_at_once_when_a_rank_has_ended_before_it_sealed() -> None:
    with Job(size=2, step_s=0.002, persist_every=0) as job:
        life = job.start(save_at=10, kill={1: "save.take:begin:1"})
        life.ended(deadline_s=30.0)  # far less than the worker's and the agent's patience
        failed = life.last(0, "save_failed")
        assert failed is not None, life.story()
        assert "ranks [1] ended before they had sealed it" in failed["words"]
