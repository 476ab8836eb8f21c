"""Storage that does not give one object, gives wrong bytes, or gives nothing: recovery falls back, loudly, or stops."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moc.config import Config
from moc.errors import IntegrityError, StorageError
from moc.format.keys import FORMAT_KEY, INCARNATIONS, MANIFESTS
from moc.format.object import ALIGNMENT
from moc.plan.lineage import chain, merge_incarnations, tip
from moc.repository import Repository
from moc.restoration import READ_ATTEMPTS, Restored, restore_best
from moc.store.local import LocalStore
from moc.survey import Origin, Request
from tests.enumeration.job import RUN, SIZE, TRACE, Ledger, Life, choose, snapshots, state_of
from tests.enumeration.serial import SerialHost
from tests.support.faulty_files import FaultyFilesystem
from tests.support.model_disk import Disk
from tests.support.model_files import ModelFilesystem
from tests.support.plain import SocketWorld

ROOT = Path("/disk/repository")
FLIPS = 7  # places in each file


class BadSectors(FaultyFilesystem):
    """A disk on which reading the content of some files fails: for good, or as often as was said."""

    def __init__(self, disk: Disk, is_bad: Callable[[str], bool], *, times: int | None = None) -> None:
        super().__init__(ModelFilesystem(disk))
        self._is_bad, self.times = is_bad, times

    def read(self, handle: int, offset: int, view: memoryview) -> int:
        if self.times != 0 and self._is_bad(self.path_of(handle)):
            self.times = None if self.times is None else self.times - 1
            raise OSError(errno.EIO, "bad sector")
        return super().read(handle, offset, view)


class PatientHost(SerialHost):
    """A host on which sleeping takes no time and is written down."""

    def __init__(self, open_store: Callable[[], LocalStore]) -> None:
        super().__init__(open_store)
        self.slept_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    restored: Restored | None
    digest: str
    slept_s: tuple[float, ...]


@pytest.fixture(scope="module")
def disk() -> Disk:
    """Three checkpoints of one life, of steps 1 to 3."""
    made = Disk("/disk")
    life = Life(lambda: LocalStore(ROOT, filesystem=ModelFilesystem(made)), Ledger(), keep_last=3)
    life.attach()
    for step in (1, 2, 3):
        life.save(step)
    return made


def recover(files: FaultyFilesystem) -> Recovery:
    """Choose and restore rank 0's state as a life does at its beginning."""
    host = PatientHost(lambda: LocalStore(ROOT, filesystem=files))
    repository = Repository(host.open_store("", trace=TRACE))
    records, _ = repository.incarnations()
    _, admissible, number = choose(repository)
    merged = merge_incarnations(records, ())
    origin = Origin(
        run=RUN,
        number=number,
        token="0" * 8,
        lineage=tuple(records),
        links=chain(merged, tip(merged)),
        candidates=admissible,
        layers=admissible,
        notes=(),
        is_stored=True,
    )
    request = Request(
        storage=str(ROOT),
        config=Config(),
        restore="auto",
        run_id=None,
        take_over=False,
        on_mismatch=(),
        runtime_root=None,
        agent_idle_s=1.0,
        fingerprint={},
    )
    state = state_of(0)
    world = SocketWorld(0, 1, Path("unused"))
    life = {"sizes": {}, "software": {"moc": "0"}}
    restored = restore_best(request, origin, admissible, state, world, **life, host=host, trace=TRACE)
    return Recovery(restored=restored, digest=state.digest(), slept_s=tuple(host.slept_s))


def step_of(recovery: Recovery) -> int:
    """Return the step that was restored; fails unless every byte is that step's."""
    assert recovery.restored is not None
    step = recovery.restored.candidate.step
    assert recovery.digest == snapshots().digests[step][0]
    return step


def files_of(disk: Disk, step: int) -> Iterator[str]:
    """Yield the paths of a checkpoint's manifest and objects, as far as rank 0 reads them."""
    for path in disk.files():
        if f"/{step:012d}-" in path and "/r00001-" not in path:
            yield path


