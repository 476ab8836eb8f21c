"""Broken repositories: verify names what is wrong, nothing wrong is restored, nothing that is needed is deleted."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moc.cli.main import main
from moc.commit import commit
from moc.errors import IntegrityError, MismatchError, MocError, ObjectMissingError
from moc.format.keys import CheckpointName
from moc.gc import Retention
from moc.host import SystemHost
from moc.plan.lineage import STORAGE, Candidate
from moc.recover import StorageSource, restore_shards
from moc.repository import Repository
from moc.state import DTYPE_BYTES, RankCatalog, Shard
from moc.store.local import LocalStore
from moc.store.memory import MemoryStore
from moc.trace import Trace
from moc.verify import verify_checkpoint, verify_repository
from tests.cli.console import moc
from tests.golden.broken import CASES as WHOLE_CASES
from tests.golden.broken import Broken, Case
from tests.golden.broken_partial import PARTIAL_CASES
from tests.golden.describe import describe
from tests.golden.scenarios import RUN, SCENARIOS
from tests.golden.write import FOLDERS

CASES = {**WHOLE_CASES, **PARTIAL_CASES}
NEWEST_LIFE = {"lives": 4, "two-ranks": 1, "partial": 2, "alike": 1}
STEPS = {"lives": ("5", "6"), "two-ranks": ("3", "3"), "alike": ("3", "3"), "partial": ("30", "40")}
SAMPLE = ("missing object", "gap", "FORMAT of another version", "nested deep", "size of 2^63-1")
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_verify_names_it_and_every_verb_answers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, root = CASES[name], tmp_path / "repository"
    case.change(Broken(case.scenario, root, case.version))
    (tmp_path / "outside").write_text("precious")
    before = _contents(root)

    code = main(["verify", "--read-data=100", "-r", str(root), "--json"])

    report = json.loads(capsys.readouterr().out)
    found = [("", report["error"]["message"])] if "error" in report else list(_findings(report))
    if case.words is None:
        assert (code, found) == (0, []), "harmless"
    else:
        assert code == case.code, found
        assert any(case.key in key and case.words in words for key, words in found), found
    for verb in (
        ["ls"],
        ["show"],
        ["gc"],
        ["diff", *STEPS[case.scenario]],
        ["restore", "--to", str(tmp_path / "copy")],
    ):
        assert main([*verb, "-r", str(root)]) in (0, 3, 4, 5, 6), verb
    if (tmp_path / "copy" / "FORMAT").exists():  # else what was written has been taken back
        assert main(["verify", "--read-data=100", "-r", str(tmp_path / "copy")]) == 0
    assert _contents(root) == before, "nothing was changed"
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("name", SAMPLE)
def test_as_a_user_runs_it_there_is_never_a_traceback(name: str, tmp_path: Path) -> None:
    case, root = CASES[name], tmp_path / "repository"
    case.change(Broken(case.scenario, root, case.version))

    done = moc("verify", "--read-data", "-r", root)

    assert done.returncode == case.code
    assert "Traceback" not in done.stderr
    assert (case.words or "") in done.stdout + done.stderr


@cases
def test_nothing_wrong_is_restored(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    repository = _broken(case, tmp_path / "repository")

    for checkpoint in _listed(repository):
        for catalog in _catalogs(case.scenario):
            try:
                restored = _restored(repository, checkpoint, catalog)
            except (IntegrityError, ObjectMissingError):
                continue  # recovery takes the next one
            except MismatchError:
                continue  # recovery stops: that is another model
            assert restored == _restored(_golden(case), checkpoint, catalog)


@cases
def test_retention_deletes_nothing_that_is_needed(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    repository = _broken(case, tmp_path / "repository")
    store = repository.store
    store.put("objects/000001-other/000000000001-01010001/r00000-d.safetensors", [memoryview(b"another run's")])
    sound = [n for n in _listed(repository) if verify_checkpoint(repository, n, read_data_fraction=1).is_sound]
    before = {entry.key: store.read(entry.key, limit_bytes=1 << 30) for entry in store.list("")}
    newest = NEWEST_LIFE[case.scenario]
    retention = Retention(repository, run=RUN, incarnation=newest, keep_last=1, keep_every=0, trace=Trace())

    for _ in range(2):  # what the first round condemns, the second deletes
        with contextlib.suppress(MocError):  # refused: then nothing may be missing either
            retention.after_commit()

    gone = before.keys() - {entry.key for entry in store.list("")}
    assert all(re.match(rf"(objects|manifests)/\d{{6}}-{RUN}/|victims/", key) for key in gone), gone
    left = {key: content for key, content in before.items() if key.startswith("manifests/") and key not in gone}
    assert not any(b'"%s"' % key.encode() in content for key in gone for content in left.values()), (
        "a manifest names it"
    )
    for checkpoint in sound:
        if f"manifests/{checkpoint}.json" not in gone:
            assert verify_checkpoint(repository, checkpoint, read_data_fraction=1).is_sound


def test_a_rotten_victim_list_is_emptied_and_the_next_save_is_committed(tmp_path: Path) -> None:
    broken = Broken("lives", tmp_path / "repository")
    broken.flip("victims/*", 20)
    newest = broken.repository.checkpoints()[-1].name
    manifest = broken.repository.read_manifest(newest)
    broken.repository.delete_manifest(newest)

    commit(broken.repository, manifest, trace=Trace())
    retention = Retention(broken.repository, run=RUN, incarnation=4, keep_last=9, keep_every=0, trace=Trace())
    retention.after_commit()

    assert broken.repository.read_victims(RUN, 4) == ()
    assert newest in _listed(broken.repository)


def test_pads_that_rotted_are_written_anew_where_a_checkpoint_is_copied(tmp_path: Path) -> None:
    broken = Broken("lives", tmp_path / "repository")
    CASES["bit in a pad"].change(broken)

    assert main(["restore", "-r", str(broken.root), "--to", str(tmp_path / "copy")]) == 0

    report = verify_repository(Repository(LocalStore(tmp_path / "copy")), read_data_fraction=1)
    assert report.all_findings == ()


def test_the_newest_state_is_not_guessed_when_the_newest_record_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken("lives", tmp_path / "repository")
    broken.flip("incarnations/*", 20)
    copy = str(tmp_path / "copy")

    assert main(["restore", "-r", str(broken.root), "--to", copy]) == 4
    assert "--step" in capsys.readouterr().err
    assert main(["restore", "--step", "5", "-r", str(broken.root), "--to", copy]) == 0


class _Sink:
    """A training state that keeps what is restored into it."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self.needed = shards
        self.values = [bytearray(shard.size_bytes) for shard in shards]

    def write_shard(self, index: int, offset: int, view: memoryview) -> None:
        first = offset * DTYPE_BYTES[self.needed[index].dtype]
        self.values[index][first : first + view.nbytes] = view


