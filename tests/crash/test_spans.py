"""SIGKILL at the begin and the end of every span of trainer and agent: each life is the recovery of the one before."""

from __future__ import annotations

import pytest

from tests.support.job import Job, Life, start_agent, wait_killed
from tests.support.spans import AGENT, TRAINER

AT_ATTACH = ("attach.", "recover.", "store.")
TRAINING = ("train.forward", "train.update")  # of the workers themselves
RUN = "spans"

TELLING = ("commit.put:end", "retention.delete:end", "store.delete:end")  # where no other span begins at once


def at_both_events(spans: tuple[str, ...]) -> pytest.MarkDecorator:
    """Parametrize over begin and end of each span; ends are slow, because the next span begins there, but for some."""
    cases = [
        pytest.param(span, event, marks=() if event == "begin" or f"{span}:end" in TELLING else pytest.mark.slow)
        for span in spans
        for event in ("begin", "end")
    ]
    return pytest.mark.parametrize(("span", "event"), cases)


def _die(life: Life, victim: int) -> None:
    """Wait until the victim is dead by its own hand and the others have noticed."""
    codes = life.ended()
    assert codes[victim] == -9, f"the kill point was not reached: {codes}\n{life.story()}"


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])  # rank 0 has all spans that 1 has
def test_trainer_killed_at_every_span(victim: int) -> None:
    with Job(size=2, persist_every=4) as job:
        start = job.start()
        start.event("committed", step=4)
        start.kill()
        known = start.newest_step("global")
        attached_lives = 0
        spans = [span for span in TRAINER + TRAINING if victim == 0 or not span.startswith(("attach.record", "store."))]
        for span in spans:
            for event in ("begin", "end"):
                # The training spans occur once per step: the third makes sure that there is something to lose.
                count = 1 if span.startswith(AT_ATTACH) or span in ("snapshot.stall", "save.take") else 3
                save_at = known + 5 if span == "save.take" else None
                life = job.start(kill={victim: f"{span}:{event}:{count}"}, save_at=save_at)
                _die(life, victim)
                attached = life.last(0, "attached")
                if attached is not None:
                    attached_lives += 1
                    assert attached["source"] == "memory", f"{span}:{event}\n{life.story()}"
                    assert attached["step"] >= known, f"{span}:{event} lost a global step\n{life.story()}"
                known = max(known, life.newest_step("global") or 0)
                life.exact()
        last = job.start(steps=known + 9)
        attached = last.attached()
        assert attached["source"] == "memory"
        assert attached["step"] >= known
        last.finished()
        last.exact()
        assert attached_lives >= 10
        assert not job.committed_steps() or max(job.committed_steps()) == last.newest_step("step")


@at_both_events(AGENT)
def test_agent_killed_at_every_span_together_with_the_trainers(span: str, event: str) -> None:
    # keep_last=1 makes retention work at the second commit and delete at the third.
    with Job(size=1, persist_every=2, keep_last=1, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, f"{span}:{event}:{4 if span.startswith('store.') else 2}")
        life = job.start()
        wait_killed(agent, life)
        life.kill()
        announced = life.newest_step("committed") or 0

        second = job.start(steps=announced + 9)
        attached = second.attached()
        if attached["source"] is None:
            assert not announced
            assert not job.committed_steps()[:-1]
        else:
            assert attached["step"] >= announced
        second.finished()
        second.exact()
        job.sound()


@at_both_events(("save.persist", "persist.put", "commit.put", "retention.condemn", "retention.delete"))
def test_agent_killed_at_a_span_and_adopted(span: str, event: str) -> None:
    with Job(size=2, persist_every=2, keep_last=1, run_id=RUN, step_s=0.002) as job:
        agent = start_agent(job, RUN, f"{span}:{event}:2")
        life = job.start()
        wait_killed(agent, life)
        life.event("committed", step=(life.newest_step("step") or 0) + 3)
        life.kill()
        job.sound()
        second = job.start(steps=life.newest_step("step") + 3)
        attached = second.attached()
        assert attached["source"] == "memory"
        assert attached["step"] >= life.newest_step("global")
        second.finished()
        second.exact()
        job.sound()