def test_a_bad_sector_in_any_file_of_a_checkpoint_costs_that_checkpoint_only(disk: Disk) -> None:
    paths = list(files_of(disk, 3))
    assert len(paths) >= 3

    for path in paths:
        recovery = recover(BadSectors(disk.copy(), path.__eq__))

        assert step_of(recovery) == 2, path
        assert recovery.restored is not None
        (rejection,) = recovery.restored.rejected
        assert "step=3" in rejection.candidate
        assert "EIO" in rejection.reason
        assert path.removeprefix(f"{ROOT}/") in rejection.reason
        assert any("moc rewind --step 3-" in note for note in recovery.restored.notes)
        assert len(recovery.slept_s) == READ_ATTEMPTS - 1


def test_errors_that_pass_cost_nothing(disk: Disk) -> None:
    for path in files_of(disk, 3):
        for times in range(1, READ_ATTEMPTS):
            recovery = recover(BadSectors(disk.copy(), path.__eq__, times=times))

            assert step_of(recovery) == 3, path
            assert recovery.restored is not None
            assert recovery.restored.rejected == ()
            assert recovery.restored.notes == () or not any("passed over" in note for note in recovery.restored.notes)


def test_two_checkpoints_with_bad_sectors_are_passed_over(disk: Disk) -> None:
    recovery = recover(BadSectors(disk.copy(), lambda path: "/000000000003-" in path or "/000000000002-" in path))

    assert step_of(recovery) == 1
    assert recovery.restored is not None
    assert len(recovery.restored.rejected) == 2


def test_where_no_checkpoint_can_be_read_the_storage_is_at_fault(disk: Disk) -> None:
    for is_bad in (lambda path: "/objects/" in path, lambda path: f"/{MANIFESTS}/" in path):
        with pytest.raises(StorageError, match="EIO"):
            recover(BadSectors(disk.copy(), is_bad))


def test_a_repository_that_does_not_answer_is_not_judged_by_one_object(disk: Disk) -> None:
    # Objects of step 3 and FORMAT cannot be read: this is not about one checkpoint.
    with pytest.raises(StorageError, match="EIO"):
        recover(BadSectors(disk.copy(), lambda path: "/000000000003-" in path or path.endswith(f"/{FORMAT_KEY}")))


def test_retention_goes_on_beside_a_manifest_that_cannot_be_read(disk: Disk) -> None:
    worn = disk.copy()
    manifest = next(path for path in files_of(worn, 2) if f"/{MANIFESTS}/" in path)
    files = BadSectors(worn, manifest.__eq__)
    life = Life(lambda: LocalStore(ROOT, filesystem=files), Ledger(), keep_last=1)
    life.attach()

    for step in (4, 5):
        life.save(step)

    kept = {checkpoint.name.step for checkpoint in Repository(LocalStore(ROOT, filesystem=files)).checkpoints()}
    assert kept == {2, 5}, "what cannot be read stays, and keeps nothing else"
    assert len(list(files_of(worn, 2))) == len(list(files_of(disk, 2)))


def test_a_flipped_byte_anywhere_never_reaches_the_training_state(disk: Disk) -> None:
    cases = 0
    for path, content in disk.files().items():
        # The beginning of each page, where shards and headers lie, and a few places in between.
        spread = [place * (len(content) - 1) // (FLIPS - 1) for place in range(FLIPS)]
        for place in [*spread, *range(5, len(content), ALIGNMENT)]:
            flipped = disk.copy()
            flip(flipped, path, place)
            cases += 1
            if f"/{INCARNATIONS}/" in path:
                with pytest.raises((AssertionError, IntegrityError)):
                    recover(FaultyFilesystem(ModelFilesystem(flipped)))
                continue
            recovery = recover(FaultyFilesystem(ModelFilesystem(flipped)))
            # Padding and other ranks' objects have nothing that rank 0 needs.
            assert step_of(recovery) in (2, 3), path
    assert cases > FLIPS * SIZE


def flip(disk: Disk, path: str, position: int) -> None:
    files = ModelFilesystem(disk)
    handle = files.open_read(path)
    byte = bytearray(1)
    files.read(handle, position, memoryview(byte))
    files.overwrite(path, position, bytes([byte[0] ^ 0x10]))
