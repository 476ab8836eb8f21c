"""Collection: what nothing references goes, and nothing else, whoever dies, comes late or begins meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moc.collect import SETTLE_S, CollectReport, collect, fence, find_garbage
from moc.commit import commit
from moc.errors import CoordinationError, FencedError, IntegrityError, MocError, PlanDivergedError, StoreFullError
from moc.format.manifest import Incarnation, Manifest, Parent
from moc.gc import Retention
from moc.host import SystemHost
from moc.plan.lineage import STORAGE, Candidate, candidates
from moc.repository import Repository
from moc.store.local import LocalStore
from moc.store.memory import MemoryStore
from moc.trace import Trace
from moc.verify import verify_repository
from tests.cli.console import flip_bit, manifest_path, moc, moc_json
from tests.support.job import Job, start_agent, wait_killed
from tests.support.kill import died_within
from tests.support.repository import Model, RepositoryBuilder, build_history

TRACE = Trace()
DAY_S = 86_400
KILL_LIMIT = 400  # far above the number of spans


class MovedClock(SystemHost):
    """Time that passes only in `sleep`, during which something may happen."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.slept_s, self._meanwhile = 0.0, meanwhile

    def now_s(self) -> float:
        return self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self._meanwhile()


def _collect(
    repository: Repository, *, off_lineage: bool = False, settle_s: float = SETTLE_S, clock: MovedClock | None = None
) -> CollectReport:
    return collect(
        repository,
        with_off_lineage=off_lineage,
        settle_s=settle_s,
        host=clock or MovedClock(),
        trace=TRACE,
        on_wait=lambda _: None,
    )


def _fence(repository: Repository) -> Incarnation | None:
    return fence(repository, find_garbage(repository, with_off_lineage=False, trace=TRACE), trace=TRACE)


def _litter(builder: RepositoryBuilder, incarnation: int, step: int) -> set[str]:
    """Write the objects of a save that is never committed; returns their keys."""
    name = builder.name(incarnation, step)
    return {row.key for catalog in builder.model.catalogs() for row in builder.write_objects(name, catalog)}


def _keys(repository: Repository) -> set[str]:
    return {entry.key for entry in repository.store.list("")}


def _littered(
    store: MemoryStore | LocalStore, model: Model | None = None
) -> tuple[RepositoryBuilder, set[str], set[str]]:
    """Write the history and a life 4 after its rewind, with leftovers in fenced lives and in the newest one."""
    builder = build_history(store, model=model)
    builder.begin(4, parent=Parent(incarnation=2, step=30, attempt=builder.name(2, 30).attempt))
    fenced = _litter(builder, 1, 35) | _litter(builder, 2, 45)
    builder.repository.put_victims("run-7", 1, sorted(_litter(builder, 1, 5)))
    fenced |= set(builder.repository.read_victims("run-7", 1))
    return builder, fenced, _litter(builder, 4, 50)


def _recovery_order(repository: Repository) -> list[tuple[int, int]]:
    known = [
        Candidate(
            source=STORAGE, run=c.name.run, incarnation=c.name.incarnation, step=c.name.step, attempt=c.name.attempt
        )
        for c in repository.checkpoints()
    ]
    return [(c.incarnation, c.step) for c in candidates(repository.lineage(), known)]


def test_leftovers_of_fenced_lives_go_and_everything_else_stays() -> None:
    builder, fenced, held = _littered(MemoryStore())
    repository = builder.repository
    before = _keys(repository)

    report = _collect(repository)

    assert {entry.key for entry in report.objects} == fenced
    assert before - _keys(repository) == fenced | {"victims/000001-run-7.json"}
    assert {entry.key for entry in find_garbage(repository, with_off_lineage=False, trace=TRACE).held} == held
    checked = verify_repository(repository, read_data_fraction=1.0)
    assert checked.all_findings == ()
    assert len(checked.checkpoints) == 5


def test_a_second_collection_finds_nothing() -> None:
    builder, _, _ = _littered(MemoryStore())
    _collect(builder.repository)
    before = _keys(builder.repository)
    clock = MovedClock()

    report = _collect(builder.repository, clock=clock)

    assert (report.objects, report.dropped, clock.slept_s) == ((), (), 0.0)
    assert _keys(builder.repository) == before


