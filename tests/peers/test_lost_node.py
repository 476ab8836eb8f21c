"""A whole node is lost, with its memory: the job goes on from replicas, or from what is left where there are none."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from moc.state import Expert
from tests.support.job import Job, Life, start_agent, wait_killed
from tests.support.plain import mixed_tensors

OPTIONS = {"size": 4, "nodes": 2, "replicas": 1, "step_s": 0.02}


def _global_everywhere(life: Life, step: int) -> int:
    """Wait until a step is known to be global on all ranks; return the oldest of what they know."""
    return min(life.event("global", rank=rank, step=step)["step"] for rank in range(life.size))


def _lose(job: Job, life: Life, node: int) -> None:
    """Lose a node, and then the trainers that are left: the launcher ends them."""
    job.destroy_node(life, node)
    life.kill()


def _guest_memory(job: Job, node: int) -> Path:
    """Return the file of the replicas that a node's agent holds."""
    pid = job.agent_pid(node)
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the agent has closed it since
            if "-guest" in os.readlink(path):
                return path
    raise AssertionError(f"agent holds no replicas: pid={pid}")


def test_nothing_that_was_global_is_lost_with_a_node_nor_with_the_other_one_later() -> None:
    with Job(**OPTIONS, persist_every=0) as job:
        first = job.start()
        known = _global_everywhere(first, 8)
        _lose(job, first, 1)

        second = job.start()
        attached = second.attached()
        assert attached["source"] == "peer memory"
        assert attached["step"] >= known
        known = _global_everywhere(second, attached["step"] + 8)
        _lose(job, second, 0)

        third = job.start(steps=second.newest_step("step") + 8)
        attached = third.attached()
        assert attached["source"] == "peer memory"
        assert attached["step"] >= known
        third.finished()
        for life in job.lives:
            life.exact()
        assert job.committed_steps()[-1] == third.newest_step("step"), "a rebuilt node saves like any other"
        job.sound()


def test_a_failure_while_replicas_are_fetched_and_restored_changes_nothing() -> None:
    with Job(**OPTIONS, persist_every=0) as job:
        first = job.start()
        known = _global_everywhere(first, 8)
        _lose(job, first, 1)

        second = job.start(kill={2: "recover.read:end:3"})
        second.ended()
        third = job.start(kill={3: "snapshot.seal:end:1"})
        step = third.attached()["step"]
        assert step >= known
        third.until(lambda: not third.processes[3].is_alive(), "the death of rank 3")
        _lose(job, third, 1)

        fourth = job.start(steps=step + 20)
        attached = fourth.attached()
        assert attached["source"] == "peer memory"
        assert attached["step"] >= step
        fourth.finished()
        fourth.exact()


