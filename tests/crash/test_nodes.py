"""A job on two nodes, each with an agent of its own: two runtime roots on this machine, real processes and sockets."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest

from moc.agent.runtime import LOCK_NAME, runtime_folder
from tests.support.job import Job, Life, start_agent, until, wait_killed
from tests.support.plain import expected_tensors

RUN = "nodes"
EXCHANGE = ["persist.put", "save.gather", "commit.fence", "commit.put", "retention.condemn"]


def _recovered(job: Job, former: Life, source: str, *, at_least: int) -> Life:
    """Start the next life and check that it goes on bit for bit."""
    life = job.start(steps=former.newest_step("step") + 6)
    attached = life.attached()
    assert attached["source"] == source, life.story()
    assert attached["step"] >= at_least
    life.finished()
    former.exact()
    life.exact()
    job.sound()
    return life


def _tensors_are_exact(life: Life) -> None:
    """Check the tensors at the end against an undisturbed run: what survives a change of the number of ranks."""
    for rank in range(life.size):
        step = life.newest_step("step")
        assert life.last(rank, "done")["tensors"] == expected_tensors(rank, life.size, step), life.story()


def _stop(pid: int | None) -> None:
    """Stop a process and wait until all its threads stand."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    def is_stopped() -> bool:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    until(is_stopped, f"all threads of process {pid} stand")


def test_saves_are_committed_together_and_memory_is_recovered_after_all_trainers_are_killed() -> None:
    with Job(size=4, nodes=2) as job:
        first = job.start(save_at=7)
        first.event("saved", rank=3, step=7)
        first.event("saved", rank=0, step=7)
        first.event("committed", rank=3, step=10)
        known = first.event("global", rank=2, step=12)["step"]
        agents = [job.agent_pid(node) for node in (0, 1)]
        first.kill()
        job.sound()
        assert [job.agent_pid(node) for node in (0, 1)] == agents, "agents outlive the trainers"

        second = _recovered(job, first, "memory", at_least=known)
        assert job.committed_steps()[-1] == second.newest_step("step"), "the last step is stored at the end"
        assert [job.agent_pid(node) for node in (0, 1)] == [None, None], "an orderly end takes the agents along"


@pytest.mark.slow
def test_trainers_of_one_node_killed_the_others_end_and_memory_is_recovered() -> None:
    with Job(size=2, nodes=2) as job:
        first = job.start()
        known = first.event("global", step=8)["step"]
        first.kill(1)
        first.ended()
        _recovered(job, first, "memory", at_least=known)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_agent_killed_training_goes_on_and_saves_are_committed_again(victim: int) -> None:
    with Job(size=2, nodes=2, step_s=0.002) as job:
        life = job.start()
        life.event("committed", step=5)
        killed = job.kill_agent(victim)
        at_kill = life.newest_step("step")
        life.until(lambda: job.agent_pid(victim) not in (None, killed), "a new agent")
        for rank in (0, 1):
            life.event("committed", rank=rank, step=at_kill + 1)
        life.kill()
        _recovered(job, life, "memory", at_least=life.newest_step("global"))


@pytest.mark.slow
def test_both_agents_killed_training_goes_on_and_saves_are_committed_again() -> None:
    with Job(size=2, nodes=2, step_s=0.002) as job:
        life = job.start()
        life.event("committed", step=5)
        job.kill_agent(0)
        job.kill_agent(1)
        at_kill = life.newest_step("step")
        for rank in (0, 1):
            life.event("committed", rank=rank, step=at_kill + 1)
        life.kill()
        _recovered(job, life, "memory", at_least=life.newest_step("global"))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_node_is_lost_the_last_announced_commit_is_recovered_from_storage(victim: int) -> None:
    with Job(size=2, nodes=2, run_id=RUN) as job:
        first = job.start()
        first.event("committed", step=5)
        first.event("global", rank=1 - victim, step=7)
        job.destroy_node(first, victim)
        first.ended()
        announced = max(first.newest_step("committed"), 5)
        second = _recovered(job, first, "storage", at_least=announced)
        notes = second.last(0, "attached")["notes"]
        lost = [note for note in notes if note.startswith("snapshot is incomplete")]
        assert lost, notes
        assert f"sealed by ranks [{1 - victim}]" in lost[0]