def test_checkpoints_off_the_lineage_go_only_when_asked_for() -> None:
    builder = build_history(MemoryStore())
    repository = builder.repository
    order = _recovery_order(repository)

    report = _collect(repository, off_lineage=True)

    # Off the chain: step 30 of life 1 (the fork was at 20) and step 40 of life 2 (the rewind was to 30).
    assert [(name.incarnation, name.step) for name in report.dropped] == [(1, 30), (2, 40)]
    assert _recovery_order(repository) == order
    checked = verify_repository(repository, read_data_fraction=1.0)
    assert (checked.all_findings, checked.notes) == ((), ())


def test_a_lineage_without_a_checkpoint_drops_nothing() -> None:
    builder = build_history(MemoryStore())
    builder.begin(4, reason="load_checkpoint")

    with pytest.raises(MocError, match="no checkpoint is on the lineage"):
        _collect(builder.repository, off_lineage=True)

    assert len(builder.repository.checkpoints()) == 5


def test_a_lineage_with_a_lost_record_drops_nothing() -> None:
    builder = build_history(MemoryStore())
    builder.store.delete("incarnations/000002-run-7.json")

    with pytest.raises(CoordinationError, match="cannot be followed"):
        _collect(builder.repository, off_lineage=True)

    assert len(builder.repository.checkpoints()) == 5


@pytest.mark.parametrize("kind", ["manifest", "record"])
def test_nothing_is_deleted_while_something_is_unreadable(kind: str, tmp_path: Path) -> None:
    builder, _, _ = _littered(LocalStore(tmp_path / "repo"))
    path = (
        manifest_path(tmp_path / "repo", 1, 20)
        if kind == "manifest"
        else tmp_path / "repo" / "incarnations" / "000001-run-7.json"
    )
    flip_bit(path, 30)
    before = _keys(builder.repository)

    with pytest.raises(IntegrityError, match="nothing is deleted while"):
        _collect(builder.repository)
    result = moc("gc", "--apply", "-r", tmp_path / "repo")

    assert result.returncode == 4
    assert _keys(builder.repository) == before


def test_a_full_store_is_emptied_all_the_same() -> None:
    roomy, _, _ = _littered(MemoryStore())
    size_bytes = sum(entry.size_bytes for entry in roomy.store.list(""))
    builder, fenced, _ = _littered(MemoryStore(capacity_bytes=size_bytes + 50))
    with pytest.raises(StoreFullError):
        builder.repository.put_victims("run-7", 2, ["x" * 50])

    report = _collect(builder.repository)

    assert {entry.key for entry in report.objects} == fenced


def test_retention_drops_nothing_that_a_lost_record_may_have_led_to() -> None:
    builder = RepositoryBuilder(MemoryStore())
    builder.begin(1)
    for step in (10, 20):
        builder.commit(1, step)
    builder.begin(2, parent=Parent(incarnation=1, step=20, attempt=builder.name(1, 20).attempt))
    builder.commit(2, 30)
    builder.begin(3, parent=Parent(incarnation=2, step=30, attempt=builder.name(2, 30).attempt))
    for step in (40, 50):
        builder.commit(3, step)
    builder.store.delete("incarnations/000002-run-7.json")
    retention = Retention(builder.repository, run="run-7", incarnation=3, keep_last=1, keep_every=20, trace=TRACE)

    dropped = retention.after_commit()

    assert [(name.incarnation, name.step) for name in dropped] == [(2, 30)]
    assert {(c.name.incarnation, c.name.step) for c in builder.repository.checkpoints()} >= {(1, 10), (1, 20)}


# Races


def test_a_commit_that_is_under_way_at_the_fence_is_kept_whole() -> None:
    builder = RepositoryBuilder(MemoryStore())
    builder.begin(1)
    builder.commit(1, 10)
    rival = RepositoryBuilder(MemoryStore())
    late = rival.commit(1, 20)
    for row in late.objects:
        builder.store.put(row.key, [memoryview(rival.store.read(row.key, limit_bytes=1 << 30))])
    record = fence(
        builder.repository, find_garbage(builder.repository, with_off_lineage=False, trace=TRACE), trace=TRACE
    )

    # The agent of life 1 has looked for newer lives just before the fence; its put arrives while the collection waits.
    report = _collect(builder.repository, clock=MovedClock(lambda: builder.repository.put_manifest(late)))

    assert record is not None
    assert report.objects == ()
    assert _recovery_order(builder.repository) == [(1, 20), (1, 10)], "and it is what recovery takes"
    assert verify_repository(builder.repository, read_data_fraction=1.0).all_findings == ()


