"""Partial checkpoints that the agents of two nodes make together: killed, restarted, leaving, behind with commits.

What is stored is judged as on one node (`tests.crash.test_partial`): every expert is committed within a turn, and has
the bytes that the life of its source had.
"""

from __future__ import annotations

import signal

import pytest

from moc.routing import Routing
from tests.crash.test_partial import EXPERTS, GRID, RUN, TURN, go_on, judge, partial_job
from tests.support.job import Job, Life, start_agent, wait_killed

# By 4 ranks on 2 nodes every expert has a slice on each node, by 2 ranks each node has its own experts.
SHARED, DIVIDED = 4, 2


def _end(job: Job, life: Life) -> None:
    """Kill everything at once, so that nothing is stored whole at the end."""
    life.kill()
    for node in (0, 1):
        job.kill_agent(node)


@pytest.mark.parametrize("size", [SHARED, pytest.param(DIVIDED, marks=pytest.mark.slow)])
def test_experts_take_turns_over_two_nodes_and_memory_is_recovered(size: int) -> None:
    with partial_job(k_snapshot=2, size=size, nodes=2) as job:
        first = job.start()
        go_on(first, commits=TURN + 1)
        advice = first.until(lambda: job.ask_agent("status", node=1)[0]["advice"], "advice")
        assert (advice["experts"], advice["present"]["k_snapshot"]) == (EXPERTS, 2), "of the model, not of the node"
        known = first.newest_step("global")
        first.kill()

        second = job.start()
        attached = second.event("attached")
        assert attached["source"] == "memory", second.story()
        assert attached["step"] >= known
        go_on(second, commits=TURN)
        _end(job, second)

        judge(job)


@pytest.mark.parametrize(
    ("span", "event", "victim"),
    [
        pytest.param("save.offer", "begin", 1, marks=pytest.mark.slow),
        pytest.param("save.offer", "begin", 0, marks=pytest.mark.slow),
        pytest.param("save.offer", "end", 0, marks=pytest.mark.slow),
        ("save.offer", "end", 1),
        pytest.param("persist.put", "end", 1, marks=pytest.mark.slow),
        pytest.param("save.gather", "begin", 0, marks=pytest.mark.slow),
        pytest.param("save.gather", "begin", 1, marks=pytest.mark.slow),
        pytest.param("commit.put", "begin", 0, marks=pytest.mark.slow),
        pytest.param("commit.put", "end", 0, marks=pytest.mark.slow),
        pytest.param("retention.drop", "begin", 0, marks=pytest.mark.slow),
    ],
)
def test_an_agent_killed_at_a_span_of_a_joint_save_is_followed_by_one_that_goes_on_with_the_turn(
    span: str, event: str, victim: int
) -> None:
    with partial_job(k_snapshot=2, size=SHARED, nodes=2) as job:
        agent = start_agent(job, RUN, f"{span}:{event}:2", node=victim)
        life = job.start()
        wait_killed(agent, life)
        go_on(life, commits=TURN + 1)
        _end(job, life)

        judge(job)


@pytest.mark.slow
@pytest.mark.parametrize("span", ["save.offer", "commit.put"])
def test_both_agents_killed_in_a_joint_save_are_followed_by_two_that_go_on_with_the_turn(span: str) -> None:
    with partial_job(k_snapshot=2, size=SHARED, nodes=2) as job:
        agent = start_agent(job, RUN, f"{span}:end:3")
        life = job.start()
        wait_killed(agent, life)
        job.kill_agent(1)
        go_on(life, commits=TURN + 1)
        _end(job, life)

        judge(job)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_life_after_a_lost_node_goes_on_with_the_turn(lost: int) -> None:
    with partial_job(k_snapshot=2, size=SHARED, nodes=2) as job:
        first = job.start()
        go_on(first, commits=TURN + 1)
        job.destroy_node(first, lost)
        first.ended()
        second = job.start()
        attached = second.event("attached")
        assert attached["source"] == "storage"
        assert attached["step"] >= (first.newest_step("committed") or 0)
        go_on(second, commits=2)
        _end(job, second)

        stored = judge(job)

        assert {manifest.name.incarnation for manifest in stored} == {1, 2}, "some are of either life"


@pytest.mark.parametrize("k_snapshot", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_that_ends_well_has_its_last_step_whole(k_snapshot: int | None) -> None:
    """Without `k_snapshot` the last snapshot has all experts, and a checkpoint of its own that may lack some."""
    with partial_job(k_snapshot=k_snapshot, size=DIVIDED, nodes=2) as job:
        life = job.start(steps=TURN * 2 * 2)
        life.finished()

        manifests = judge(job, is_partial=False)

        assert manifests[-1].name.step == TURN * 2 * 2
        assert manifests[-1].stale_experts == ()
        assert [job.agent_pid(node) for node in (0, 1)] == [None, None]


@pytest.mark.parametrize("leaver", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_agent_that_leaves_has_all_nodes_store_the_last_snapshot_whole(leaver: int) -> None:
    with partial_job(size=SHARED, nodes=2) as job:
        life = job.start()
        go_on(life, commits=TURN)
        life.kill()
        answer, _ = job.ask_agent("drain", node=leaver)

        manifests = judge(job, is_partial=False)

        assert answer["last_error"] is None
        assert manifests[-1].name.step == answer["last_committed_step"] >= (life.newest_step("global") or 0)
        assert manifests[-1].stale_experts == (), "memory had all experts of its newest step"
        assert job.ask_agent("status", node=1 - leaver)[0]["last_error"] is None


@pytest.mark.slow
def test_routes_of_all_nodes_decide_by_load_and_stand_in_every_manifest() -> None:
    with partial_job(size=SHARED, nodes=2) as job:
        life = job.start(mode="partial_by_load", routes=True)
        go_on(life, commits=TURN * 2)
        life.signal(signal.SIGTERM)
        life.finished()

        repository = job.repository()
        manifests = [repository.read_manifest(stored.name) for stored in repository.checkpoints()]
        for manifest in manifests:
            expected = Routing(basis="kept", routed=(counts := _routed(life, manifest.name.step)), learned=counts)
            assert manifest.routing == expected, str(manifest.name)
        assert any(row.routed for manifest in manifests for row in manifest.stale_experts)
        job.sound()
        repository.close()


def _routed(life: Life, step: int) -> tuple[tuple[int, ...], ...]:
    """Return what the trainers say that they have routed by a step."""
    counts = dict.fromkeys(GRID, 0)
    for rank in range(life.size):
        for event in life.events(rank, "step"):
            if event["step"] <= step:
                for expert in GRID:
                    counts[expert] += event["routes"][expert.layer][expert.index]
    layers = sorted({expert.layer for expert in GRID})
    return tuple(tuple(counts[expert] for expert in GRID if expert.layer == layer) for layer in layers)