def test_a_zombie_node_that_comes_back_is_fenced() -> None:
    with Job(size=2, nodes=2, run_id=RUN, persist_every=2, keep_last=100, step_s=0.002) as job:
        first = job.start()
        first.event("committed", step=4)
        zombies = [first.pid(1), job.agent_pid(1)]
        for pid in zombies:  # the network to node 1 is gone, and it stands as it was
            _stop(pid)
        first.kill(0)
        announced = first.newest_step("committed")
        root = job.replace_node(1)

        second = job.start()
        attached = second.attached()
        assert attached["source"] == "storage"
        assert attached["step"] >= announced
        second.event("committed", step=attached["step"] + 2)
        before = {str(c.name) for c in job.repository().checkpoints() if c.name.incarnation == 1}
        for pid in zombies:
            os.kill(pid, signal.SIGCONT)
        first.ended()
        now = second.newest_step("step")
        second.event("committed", step=now + 4)
        second.event("committed", rank=1, step=now + 4)
        after = {str(c.name) for c in job.repository().checkpoints() if c.name.incarnation == 1}
        assert after <= before, "the zombie has committed nothing"
        assert any(root.glob("*/agent.sock")), "it still waits for its own life"
        second.signal(signal.SIGTERM)
        second.finished()
        second.exact()
        job.sound()


def test_an_agent_that_stands_still_in_a_save_fails_it_at_all_nodes_with_one_error() -> None:
    with Job(size=2, nodes=2, run_id=RUN, persist_every=0, step_s=0.01, timeout_s=6, wait_s=50) as job:
        agent = start_agent(job, RUN, "persist.put:begin:1:SIGSTOP", node=1)
        life = job.start(save_at=8)
        failed = life.event("save_failed", step=8)
        assert "nodes gave no receipts: step=8 nodes=[1]" in failed["words"]
        assert failed["words"].endswith("node=0"), "it names who has found it"
        agent.send_signal(signal.SIGCONT)
        assert life.event("save_failed", rank=1, step=8)["words"] == failed["words"], "one error on all ranks"
        back_at = life.newest_step("step")
        life.event("global", step=back_at + 1)
        life.signal(signal.SIGTERM)
        life.finished()
        life.exact()
        assert job.committed_steps() == [life.newest_step("step")]


@pytest.mark.slow
def test_training_goes_on_beside_an_agent_that_stands_still() -> None:
    with Job(size=2, nodes=2, step_s=0.002, timeout_s=5) as job:
        life = job.start()
        life.event("committed", step=5)
        agent = job.agent_pid(1)
        _stop(agent)
        stopped_at = life.newest_step("step")
        life.event("step", step=stopped_at + 200)
        assert agent is not None
        os.kill(agent, signal.SIGCONT)
        back_at = life.newest_step("step")
        for rank in (0, 1):
            life.event("committed", rank=rank, step=back_at + 1)
        assert job.agent_pid(1) == agent
        life.signal(signal.SIGTERM)
        life.finished()
        life.exact()
        job.sound()


def test_an_agent_that_cannot_be_reached_costs_saves_only() -> None:
    with Job(size=2, nodes=2, run_id=RUN, step_s=0.01, timeout_s=3) as job:
        life = job.start()
        life.event("committed", step=5)
        with (runtime_folder(RUN, job.roots[1]) / LOCK_NAME).open("ab") as lock:
            job.kill_agent(1)
            fcntl.flock(lock, fcntl.LOCK_EX)  # no other agent can begin: every connection to node 1 is refused
            at_kill = life.newest_step("step")
            error = life.until(lambda: job.ask_agent("status")[0]["last_error"], "a save that fails")
            assert "node=0" in error
            life.event("step", step=at_kill + 50)
        back_at = life.newest_step("step")
        for rank in (0, 1):
            life.event("committed", rank=rank, step=back_at + 1)
        life.kill()
        _recovered(job, life, "memory", at_least=life.newest_step("global"))


def test_a_save_that_one_node_cannot_make_fails_at_all_and_the_next_is_made() -> None:
    with Job(size=2, nodes=2, persist_every=0, versions=4, step_s=0.01, wait_s=40) as job:
        life = job.start(save_at=8, only={1: {"defect_at": 8}})
        words = [life.event("save_failed", rank=rank, step=8)["words"] for rank in (0, 1)]
        assert all("cannot be saved at step 8" in text for text in words), words
        life.event("global", step=12)
        life.signal(signal.SIGTERM)
        life.finished()
        life.exact()
        assert job.committed_steps() == [life.newest_step("step")]


@pytest.mark.parametrize(
    ("span", "victim"), [*((span, 0) for span in EXCHANGE), ("persist.put", 1), ("save.gather", 1)]
)
@pytest.mark.parametrize("event", ["begin", "end"])
@pytest.mark.slow
def test_an_agent_killed_at_a_span_of_a_joint_save_is_replaced(span: str, event: str, victim: int) -> None:
    with Job(size=2, nodes=2, persist_every=2, keep_last=1, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, f"{span}:{event}:2", node=victim)
        life = job.start()
        wait_killed(agent, life)
        killed_at = life.newest_step("step") or 0
        for rank in (0, 1):
            life.event("committed", rank=rank, step=killed_at + 3)
        life.kill()
        job.sound()
        _recovered(job, life, "memory", at_least=life.newest_step("global"))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("event", ["begin", "end"])