def _restored(repository: Repository, name: CheckpointName, catalog: RankCatalog) -> tuple[list[bytearray], object]:
    """Return the shards of one rank, and its state, as recovery would."""
    source = StorageSource(repository, repository.read_manifest(name), rank=catalog.rank)
    sink = _Sink(catalog.shards)
    tree, _ = source.state(catalog.rank)
    candidate = Candidate(
        source=STORAGE, run=name.run, incarnation=name.incarnation, step=name.step, attempt=name.attempt
    )
    restore_shards(source, sink, candidate, parts=None, host=SystemHost(), trace=Trace())  # type: ignore[arg-type]
    return sink.values, describe(tree)


def _broken(case: Case, root: Path) -> Repository:
    """Return the broken repository in memory."""
    case.change(Broken(case.scenario, root, case.version))
    store = MemoryStore()
    for key, content in _contents(root).items():
        store.put(key, [memoryview(content)])
    return Repository(store)


def _listed(repository: Repository) -> list[CheckpointName]:
    return [stored.name for stored in repository.checkpoints()]


@cache
def _catalogs(scenario: str) -> tuple[RankCatalog, ...]:
    return SCENARIOS[scenario](MemoryStore()).catalogs


@cache
def _golden(case: Case) -> Repository:
    return Repository(LocalStore(FOLDERS[case.version - 1] / case.scenario))


def _findings(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for finding in (*report["findings"], *(f for c in report["checkpoints"] for f in c["findings"])):
        yield finding["key"], finding["message"]


def _contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
