"""SIGKILL at the spans of what happens once: an agent starts, adopts, leaves; a life begins, ends, is rewound."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from moc.cli.rewind import write_rewind
from moc.format.keys import CheckpointName
from moc.repository import Repository
from moc.store.open import open_store
from moc.trace import Trace
from tests.support.job import Job, Life, start_agent, until, wait_killed
from tests.support.kill import KillAt, run_apart
from tests.support.spans import FORCED, STORE

RUN = "transitions"


QUICK = {  # the one of the two events after which more is unfinished; the other one is slow
    "agent.adopt": "begin",
    "agent.begin": "end",
    "agent.fence": "begin",
    "agent.leave": "begin",
    "agent.listen": "begin",
    "agent.reconnect": "end",
    "agent.start": "end",
    "detach.drain": "begin",
    "detach.seal": "begin",
    "life.renew": "end",
    "rewind.record": "end",
}


def _die(life: Life, rank: int) -> None:
    codes = life.ended()
    assert codes[rank] == -signal.SIGKILL, f"the kill point was not reached: {codes}\n{life.story()}"


def _go_on(job: Job, *, at_least: int, source: str | None = None, steps: int = 4) -> None:
    """Start the next life, check where it begins, and let it come to a good end with everything intact."""
    life = job.start(steps=at_least + steps)
    attached = life.attached()
    assert attached["step"] >= at_least, life.story()
    assert source in (None, attached["source"]), life.story()
    life.finished()
    life.exact()
    job.sound()


def _agent_start(event: str) -> None:
    with Job(size=2) as job:
        _die(job.start(kill={0: f"agent.start:{event}:1"}), 0)
        _go_on(job, at_least=0)


def _agent_listen(event: str) -> None:
    with Job(size=2, run_id=RUN) as job:
        agent = start_agent(job, RUN, f"agent.listen:{event}:1", is_awaited=False)
        assert agent.wait(60) == -signal.SIGKILL
        _go_on(job, at_least=0)


def _agent_at_attach(span: str, event: str) -> None:
    """The agent dies while the second life begins, and with it the memory."""
    with Job(size=2, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, f"{span}:{event}:2")
        first = job.start()
        first.event("committed", step=5)
        first.kill()
        announced = first.newest_step("committed")
        job.start().refused("StoreUnavailableError")
        assert agent.wait(60) == -signal.SIGKILL
        _go_on(job, at_least=announced, source="storage")


def _agent_adopt(event: str) -> None:
    with Job(size=2, run_id=RUN, step_s=0.002) as job:
        life = job.start()
        life.event("committed", step=5)
        life.signal(signal.SIGSTOP)  # so that nobody starts another agent first
        job.kill_agent()
        agent = start_agent(job, RUN, f"agent.adopt:{event}:1")
        life.signal(signal.SIGCONT)
        wait_killed(agent, life)
        life.event("committed", step=life.newest_step("step") + 1)
        life.kill()
        life.exact()
        _go_on(job, at_least=life.newest_step("global"), source="memory")


def _agent_reconnect(event: str) -> None:
    with Job(size=2, step_s=0.002) as job:
        life = job.start(kill={0: f"agent.reconnect:{event}:1"})
        life.event("committed", step=5)
        job.kill_agent()
        _die(life, 0)
        if event == "end":  # the new agent has the arena
            _go_on(job, at_least=life.newest_step("global"), source="memory")
        else:
            _go_on(job, at_least=life.newest_step("committed"), source="storage")


def _agent_leave(event: str) -> None:
    with Job(size=2, run_id=RUN, persist_every=7) as job:
        agent = start_agent(job, RUN, f"agent.leave:{event}:1")
        life = job.start(steps=10)
        life.finished()
        assert agent.wait(60) == -signal.SIGKILL
        until(lambda: job.agent_pid() is None, "an orderly end takes the agent along")
        assert job.committed_steps()[-1] == 10
        _go_on(job, at_least=10, source="storage")


def _detach(span: str, event: str) -> None:
    with Job(size=2, persist_every=7) as job:
        life = job.start(steps=10, kill={0: f"{span}:{event}:1"})
        _die(life, 0)
        life.exact()
        is_sealed = (span, event) != ("detach.seal", "begin")
        _go_on(job, at_least=10 if is_sealed else life.newest_step("global") or 0)


def _life_renew(event: str) -> None:
    """Before the record of the new life the old one is gone on with; after it nothing moc knows belongs to the job."""
    points = {
        "begin": ("life.renew:begin:1", "attach.record:begin:2"),
        "end": ("attach.record:end:2", "life.renew:end:1"),
    }
    for kill in points[event]:
        with Job(size=2, persist_every=0, step_s=0.002) as job:
            life = job.start(renew_at=6, kill={0: kill})
            _die(life, 0)
            assert life.newest_step("step") in (6, 7), "the other rank may have gone on"
            if event == "begin":
                _go_on(job, at_least=life.newest_step("global"), source="memory")
                continue
            again = job.start(steps=3)
            attached = again.attached()
            assert (attached["step"], attached["source"]) == (0, None), again.story()
            again.finished()
            again.exact()


def _rewind_record(event: str) -> None:
    with Job(size=1, persist_every=3, keep_last=50) as job:
        life = job.start()
        life.event("committed", step=9)
        life.event("global", step=life.newest_step("committed") + 1)
        life.kill()
        names = [checkpoint.name for checkpoint in job.repository().checkpoints()[:2]]
        for span in ("rewind.record", *STORE):
            # To the one or the other: a rewind that is there is not written again.
            records, _ = job.repository().incarnations()
            before, newest = len(records), records[-1].parent
            target = names[int(newest is not None and newest.step == names[0].step)]
            assert run_apart(rewind_to, str(job.storage), target, f"{span}:{event}:1") == -signal.SIGKILL, span
            records, findings = job.repository().incarnations()
            assert not findings, f"{span}:{event}"
            assert before <= len(records) <= before + 1
            job.sound()
        assert run_apart(rewind_to, str(job.storage), target, None) == 0
        again = job.start(steps=target.step + 3)
        assert again.attached()["step"] == target.step
        again.finished()


def rewind_to(storage: str, name: CheckpointName, kill: str | None) -> None:
    """Do what `moc rewind` does, in a process that dies at a span."""
    trace = Trace(*([] if kill is None else [KillAt.parse(kill)]))
    repository = Repository(open_store(storage, trace=trace))
    write_rewind(repository, repository.read_manifest(name), trace=trace)


SCENARIOS: dict[str, Callable[[str], None]] = {
    "agent.adopt": _agent_adopt,
    "agent.begin": lambda event: _agent_at_attach("agent.begin", event),
    "agent.fence": lambda event: _agent_at_attach("agent.fence", event),
    "agent.leave": _agent_leave,
    "agent.listen": _agent_listen,
    "agent.reconnect": _agent_reconnect,
    "agent.start": _agent_start,
    "detach.drain": lambda event: _detach("detach.drain", event),
    "detach.seal": lambda event: _detach("detach.seal", event),
    "life.renew": _life_renew,
    "rewind.record": _rewind_record,
}


@pytest.mark.parametrize(
    ("span", "event"),
    [
        pytest.param(span, event, marks=[] if QUICK[span] == event else pytest.mark.slow)
        for span in FORCED
        for event in ("begin", "end")
    ],
)
def test_a_kill_at_a_span_of_a_transition_loses_nothing_that_was_promised(span: str, event: str) -> None:
    SCENARIOS[span](event)