@pytest.mark.slow
def test_an_agent_killed_as_the_life_begins_ends_the_start_and_the_next_goes_on(event: str, victim: int) -> None:
    with Job(size=2, nodes=2, run_id=RUN) as job:
        first = job.start()
        first.event("committed", step=5)
        first.signal(signal.SIGTERM)
        first.finished()
        agent = start_agent(job, RUN, f"agent.meet:{event}:1", node=victim)
        job.start().ended()
        wait_killed(agent, first)
        _recovered(job, first, "storage", at_least=first.newest_step("step"))


@pytest.mark.parametrize("span", EXCHANGE)
@pytest.mark.parametrize("event", ["begin", "end"])
@pytest.mark.slow
def test_a_node_lost_at_a_span_of_a_joint_save_costs_nothing_that_was_announced(span: str, event: str) -> None:
    with Job(size=2, nodes=2, persist_every=2, keep_last=1, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, f"{span}:{event}:2")
        life = job.start()
        wait_killed(agent, life)
        announced = life.newest_step("committed") or 0
        job.destroy_node(life, 0)
        life.ended()
        announced = max(announced, life.newest_step("committed") or 0)
        second = job.start(steps=(life.newest_step("step") or 0) + 6)
        attached = second.attached()
        if attached["source"] is None:
            assert not announced
            assert not job.committed_steps()[:-1]
        else:
            assert attached["source"] == "storage", second.story()
            assert attached["step"] >= announced
        second.finished()
        second.exact()
        job.sound()


def test_the_agent_of_a_node_that_only_one_life_had_is_no_part_of_the_next() -> None:
    with Job(size=2, nodes=2, run_id=RUN) as job:
        first = job.start()
        first.event("committed", step=5)
        first.kill()
        job.roots[1] = job.roots[0]  # both ranks on node 0 now: rank 1's memory is elsewhere
        second = job.start(steps=first.newest_step("step") + 6)
        attached = second.attached()
        assert attached["source"] == "storage"
        assert attached["step"] >= first.newest_step("committed")
        second.finished()
        second.exact()
        job.sound()


@pytest.mark.parametrize("size", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
def test_ranks_that_have_changed_places_or_number_go_on_from_the_memory_of_other_nodes(size: int) -> None:
    with Job(size=4, nodes=2, run_id=RUN, persist_every=0) as job:
        first = job.start()
        known = first.event("global", rank=2, step=8)["step"]
        first.kill()
        job.roots.reverse()  # ranks 0 and 1 are now where the memory of 2 and 3 is, and the other way round
        second = job.start(size=size, steps=first.newest_step("step") + 6)
        attached = second.attached()
        assert attached["source"] == "peer memory", second.story()
        assert attached["step"] >= known
        assert any("memory of other nodes" in note for note in attached["notes"])
        second.finished()
        _tensors_are_exact(second)
        job.sound()


@pytest.mark.slow
def test_a_job_that_grows_from_one_node_to_two_reads_what_the_one_has() -> None:
    with Job(size=2, run_id=RUN, persist_every=0) as job:
        first = job.start()
        known = first.event("global", rank=1, step=8)["step"]
        first.kill()
        job.roots.append(job.folder / "rt1")
        second = job.start(steps=first.newest_step("step") + 6)
        attached = second.attached()
        assert attached["source"] == "peer memory", second.story()
        assert attached["step"] >= known
        second.finished()
        second.exact()
        job.sound()


@pytest.mark.slow
def test_a_node_that_comes_anew_reads_what_it_needs_from_the_others() -> None:
    with Job(size=2, nodes=2, run_id=RUN, persist_every=0) as job:
        first = job.start()
        known = first.event("global", rank=1, step=8)["step"]
        first.kill()
        job.roots.append(job.folder / "rt2")
        second = job.start(size=3, steps=first.newest_step("step") + 6)
        attached = second.attached()
        assert attached["source"] == "peer memory", second.story()
        assert attached["step"] >= known
        second.finished()
        _tensors_are_exact(second)
        job.sound()


def test_a_job_goes_on_with_more_nodes_than_before_though_a_snapshot_is_in_the_memory_of_one() -> None:
    with Job(size=2, run_id=RUN) as job:
        first = job.start()
        first.event("committed", step=5)
        first.kill()
        job.roots.append(job.folder / "rt1")  # rank 1 is on another machine now, whose agent has nothing
        second = job.start(steps=first.newest_step("step") + 6)
        attached = second.attached()
        assert attached["step"] >= first.newest_step("committed")
        assert any("no memory of this run" in note for note in attached["notes"]), attached["notes"]
        second.finished()
        second.exact()
        job.sound()


def test_one_node_listens_to_nobody() -> None:
    with Job(size=2) as job:
        life = job.start()
        life.event("committed", step=5)
        pid = job.agent_pid()
        assert "moc-peers" not in {path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")}
        assert "aiohttp" not in Path(f"/proc/{pid}/maps").read_text()
        life.kill()
