"""Every rule of the doctor: facts of a healthy job raise none, one changed fact raises the right one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import moc
from moc.doctor.evidence import AgentFacts, Facts
from moc.doctor.judge import NOTE, PROBLEM, WARNING, judge
from moc.doctor.node import allowed_environment, secrets_of

NOW_S = 1_800_000_000.0
STACK = 'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in copy\n\nThread 0x2 (most recent call first):\n'
STACK += '  File "ddp.py", line 7 in all_reduce\n  File "train.py", line 9 in main\n'


def healthy() -> Facts:
    ranks = [
        {
            "rank": rank,
            "pid": 100 + rank,
            "alive": True,
            "incarnation": 2,
            "version": moc.__version__,
            "sealed_step": 40,
            "beat_step": 41,
            "beat_age_s": 0.5,
            "beat_interval_ns": 10**9,
        }
        for rank in (0, 1)
    ]
    status = {
        "version": moc.__version__,
        "incarnation": 2,
        "ranks": ranks,
        "global_step": 40,
        "last_committed_step": 20,
        "last_error": None,
    }
    agent = AgentFacts(
        run="run-1",
        folder="/tmp/moc-0/run-1",
        pid=99,
        is_listening=True,
        status=status,
        diagnosis={
            "descriptor": {"config": {"snapshot_every": 1, "persist_every": 20}},
            "arena": {"ranks": [{"rank": 0, "corrupt": []}, {"rank": 1, "corrupt": []}]},
        },
        log_tail="agent listens",
        stacks=[{"name": f"rank{r:05d}", "pid": 100 + r, "text": STACK, "problem": None} for r in (0, 1)],
        processes=[{"pid": pid, "state": "sleeping", "executable": "/bin/python"} for pid in (99, 100, 101)],
    )
    return Facts(
        epoch_s=NOW_S,
        node={
            "available_bytes": 8 << 30,
            "limits": {"NOFILE": [1024, 4096]},
            "cgroups": [{"path": "/a", "memory.events": "low 0\noom 3\noom_kill 0"}],
        },
        agents=[agent],
        repository={
            "url": "/data/repo",
            "exists": True,
            "answer_s": 0.1,
            "free_bytes": 100 << 30,
            "findings": [],
            "checked": [{"name": "n", "size_bytes": 1 << 30, "findings": []}],
            "checkpoints": [{"name": "n", "modified_s": NOW_S - 10}],
            "newest_incarnation": 2,
        },
    )


def status(facts: Facts, **fields: object) -> None:
    found = facts.agents[0].status
    assert found is not None
    found.update(fields)


def rank(facts: Facts, number: int, **fields: object) -> None:
    found = facts.agents[0].status
    assert found is not None
    found["ranks"][number].update(fields)


def silent(facts: Facts, state: str) -> None:
    facts.agents[0].status = facts.agents[0].diagnosis = None
    facts.agents[0].processes[0]["state"] = state


def arena(facts: Facts, **fields: object) -> None:
    found = facts.agents[0].diagnosis
    assert found is not None
    found["arena"]["ranks"][1].update(fields)


Change = Callable[[Facts], Any]
CASES: list[tuple[str, str, Change]] = [
    (PROBLEM, "storage does not answer: late", lambda f: f.troubles.update(repository="late")),
    (WARNING, "could not look at everything: part=node", lambda f: f.troubles.update(node="late")),
    (PROBLEM, "memory is nearly exhausted: available_bytes=1", lambda f: f.node.update(available_bytes=1)),
    (
        WARNING,
        "the out-of-memory killer has been here: cgroup=/a kills=2",
        lambda f: f.node["cgroups"][0].update({"memory.events": "oom 3\noom_kill 2"}),
    ),
    (WARNING, "few file descriptors", lambda f: f.node["limits"].update(NOFILE=[64, 64])),
    (WARNING, "the agent has another version", lambda f: status(f, version="0.0.1")),
    (PROBLEM, "a newer life has begun elsewhere", lambda f: f.repository.update(newest_incarnation=3)),
    (WARNING, "logged a traceback", lambda f: setattr(f.agents[0], "log_tail", "Traceback (most recent call last):")),
    (PROBLEM, "does not answer: run=run-1 pid=99 state=stopped", lambda f: silent(f, "stopped")),
    (PROBLEM, "does not answer: run=run-1 pid=99 state=sleeping", lambda f: silent(f, "sleeping")),
    (PROBLEM, "ended=[1] alive=[0]", lambda f: rank(f, 1, alive=False)),
    (PROBLEM, 'seconds=16 at=File "ddp.py", line 7 in all_reduce', lambda f: rank(f, 1, beat_age_s=16.0)),
    (PROBLEM, "a trainer is stopped: run=run-1 pid=101", lambda f: f.agents[0].processes[2].update(state="stopped")),
    (PROBLEM, "ranks run different software", lambda f: rank(f, 1, version="0.0.1")),
    (PROBLEM, "ranks run different software", lambda f: f.agents[0].processes[2].update(executable="/bin/other")),
    (PROBLEM, "the last save failed: run=run-1 reason=disk", lambda f: status(f, last_error="disk")),
    (
        WARNING,
        "storage is slower than persist_every",
        lambda f: status(f, last_error="save skipped: the previous save is still under way"),
    ),
    (PROBLEM, "no snapshot of all ranks for more than 3 intervals", lambda f: status(f, global_step=37)),
    (PROBLEM, "no snapshot of all ranks for more than 3 intervals", lambda f: status(f, global_step=None)),
    (
        PROBLEM,
        "no checkpoint for more than 3 intervals: run=run-1 step=81 last=20",
        lambda f: (rank(f, 0, beat_step=81), rank(f, 1, beat_step=81), status(f, global_step=80)),
    ),
    (PROBLEM, "seal records are corrupt: run=run-1 rank=1 records=[2]", lambda f: arena(f, corrupt=[2])),
    (WARNING, "there is no repository", lambda f: f.repository.update(exists=False)),
    (PROBLEM, "a record is unreadable: x", lambda f: f.repository.update(findings=["x"])),
    (PROBLEM, "not sound: name=n bad", lambda f: f.repository["checked"][0].update(findings=["bad"])),
    (WARNING, "storage answers slowly", lambda f: f.repository.update(answer_s=9.0)),
    (PROBLEM, "storage is nearly full", lambda f: f.repository.update(free_bytes=1 << 30)),
    (WARNING, "in the future", lambda f: f.repository["checkpoints"][0].update(modified_s=NOW_S + 60)),
]


def test_a_healthy_job_has_no_symptoms() -> None:
    assert judge(healthy()) == []


@pytest.mark.parametrize(("severity", "text", "change"), CASES, ids=[text for _, text, _ in CASES])
def test_one_changed_fact_is_one_symptom(severity: str, text: str, change: Change) -> None:
    facts = healthy()
    change(facts)
    before = copy.deepcopy(facts)

    (symptom,) = judge(facts)

    assert symptom.severity == severity
    assert text in symptom.text
    assert symptom.hint
    assert facts == before, "pure"


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (rank(f, 0, alive=False), rank(f, 1, alive=False)),
        lambda f: (silent(f, "?"), setattr(f.agents[0], "is_listening", False)),
        lambda f: f.agents.clear(),
    ],
)
def test_a_job_that_has_ended_is_a_note(change: Change) -> None:
    facts = healthy()
    change(facts)

    assert [symptom.severity for symptom in judge(facts)] == [NOTE]


def test_a_slow_job_is_not_taken_for_a_silent_one() -> None:
    facts = healthy()
    rank(facts, 1, beat_age_s=100.0, beat_interval_ns=40 * 10**9)

    assert judge(facts) == []


def test_the_worst_comes_first_and_nothing_that_is_missing_is_an_error() -> None:
    facts = healthy()
    facts.repository.update(answer_s=9.0)
    rank(facts, 1, alive=False)

    assert [symptom.severity for symptom in judge(facts)] == [PROBLEM, WARNING]
    assert [s.severity for s in judge(Facts(epoch_s=0.0, agents=[AgentFacts(run="a", folder="b")]))] == [NOTE]


def test_of_the_environment_only_allowed_names_are_shown_and_secrets_are_known_by_theirs() -> None:
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "8",
        "MOC_STORAGE": "s3://a:hunter2@b/c",
        "NCCL_DEBUG": "INFO",
        "AWS_SECRET_ACCESS_KEY": "hunter2hunter2",
        "HF_TOKEN": "hunter3hunter3",
        "X_RANK": "hidden",
        "RANKED": "hidden",
        "SHORT_KEY": "abc",
    }

    shown = {"MOC_STORAGE": "s3://b/c", "NCCL_DEBUG": "INFO", "RANK": "0", "WORLD_SIZE": "8"}
    assert allowed_environment(environment) == shown
    assert secrets_of(environment) == {"hunter2hunter2", "hunter3hunter3"}
