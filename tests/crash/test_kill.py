"""SIGKILL of trainers, of the agent, of both: the next life goes on from the newest state that is left, bit for bit."""

from __future__ import annotations

import signal

import pytest

from tests.support.job import Job, start_agent, wait_killed


def test_one_trainer_killed_the_others_end_and_memory_is_recovered() -> None:
    with Job(size=2) as job:
        first = job.start()
        first.event("committed", step=5)
        known = first.event("global", step=8)["step"]
        first.kill(1)
        assert first.ended()[0] != 0, "rank 0 cannot go on alone"
        agent = job.agent_pid()

        second = job.start()
        attached = second.attached()
        assert attached["source"] == "memory"
        assert attached["step"] >= max(known, first.newest_step("global"))
        assert job.agent_pid() == agent, "the agent outlives the trainers"
        second.event("global", step=attached["step"] + 8)
        second.signal(signal.SIGTERM)
        second.finished()
        assert second.last(0, "terminated")["step"] == second.last(1, "saved")["step"] == second.newest_step("step")
        first.exact()
        second.exact()
        assert job.agent_pid() is None, "an orderly end takes the agent along"


def test_all_trainers_killed() -> None:
    with Job(size=2) as job:
        first = job.start()
        first.event("global", step=20)
        first.kill()

        second = job.start(steps=first.newest_step("step") + 3)
        attached = second.attached()
        assert attached["source"] == "memory"
        assert attached["step"] >= first.newest_step("global")
        second.finished()
        second.exact()


def test_agent_killed_alone_training_goes_on_and_saves_are_committed_again() -> None:
    with Job(size=2, step_s=0.002) as job:
        life = job.start()
        committed = life.event("committed", step=5)["step"]
        killed = job.kill_agent()
        at_kill = life.newest_step("step")
        life.until(lambda: job.agent_pid() not in (None, killed), "a new agent")
        life.event("committed", step=max(committed, at_kill) + 1)
        life.kill()

        second = job.start(steps=life.newest_step("step") + 3)
        attached = second.attached()
        assert attached["source"] == "memory"
        assert attached["step"] >= life.newest_step("global")
        second.finished()
        life.exact()
        second.exact()


def test_agent_and_trainers_killed_the_last_announced_commit_is_recovered() -> None:
    with Job(size=2) as job:
        first = job.start(save_at=7)
        saved = first.event("saved", step=7)["step"]
        first.event("committed", step=saved)
        job.kill_agent()
        first.kill()
        announced = max(first.newest_step("committed"), first.newest_step("saved"))

        second = job.start(steps=announced + 5)
        attached = second.attached()
        assert attached["source"] == "storage"
        assert attached["step"] >= announced
        second.finished()
        second.exact()


def test_all_trainers_killed_after_the_seal_the_checkpoint_is_still_made() -> None:
    # Rank 0 dies where its first step has just been sealed, so nobody but the agent is left to save it.
    with Job(size=1, persist_every=1) as job:
        first = job.start(kill={0: "snapshot.seal:end:1"})
        assert first.ended() == [-9]
        first.until(lambda: job.committed_steps() == [1], "the commit of step 1", may_end=True)


def test_agent_killed_while_the_job_ends() -> None:
    # A session that closes while there is no agent has to bring one back: only the trainers map the arena.
    with Job(size=2, persist_every=0, step_s=0.002) as job:
        life = job.start(steps=60)
        life.event("global", step=5)
        life.event("step", step=59)
        pid = job.agent_pid()
        if pid is not None:  # the life may have ended in time
            job.kill_agent()
        life.finished()
        second = job.start(steps=60)
        assert second.attached()["step"] == 60
        second.finished()


@pytest.mark.parametrize("size", [1, 3])
def test_other_world_sizes(size: int) -> None:
    with Job(size=size) as job:
        first = job.start()
        first.event("global", step=6)
        first.kill(size - 1)
        first.ended()
        second = job.start(steps=first.newest_step("step") + 2)
        assert second.attached()["source"] == "memory"
        second.finished()
        second.exact()


def test_a_commit_that_a_dead_agent_has_made_is_not_made_again_with_other_bytes() -> None:
    with Job(size=1, persist_every=2, keep_last=500, run_id="again", step_s=0.002) as job:
        agent = start_agent(job, "again", "commit.put:end:2")
        life = job.start()
        wait_killed(agent, life)
        second = job.repository().checkpoints()[1].name
        manifest = job.storage / "manifests" / f"{second}.json"
        before = manifest.read_bytes()
        life.event("committed", step=life.newest_step("step") + 5)
        life.kill()
        assert manifest.read_bytes() == before
        job.sound()


@pytest.mark.parametrize("versions", [2, 3])
def test_ranks_that_skip_different_steps_still_come_to_global_snapshots(versions: int) -> None:
    # Steps are much shorter than the agent's look: each rank finds its records full at steps of its own.
    with Job(size=3, versions=versions, persist_every=0) as job:
        life = job.start()
        for _ in range(5):
            step = life.newest_step("step") or 0
            life.event("global", step=step + 1)
        life.kill()
        second = job.start(steps=life.newest_step("step") + 3)
        assert second.attached()["step"] >= life.newest_step("global")
        second.finished()
        second.exact()


def test_a_rank_killed_in_its_second_snapshot_of_a_step_leaves_the_next_life_a_free_record() -> None:
    with Job(size=2, versions=2, persist_every=0, step_s=0.05) as job:
        life = job.start(save_at=3, kill={1: "snapshot.seal:begin:4"})
        life.until(lambda: not life.processes[1].is_alive(), "the death of rank 1")
        life.event("step", step=3)
        life.kill()
        inventory, _ = job.ask_agent("inventory")
        assert [step for _, step, _ in inventory["snapshots"]][-1] == 3

        again = job.start()
        assert (again.attached()["step"], again.attached()["source"]) == (3, "memory")
        again.event("global", step=4)
        again.kill()
