"""Many lives over one repository: random kills, rewinds, zombies, other numbers of ranks."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
from pathlib import Path

import pytest

from moc.format.manifest import Incarnation, Parent
from tests.support.job import Job, Life, lineage_steps, until

SEED = int(os.environ.get("MOC_CRASH_SEED", "20240607"))


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_lose_nothing_that_was_announced(kills: int, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(SEED)
    with capsys.disabled():
        print(f" seed={SEED}", end="")
    with Job(size=2, persist_every=3, step_s=0.001) as job:
        announced = known = 0
        for number in range(kills):
            life = job.start()
            attached = life.attached()
            where = f"life {number + 1} seed {SEED}\n{life.story()}"
            assert attached["step"] >= announced, f"lost commit {announced}: {where}"
            assert attached["step"] >= known, f"lost global step {known}: {where}"
            assert (attached["source"] is None) == (attached["step"] == 0), where
            known = attached["step"]
            _let_run(life, attached["step"] + chance.randrange(0, 14))
            victims = chance.choice(["rank", "rank", "all", "agent", "both", "both"])
            if victims in ("agent", "both"):
                if job.agent_pid() is not None:
                    job.kill_agent()
                if victims == "agent":
                    reached = life.newest_step("step") or attached["step"]
                    _let_run(life, reached + chance.randrange(1, 30))
            life.kill(*([] if victims in ("all", "both") else [chance.randrange(2)]))
            life.ended()
            life.exact()
            announced = max(announced, life.newest_step("committed") or 0)
            if victims == "both" or job.agent_pid() is None:
                known = announced
            elif victims != "agent":
                known = max(known, life.newest_step("global") or 0)
            else:  # a new agent may or may not have been given the arena before its trainers died
                known = announced
        last = job.start(steps=known + 60)
        assert last.attached()["step"] >= max(known, announced)
        last.finished()
        last.exact()
        job.sound()
        steps = lineage_steps(job.lives)
        assert steps == list(range(1, len(steps) + 1)), "a step of the lineage is missing or was done twice"


def _let_run(life: Life, step: int) -> None:
    if step:
        life.until(lambda: (life.newest_step("step") or 0) >= step, f"step {step}")


def _rewind(job: Job, step: int) -> Incarnation:
    """Write the record that `moc rewind` writes."""
    repository = job.repository()
    name = next(c.name for c in repository.checkpoints() if c.name.step == step)
    number = max(number for _, number in repository.incarnation_numbers()) + 1
    record = Incarnation(
        run=name.run,
        number=number,
        token=secrets.token_hex(4),
        parent=Parent(incarnation=name.incarnation, step=name.step, attempt=name.attempt),
        reason="rewind",
        fingerprint=repository.read_manifest(name).fingerprint,
    )
    repository.put_incarnation(record)
    repository.close()
    return record


def test_a_rewind_outranks_memory_and_survives_failed_starts() -> None:
    with Job(size=2, persist_every=5, keep_last=50) as job:
        first = job.start()
        first.event("committed", step=10)
        first.event("global", step=first.event("committed", step=10)["step"] + 1)
        first.kill()
        target = job.committed_steps()[0]
        assert first.newest_step("global") > target
        record = _rewind(job, target)

        # Lives that die before their first snapshot: at the record, at the begin, in the first step.
        for kill in ("attach.record:begin:1", "attach.record:end:1", "attach.begin:end:1", "snapshot.capture:begin:1"):
            failed = job.start(kill={0: kill})
            failed.ended()
            attached = failed.last(0, "attached")
            assert attached is None or attached["step"] == target, f"{kill}\n{failed.story()}"
            known = failed.newest_step("global")
            assert known is None

        second = job.start()
        attached = second.attached()
        assert attached["step"] == target
        assert attached["incarnation"] > record.number
        second.event("global", step=target + 2)
        second.kill()
        third = job.start(steps=target + 40)
        assert third.attached()["step"] >= second.newest_step("global")
        third.finished()
        for life in (first, second, third):
            life.exact()


def test_a_rewind_to_what_is_gone_meanwhile_begins_nothing_unasked() -> None:
    with Job(size=1, persist_every=5, keep_last=50) as job:
        first = job.start()
        first.event("committed", step=10)
        first.kill()
        target = job.committed_steps()[0]
        _rewind(job, target)
        repository = job.repository()
        (gone,) = (c.name for c in repository.checkpoints() if c.name.step == target)
        repository.delete_manifest(gone)  # as a round of retention may while the rewind is written
        repository.close()

        assert "rewound to a checkpoint that is gone" in job.start().refused("NoCheckpointError")
        second = job.start(restore="never", steps=3)
        assert second.attached()["source"] is None
        second.finished()


def test_a_rewind_during_training_fences_the_saves_of_the_life_that_goes_on() -> None:
    with Job(size=1, persist_every=5, keep_last=50) as job:
        first = job.start(step_s=0.002)
        target = first.event("committed", step=5)["step"]
        first.event("committed", step=target + 1)
        _rewind(job, target)
        before = set(job.committed_steps())
        first.event("global", step=first.newest_step("step") + 30)
        late = set(job.committed_steps()) - before
        assert len(late) <= 1, "only a commit whose look at the records came before the rewind may pass"
        first.kill()
        second = job.start(steps=target + 3)
        assert second.attached()["step"] == target
        second.finished()


def test_a_stopped_trainer_of_an_older_life_is_killed_before_its_memory_is_used_again() -> None:
    with Job(size=2) as job:
        first = job.start()
        first.event("global", step=10)
        first.signal(signal.SIGSTOP, 1)
        first.kill(0)

        second = job.start()
        attached = second.attached()
        assert attached["source"] == "memory"
        assert attached["step"] >= first.newest_step("global")
        assert any(str(first.pid(1)) in note for note in attached["notes"]), attached["notes"]
        assert not first.processes[1].is_alive()
        assert first.ended()[1] == -9
        second.event("global", step=attached["step"] + 5)
        second.kill()
        second.exact()


@pytest.mark.slow
def test_a_life_whose_trainers_are_all_stopped_is_taken_for_hung() -> None:
    with Job(size=2) as job:
        first = job.start()
        first.event("global", step=10)
        first.signal(signal.SIGSTOP)
        second = job.start()
        assert second.attached()["step"] >= first.newest_step("global")
        assert first.ended() == [-9, -9]


@pytest.mark.parametrize("source", ["memory", "storage"])
def test_other_numbers_of_ranks(source: str) -> None:
    with Job() as job:
        known = 0
        for size in (2, 1, 3, 2):
            life = job.start(size=size)
            attached = life.attached()  # compares every rank's tensors with an undisturbed run of this size
            assert attached["step"] >= known
            if known:
                assert attached["source"] == source
            known = life.event("committed", step=attached["step"] + 1)["step"]
            life.kill()
            if source == "memory":
                known = max(known, life.newest_step("global"))
            else:
                job.kill_agent()
                known = life.newest_step("committed")


def test_other_number_of_ranks_then_a_failed_start_then_another_number() -> None:
    # The arena of the two ranks is the only copy, through two changes of the layout that never come to a global step.
    with Job(persist_every=0) as job:
        first = job.start(size=2)
        first.event("global", step=7)
        first.kill()
        known = first.newest_step("global")
        for size in (1, 3, 3, 1):
            failed = job.start(size=size, kill={0: "snapshot.capture:begin:1"})
            failed.ended()
            attached = failed.last(0, "attached")
            assert attached is not None, failed.story()
            assert attached["step"] >= known
        last = job.start(size=2, steps=known + 5)
        assert last.attached()["source"] == "memory"
        assert last.attached()["step"] >= known
        last.finished()
        assert job.agent_pid() is None


def test_the_agent_closes_the_arenas_that_nothing_needs() -> None:
    with Job(persist_every=0, step_s=0.002) as job:
        for size in (2, 1, 3, 1, 2):
            life = job.start(size=size, kill={0: "snapshot.capture:begin:1"})
            life.ended()
        life = job.start(size=1)
        life.event("global", step=3)
        pid = job.agent_pid()
        until(lambda: _arenas(pid) == 1, "the agent closes the other arenas")


def _arenas(pid: int | None) -> int:
    """Return how many arenas a process holds; each mapping has a second descriptor of its own."""
    held = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # descriptors of connections come and go
            if "memfd:moc-" in os.readlink(path):
                held.add(path.stat().st_ino)
    return len(held)