def test_a_save_of_a_fenced_life_fails_and_names_nothing_that_is_gone() -> None:
    builder = RepositoryBuilder(MemoryStore())
    builder.begin(1)
    kept = builder.commit(1, 10)
    late = _uncommitted(builder, 1, 20)
    record = fence(
        builder.repository, find_garbage(builder.repository, with_off_lineage=False, trace=TRACE), trace=TRACE
    )
    _collect(builder.repository)

    with pytest.raises(FencedError):
        commit(builder.repository, late, trace=TRACE)

    assert record is not None
    assert (record.number, record.reason) == (2, "gc")
    assert [c.name for c in builder.repository.checkpoints()] == [kept.name]


def test_a_commit_between_condemnation_and_deletion_that_missed_the_fence_fails() -> None:
    """The second line of defence: whoever read the incarnations too early reads the victims too."""
    builder = RepositoryBuilder(MemoryStore())
    builder.begin(1)
    builder.commit(1, 10)
    late = _uncommitted(builder, 1, 20)
    builder.begin(2, parent=Parent(incarnation=1, step=10, attempt=builder.name(1, 10).attempt))
    failures: list[str] = []

    def commit_late() -> None:
        builder.store.delete("incarnations/000002-run-7.json")  # the listing of a zombie from before the fence
        try:
            commit(builder.repository, late, trace=TRACE)
        except PlanDivergedError as error:
            failures.append(str(error))
        builder.begin(2, parent=Parent(incarnation=1, step=10, attempt=builder.name(1, 10).attempt))

    _collect(builder.repository, clock=MovedClock(commit_late))

    assert len(failures) == 1
    assert "being deleted" in failures[0]


def test_a_life_that_begins_meanwhile_loses_nothing() -> None:
    builder, fenced, held = _littered(MemoryStore())

    def begin_and_save() -> None:
        builder.begin(5, parent=Parent(incarnation=2, step=30, attempt=builder.name(2, 30).attempt))
        builder.commit(5, 40)
        _litter(builder, 5, 50)

    report = _collect(builder.repository, clock=MovedClock(begin_and_save))

    assert {entry.key for entry in report.objects} == fenced, "life 4 was fenced too late to be judged"
    assert held <= _keys(builder.repository)
    assert verify_repository(builder.repository, read_data_fraction=1.0).all_findings == ()


def test_a_rewind_meanwhile_saves_the_checkpoint_from_being_dropped() -> None:
    builder = build_history(MemoryStore())
    chosen = builder.name(2, 40)

    def rewind() -> None:
        builder.begin(4, parent=Parent(incarnation=2, step=40, attempt=chosen.attempt), reason="rewind")

    with pytest.raises(FencedError, match="a life began meanwhile"):
        _collect(builder.repository, off_lineage=True, clock=MovedClock(rewind))

    assert chosen in {c.name for c in builder.repository.checkpoints()}
    assert verify_repository(builder.repository, read_data_fraction=1.0).all_findings == ()


def test_the_wait_ends_with_the_fences_age_by_the_stores_time(tmp_path: Path) -> None:
    _, fenced, _ = _littered(LocalStore(tmp_path / "repo"))
    record = tmp_path / "repo" / "incarnations" / "000004-run-7.json"
    waits = []
    for age_s in (0, 400, DAY_S):
        now_s = record.stat().st_ctime
        os.utime(record, (now_s - age_s, now_s - age_s))
        clock = MovedClock()
        copy = Path(shutil.copytree(tmp_path / "repo", tmp_path / f"copy-{age_s}"))
        report = _collect(Repository(LocalStore(copy)), clock=clock)
        waits.append(clock.slept_s)
        assert {entry.key for entry in report.objects} == fenced

    assert SETTLE_S - 60 < waits[0] <= SETTLE_S
    assert SETTLE_S - 460 < waits[1] <= SETTLE_S - 400
    assert waits[2] == 0