def test_a_rotten_replica_is_not_used_and_storage_is_what_remains() -> None:
    with Job(**OPTIONS, persist_every=5) as job:
        first = job.start()
        first.event("committed", rank=0, step=5)
        _global_everywhere(first, 12)
        first.kill()
        with _guest_memory(job, 0).open("r+b") as memory:
            size = memory.seek(0, os.SEEK_END)
            memory.seek(size // 4)
            rotten = bytes(byte ^ 0x55 for byte in memory.read(3 * size // 4))
            memory.seek(size // 4)
            memory.write(rotten)
        _lose(job, first, 1)

        second = job.start(steps=first.newest_step("step") + 8)
        attached = second.attached()
        assert attached["source"] == "storage"
        assert attached["step"] % 5 == 0
        second.finished()
        second.exact()


def test_memory_that_has_rotted_here_is_fetched_from_its_replica() -> None:
    with Job(**OPTIONS, persist_every=0) as job:
        first = job.start()
        _global_everywhere(first, 8)
        first.kill()
        _, (arena,) = job.ask_agent("arena", node=1)
        size = os.fstat(arena).st_size
        page = bytes(byte ^ 0x55 for byte in os.pread(arena, size // 2, size // 2))
        os.pwrite(arena, page, size // 2)
        os.close(arena)

        second = job.start(steps=first.newest_step("step") + 8)
        attached = second.attached()
        assert attached["source"] == "peer memory"
        assert any("checksum" in line for line in attached["rejected"])
        second.finished()
        second.exact()


def test_replicas_behind_the_newest_snapshot_are_what_the_job_goes_back_to() -> None:
    with Job(**OPTIONS, persist_every=0) as job:
        first = job.start()
        _global_everywhere(first, 8)
        pid = job.agent_pid(1)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # it takes and sends no replicas any more
        stopped = first.newest_step("step")
        first.event("step", rank=0, step=stopped + 10)
        _lose(job, first, 1)

        second = job.start(steps=stopped + 20)
        attached = second.attached()
        assert attached["source"] == "peer memory"
        assert 8 <= attached["step"] < stopped + 10
        assert any("incomplete" in note for note in attached["notes"]), "what only one node had is no candidate"
        second.finished()
        second.exact()


def test_replicas_that_were_lost_with_an_agent_are_sent_to_its_successor() -> None:
    with Job(**OPTIONS, persist_every=0) as job:
        first = job.start()
        _global_everywhere(first, 8)
        former = job.kill_agent(1)
        first.until(lambda: job.agent_pid(1) not in (None, former), "a new agent")
        known = _global_everywhere(first, first.newest_step("step") + 10)
        _lose(job, first, 0)

        second = job.start(steps=first.newest_step("step") + 8)
        attached = second.attached()
        assert attached["source"] == "peer memory"
        assert attached["step"] >= known
        second.finished()
        second.exact()


@pytest.mark.slow
def test_a_save_under_way_when_a_node_is_lost_harms_nothing() -> None:
    with Job(**OPTIONS, persist_every=5) as job:
        first = job.start(save_at=12)
        known = _global_everywhere(first, 8)
        first.event("step", rank=2, step=12)
        _lose(job, first, 1)

        second = job.start(steps=first.newest_step("step") + 8)
        assert second.attached()["step"] >= known
        second.finished()
        second.exact()
        job.sound()


def test_with_all_replicas_lost_storage_is_what_remains() -> None:
    with Job(**OPTIONS, persist_every=5) as job:
        first = job.start()
        committed = first.event("committed", rank=0, step=5)["step"]
        for node in (0, 1):
            job.destroy_node(first, node)

        second = job.start(steps=first.newest_step("step") + 8)
        attached = second.attached()
        assert attached["source"] == "storage"
        assert attached["step"] >= committed
        second.finished()
        second.exact()


@pytest.mark.slow
@pytest.mark.parametrize("span", ["replica.fetch:begin:1", "replica.fetch:end:1"])
def test_an_agent_killed_while_it_fetches_replicas_changes_nothing(span: str) -> None:
    with Job(**OPTIONS, persist_every=0) as job:
        first = job.start()
        known = _global_everywhere(first, 8)
        run = job.run
        _lose(job, first, 1)
        agent = start_agent(job, run, kill=span, node=1)

        second = job.start()
        wait_killed(agent, second)
        second.ended()
        third = job.start(steps=known + 20)
        attached = third.attached()
        assert attached["source"] == "peer memory"
        assert attached["step"] >= known
        third.finished()
        third.exact()


@pytest.mark.slow
def test_an_agent_killed_while_it_sends_replicas_changes_nothing() -> None:
    with Job(**OPTIONS, persist_every=0) as job:
        agent = start_agent(job, "sends", kill="replica.send:end:2", node=1)
        first = job.start(run_id="sends")
        wait_killed(agent, first)
        known = _global_everywhere(first, first.newest_step("step") + 10)
        _lose(job, first, 0)

        second = job.start(steps=known + 20)
        attached = second.attached()
        assert attached["source"] == "peer memory"
        assert attached["step"] >= known
        second.finished()
        second.exact()


def _hosted_ranks(job: Job, node: int) -> set[int]:
    """Return the ranks of which a node's agent holds replicas."""
    held, _ = job.ask_agent("inventory", node=node)
    return {rank for *_, rank in held["replicas"]}


def _attached_exactly(life: Life) -> None:
    """Check what a second life begins with: every tensor as after its step, experts as after theirs."""
    for rank in range(life.size):
        event = life.event("attached", rank=rank)
        versions = {Expert(layer=layer, index=index): step for layer, index, step, _ in event["stale"]}
        assert event["tensors"] == mixed_tensors(rank, life.size, event["step"], versions), life.story()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "k"), [("full", {}), ("partial", {"k_snapshot": 1, "k_persist": 1})], ids=["full", "partial"]
)
def test_two_of_three_nodes_lost_at_once_cost_nothing_that_was_global(mode: str, k: dict[str, int]) -> None:
    """Twice: the second time with the only node that was left, when what came back empty must have been filled."""
    with Job(size=3, nodes=3, replicas=2, step_s=0.02, persist_every=0, mode=mode, **k) as job:
        former, known = job.start(), 0
        for lost in ((1, 2), (0, 1)):
            known = _global_everywhere(former, known + 8)
            assert [_hosted_ranks(job, node) for node in range(3)] == [{1, 2}, {0, 2}, {0, 1}]
            for node in lost:
                job.destroy_node(former, node)
            former.kill()

            former = job.start(**({"steps": former.newest_step("step") + 8} if job.lives[1:] else {}))
            attached = former.event("attached")
            assert attached["source"] == "peer memory", former.story()
            if len(job.lives) == 2:
                _attached_exactly(former)
            assert attached["step"] >= known, "nothing that was announced as global is lost"
            known = attached["step"]
        former.finished()
        for life in job.lives if mode == "full" else ():
            life.exact()
        job.sound()


@pytest.mark.slow
def test_neighbours_that_are_lost_together_have_their_replicas_elsewhere() -> None:
    with Job(size=4, nodes=4, replicas=1, step_s=0.02, persist_every=0) as job:
        first = job.start()
        known = _global_everywhere(first, 8)
        assert [_hosted_ranks(job, node) for node in range(4)] == [{2}, {3}, {0}, {1}]
        for node in (1, 2):
            job.destroy_node(first, node)
        first.kill()

        second = job.start(steps=first.newest_step("step") + 8)
        attached = second.attached()
        assert attached["source"] == "peer memory", second.story()
        assert attached["step"] >= known
        second.finished()
        second.exact()
        job.sound()


def test_more_replicas_than_other_nodes_are_refused_by_name() -> None:
    with Job(size=2, replicas=1) as job:
        assert "replicas=1 nodes=1 allowed=0..0" in job.start().refused("UsageError")