@pytest.mark.parametrize("with_store", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_at_any_span_harms_no_checkpoint_and_the_next_collection_ends_the_work(
    with_store: bool, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    builder, fenced, held = _littered(LocalStore(source), Model(world_size=1, moe_layers=int(with_store)))
    checkpoints = {c.name for c in builder.repository.checkpoints()}
    order = _recovery_order(builder.repository)
    kills = 0
    for count in range(1, KILL_LIMIT):
        root = Path(shutil.copytree(source, tmp_path / "killed"))
        if not _collect_and_die(root, count, with_store=with_store):
            break
        kills += 1
        repository = Repository(LocalStore(root))
        report = verify_repository(repository)
        assert report.all_findings == (), f"killed at event {count}"
        left = [c.name for c in repository.checkpoints()]
        assert set(left) | {name for name in checkpoints if name not in left} == set(checkpoints)
        assert _recovery_order(repository) == order, "what is off the lineage is no candidate, before and after"
        fence(repository, find_garbage(repository, with_off_lineage=True, trace=TRACE), trace=TRACE)
        _collect(repository, off_lineage=True, settle_s=0)
        stored = {entry.key for entry in repository.objects()}
        assert not stored & (fenced | held), f"killed at event {count}"
        checked = verify_repository(repository)
        assert (checked.all_findings, checked.notes) == ((), ())
        shutil.rmtree(root)

    assert 15 < kills < KILL_LIMIT - 1


def _collect_and_die(root: Path, count: int, *, with_store: bool) -> bool:
    """Fence and collect in a child that kills itself at its trace event number `count`; False if it came to its end."""

    def work(kill_at: Callable[..., None]) -> None:
        trace = Trace(kill_at)
        repository = Repository(LocalStore(root, trace=trace if with_store else None))
        fence(repository, find_garbage(repository, with_off_lineage=True, trace=trace), trace=trace)
        collect(
            repository,
            with_off_lineage=True,
            settle_s=0.0,
            host=MovedClock(),
            trace=trace,
            on_wait=lambda _: None,
        )

    # Without the store's spans the end of one is the begin of the next.
    return died_within(work, count=count, is_counted=lambda event: with_store or event == "begin")


def _uncommitted(builder: RepositoryBuilder, incarnation: int, step: int) -> Manifest:
    """Return the manifest of a save whose objects are written and whose commit has not come yet."""
    manifest = builder.commit(incarnation, step)
    builder.repository.delete_manifest(manifest.name)
    return manifest


# The command


@pytest.fixture
def littered(tmp_path: Path) -> tuple[Path, set[str], set[str]]:
    """A repository whose newest life (4) has leftovers, and a day of silence behind it."""
    root = tmp_path / "repo"
    builder = build_history(LocalStore(root))
    builder.begin(4, parent=Parent(incarnation=2, step=30, attempt=builder.name(2, 30).attempt))
    builder.commit(4, 40)
    fenced, held = _litter(builder, 1, 35), _litter(builder, 4, 50)
    for path in root.rglob("*"):
        seconds = path.stat().st_mtime - DAY_S
        os.utime(path, (seconds, seconds))
    return root, fenced, held


def test_without_apply_nothing_is_changed(littered: tuple[Path, set[str], set[str]]) -> None:
    root, fenced, held = littered
    stale = root / "objects" / ".r00000-d.safetensors~12-0123abcd"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    before = sorted(root.rglob("*"))

    plan = moc_json("gc", "-r", root)
    with_fence = moc_json("gc", "--fence", "--off-lineage", "-r", root)
    text = moc("gc", "--off-lineage", "-r", root)

    assert {row["key"] for row in plan["objects"]} == fenced
    assert {row["key"] for row in plan["held"]} == held
    assert (plan["is_applied"], plan["fence"], plan["off_lineage"], plan["temporary_files"]) == (False, None, [], 1)
    assert {row["key"] for row in with_fence["objects"]} > fenced | held
    assert [(row["incarnation"], row["step"]) for row in with_fence["off_lineage"]] == [(1, 30), (2, 40)]
    kinds = [line.split()[-1] for line in text.stdout.splitlines()[1:]]
    assert kinds == ["leftover", "off-lineage", "off-lineage", "held"]
    assert "--apply" in text.stderr
    assert max(map(len, text.stdout.splitlines())) <= 80
    assert sorted(root.rglob("*")) == before


def test_apply_deletes_what_the_dry_run_lists(littered: tuple[Path, set[str], set[str]]) -> None:
    root, fenced, held = littered
    plan = moc_json("gc", "-r", root)

    done = moc_json("gc", "--apply", "-r", root)

    assert done["objects"] == plan["objects"]
    assert done["is_applied"] is True
    assert not [key for key in fenced if (root / key).exists()]
    assert all((root / key).exists() for key in held)
    assert moc("verify", "--read-data", "-r", root).returncode == 0


def test_a_fence_is_refused_while_the_newest_life_may_be_alive(littered: tuple[Path, set[str], set[str]]) -> None:
    root, _, held = littered
    os.utime(root / min(held))

    refused = moc("gc", "--apply", "--fence", "-r", root)
    forced = moc_json("gc", "--apply", "--fence", "--force", "--settle", "0", "-r", root)

    assert refused.returncode == 1
    assert "may be alive" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert forced["fence"] == 5
    assert not [key for key in held if (root / key).exists()]


def test_a_fence_is_one_record_and_keeps_the_lineage(littered: tuple[Path, set[str], set[str]]) -> None:
    root, _, held = littered
    before = _recovery_order(Repository(LocalStore(root)))

    done = moc_json("gc", "--apply", "--fence", "--settle", "0", "-r", root)
    again = moc_json("gc", "--apply", "--fence", "--settle", "0", "-r", root)

    assert {row["key"] for row in done["objects"]} > held
    assert (done["fence"], again["fence"], again["objects"]) == (5, None, [])
    assert _recovery_order(Repository(LocalStore(root))) == before
    newest = next(row for row in moc_json("ls", "-r", root)["checkpoints"] if row["is_newest"])
    assert (newest["incarnation"], newest["step"]) == (4, 40)


@pytest.mark.parametrize("settle", ["-1", "nan", "inf", "soon"])
def test_a_wait_that_is_no_time_is_refused(settle: str, littered: tuple[Path, set[str], set[str]]) -> None:
    assert moc("gc", "--settle", settle, "-r", littered[0]).returncode == 2


# With a job


def test_a_fence_costs_no_memory_and_the_life_after_it_goes_on_there() -> None:
    with Job(size=1, persist_every=4) as job:
        first = job.start()
        first.event("committed", step=4)
        known = first.event("global", step=9)["step"]
        refused = moc("gc", "--apply", "--fence", "--force", "-r", job.storage, "--runtime-root", job.root)
        first.kill()
        idle = moc("gc", "--apply", "--fence", "--force", "-r", job.storage, "--runtime-root", job.root)
        repository = job.repository()
        _fence(repository)  # by somebody on another machine, who does not see the agent

        second = job.start(steps=known + 9)
        attached = second.attached()

        assert (refused.returncode, idle.returncode) == (1, 1)
        assert "an agent of the newest life answers" in refused.stderr
        assert attached["source"] == "memory"
        assert attached["step"] >= known
        assert attached["incarnation"] == 3
        second.finished()
        second.exact()
        job.sound()
        repository.close()


def test_a_job_whose_save_was_cut_off_recovers_after_the_collection() -> None:
    with Job(size=1, persist_every=2, run_id="cut", step_s=0.002) as job:
        agent = start_agent(job, "cut", "persist.put:end:3")
        first = job.start()
        wait_killed(agent, first)
        first.kill()
        if job.agent_pid() is not None:
            job.kill_agent()  # one that adopted the arena in the meantime
        repository = job.repository()
        held = {e.key for e in find_garbage(repository, with_off_lineage=False, trace=TRACE).held}
        announced = first.newest_step("committed") or 0

        done = moc_json("gc", "--apply", "--fence", "--force", "--settle", "0", "-r", job.storage)

        assert held
        assert {row["key"] for row in done["objects"]} == held
        assert not held & _keys(repository)
        second = job.start(steps=announced + 9)
        assert second.attached()["step"] >= announced
        second.finished()
        second.exact()
        job.sound()
        repository.close()
