"""What a store on files promises beyond the port: durable in the right order, nothing left behind, errors explained."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from moc.errors import (
    FencedError,
    ObjectMissingError,
    StorageError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
    UsageError,
)
from moc.store.filesystem import FileFacts, PosixFilesystem
from moc.store.local import DIRECT_MINIMUM_BYTES, LocalStore
from moc.trace import Trace


class RecordingFilesystem(PosixFilesystem):
    """The real filesystem, which also writes down what it was asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.paths: dict[int, str] = {}

    def make_directory(self, path: str) -> None:
        super().make_directory(path)
        self.calls.append(("make_directory", path))

    def fsync_directory(self, path: str) -> None:
        super().fsync_directory(path)
        self.calls.append(("fsync_directory", path))

    def create(self, path: str) -> int:
        handle = super().create(path)
        self.paths[handle] = path
        self.calls.append(("create", path))
        return handle

    def open_direct(self, path: str) -> int | None:
        handle = super().open_direct(path)
        if handle is not None:
            self.paths[handle] = path
            self.calls.append(("open_direct", path))
        return handle

    def preallocate(self, handle: int, size_bytes: int) -> None:
        super().preallocate(handle, size_bytes)
        self.calls.append(("preallocate", self.paths[handle]))

    def write(self, handle: int, offset: int, views: Sequence[memoryview]) -> int:
        self.calls.append(("write", self.paths[handle]))
        return super().write(handle, offset, views)

    def fsync(self, handle: int) -> None:
        super().fsync(handle)
        self.calls.append(("fsync", self.paths[handle]))

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.calls.append(("rename", target))

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self.calls.append(("link", target))

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.calls.append(("unlink", path))

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class FailingFilesystem(PosixFilesystem):
    """The real filesystem, except that one kind of call fails with one errno."""

    def __init__(self, method: str, number: int) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        setattr(self, method, fail)


class HalfWritingFilesystem(PosixFilesystem):
    """The real filesystem, which never writes more than `limit_bytes` at once."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    def write(self, handle: int, offset: int, views: Sequence[memoryview]) -> int:
        return super().write(handle, offset, [views[0][: self._limit_bytes]])


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def put(store: LocalStore, key: str, content: bytes, *, create_only: bool = False) -> None:
    store.put(key, [memoryview(content)], create_only=create_only)


def test_bytes_are_durable_before_the_name_and_the_name_before_the_return(tmp_path: Path) -> None:
    files = RecordingFilesystem()
    root = str(tmp_path / "new" / "repository")

    put(LocalStore(Path(root), filesystem=files), "a/b/c", b"content")

    calls = [name for name in files.names() if name != "make_directory"]
    assert calls[:5] == ["create", "preallocate", "write", "fsync", "rename"]
    assert set(calls[5:]) == {"fsync_directory"}
    after_rename = [path for name, path in files.calls[files.calls.index(("rename", f"{root}/a/b/c")) :]]
    assert after_rename[1:6] == [f"{root}/a/b", f"{root}/a", root, str(tmp_path / "new"), str(tmp_path)]


def test_the_parent_of_every_created_folder_is_synced(tmp_path: Path) -> None:
    files = RecordingFilesystem()
    store = LocalStore(tmp_path / "deep" / "er" / "repository", filesystem=files)

    put(store, "a/b/c", b"x")
    put(store, "a/d/e/f", b"x")

    for index, (name, path) in enumerate(files.calls):
        if name == "make_directory":
            assert ("fsync_directory", os.path.dirname(path)) in files.calls[index:]


def test_folders_of_a_process_that_died_before_it_synced_them_are_synced(tmp_path: Path) -> None:
    (tmp_path / "repository" / "a" / "b").mkdir(parents=True)
    files = RecordingFilesystem()

    put(LocalStore(tmp_path / "repository", filesystem=files), "a/b/c", b"x")

    synced = {path for name, path in files.calls if name == "fsync_directory"}
    assert synced >= {str(tmp_path / path) for path in ("", "repository", "repository/a", "repository/a/b")}


def test_a_delete_is_durable_before_it_returns_and_removes_empty_folders(tmp_path: Path) -> None:
    files = RecordingFilesystem()
    root = str(tmp_path / "repository")
    store = LocalStore(Path(root), filesystem=files)
    put(store, "a/b/c", b"x")
    put(store, "a/d", b"x")
    files.calls.clear()

    store.delete("a/b/c")

    assert files.calls == [("unlink", f"{root}/a/b/c"), ("fsync_directory", f"{root}/a/b")]
    assert files_below(tmp_path) == ["repository/a/d"]
    assert not (tmp_path / "repository" / "a" / "b").exists()
    assert (tmp_path / "repository").is_dir()


@pytest.mark.parametrize("surplus_bytes", [0, 1, 4095])
def test_large_aligned_segments_bypass_the_page_cache(tmp_path: Path, surplus_bytes: int) -> None:
    files = RecordingFilesystem()
    store = LocalStore(tmp_path / "repository", filesystem=files)
    size_bytes = DIRECT_MINIMUM_BYTES + surplus_bytes
    memory = mmap.mmap(-1, size_bytes)
    memory[:] = os.urandom(size_bytes)
    view = memoryview(memory)

    store.put("large", [view])
    put(store, "small", b"x" * 4096)

    probe = files.open_direct(str(tmp_path / "repository" / "small"))
    if probe is not None:
        os.close(probe)
        files.calls.pop()
    assert files.names().count("open_direct") == (probe is not None)
    assert store.read("large", limit_bytes=size_bytes) == memory[:]
    view.release()
    memory.close()


@pytest.mark.parametrize("limit_bytes", [4096, 100_000, 2**20])
def test_short_writes_are_continued(tmp_path: Path, limit_bytes: int) -> None:
    store = LocalStore(tmp_path / "repository", filesystem=HalfWritingFilesystem(limit_bytes))
    memory = mmap.mmap(-1, 3 * 2**20 + 5)
    memory[:] = os.urandom(len(memory))
    view = memoryview(memory)

    store.put("large", [view[: 2**20], view[2**20 :]])

    assert store.read("large", limit_bytes=len(memory)) == memory[:]
    view.release()
    memory.close()


@pytest.mark.parametrize(
    ("method", "number", "expected"),
    [
        ("create", 13, StoreDeniedError),
        ("create", 30, StoreDeniedError),
        ("create", 24, StoreUnavailableError),
        ("preallocate", 28, StoreFullError),
        ("preallocate", 122, StoreFullError),
        ("write", 28, StoreFullError),
        ("write", 5, StoreUnavailableError),
        ("write", 27, StoreFullError),
        ("fsync", 5, StoreUnavailableError),
        ("fsync", 116, StoreUnavailableError),
        ("fsync", 28, StoreFullError),
        ("rename", 30, StoreDeniedError),
        ("rename", 2, StoreUnavailableError),
        ("rename", 21, UsageError),
        ("link", 1, StoreDeniedError),
    ],
)
def test_a_failed_put_is_invisible_and_leaves_nothing(
    tmp_path: Path, method: str, number: int, expected: type[Exception]
) -> None:
    put(LocalStore(tmp_path / "repository"), "a/present", b"x")
    store = LocalStore(tmp_path / "repository", filesystem=FailingFilesystem(method, number))

    with pytest.raises(expected) as caught:
        put(store, "a/object", b"content", create_only=method == "link")

    assert "object" in str(caught.value)
    assert files_below(tmp_path) == ["repository/a/present"]


def test_a_directory_that_cannot_be_synced_fails_the_put(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository", filesystem=FailingFilesystem("fsync_directory", 5))

    with pytest.raises(StoreUnavailableError, match="errno=EIO"):
        put(store, "a", b"x")


def test_reading_does_not_create_a_repository(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository")

    assert store.list("") == []
    store.delete("a")
    assert (store.free_bytes() or 0) > 0
    with pytest.raises(ObjectMissingError):
        store.read("a", limit_bytes=1)

    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("key", ["folder/object", "file"])
def test_symbolic_links_below_the_root_are_refused(tmp_path: Path, key: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "object").write_bytes(b"secret")
    root = tmp_path / "repository"
    root.mkdir()
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "object")
    store = LocalStore(root)

    with pytest.raises(StoreDeniedError, match="symbolic link"):
        store.read(key, limit_bytes=10)
    with pytest.raises(StoreDeniedError, match="symbolic link"):
        store.list("")
    with pytest.raises(StoreDeniedError, match="symbolic link"):
        store.list("folder")
    with pytest.raises(StoreDeniedError, match="symbolic link"):
        put(store, "folder/more", b"x")
    with pytest.raises(StoreDeniedError, match="symbolic link"):
        store.delete("folder/object")

    assert files_below(outside) == ["object"]


def test_the_root_itself_may_be_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "repository").symlink_to(tmp_path / "disk")

    put(LocalStore(tmp_path / "repository"), "a/b", b"x")

    assert files_below(tmp_path / "disk") == ["a/b"]


def test_the_root_of_the_machine_is_refused() -> None:
    with pytest.raises(UsageError, match="folder of its own"):
        LocalStore(Path("/"))


def test_a_key_below_an_object_and_an_object_in_place_of_a_folder_are_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository")
    put(store, "a/b", b"x")

    with pytest.raises(UsageError, match="occupied"):
        put(store, "a/b/c", b"x")
    with pytest.raises(UsageError, match="occupied"):
        put(store, "a", b"x")

    assert files_below(tmp_path) == ["repository/a/b"]


def test_foreign_names_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository")
    put(store, "a/b", b"x")
    (tmp_path / "repository" / "lost+found").mkdir()
    (tmp_path / "repository" / "lost+found" / "c").write_bytes(b"x")
    (tmp_path / "repository" / "a" / "notes (1).txt").write_bytes(b"x")

    assert [entry.key for entry in store.list("")] == ["a/b"]


def test_only_old_temporary_files_are_swept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository")
    put(store, "a/b", b"x")
    put(store, "a/.hidden", b"x")
    folder = tmp_path / "repository" / "a"
    for name in (".b~123-0a1b2c3d", ".b~124-0a1b2c3e", ".b~other"):
        (folder / name).write_bytes(b"torn")
    os.utime(folder / ".b~123-0a1b2c3d", (1000, 1000))
    os.utime(folder / ".b~other", (1000, 1000))
    os.utime(folder / "b", (1000, 1000))

    assert [entry.key for entry in store.list("")] == ["a/.hidden", "a/b"]
    assert store.sweep(older_than_s=3600.0) == 1

    assert sorted(os.listdir(folder)) == [".b~124-0a1b2c3e", ".b~other", ".hidden", "b"]
    assert store.sweep(older_than_s=0.0) == 1


class TomorrowsFilesystem(PosixFilesystem):
    """The filesystem of a machine whose clock is a day ahead."""

    def now_epoch_s(self) -> float:
        return super().now_epoch_s() + 86_400.0


class SweptFilesystem(PosixFilesystem):
    """The real filesystem; while a file is made durable somebody else with a wrong clock sweeps, once."""

    def __init__(self, root: Path) -> None:
        self._sweepers = [LocalStore(root, filesystem=TomorrowsFilesystem())]

    def fsync(self, handle: int) -> None:
        super().fsync(handle)
        while self._sweepers:
            assert self._sweepers.pop().sweep(older_than_s=3600.0) == 1


def test_a_wall_clock_that_is_ahead_costs_a_put_at_most(tmp_path: Path) -> None:
    """The age of temporary files is the only thing that wall time decides here."""
    root = tmp_path / "repository"
    store = LocalStore(root, filesystem=SweptFilesystem(root))

    with pytest.raises(StorageError):
        put(store, "a/b", b"x")
    assert store.list("") == []

    put(store, "a/b", b"x")
    assert [entry.key for entry in LocalStore(root, filesystem=TomorrowsFilesystem()).list("")] == ["a/b"]


def test_a_listing_says_when_an_object_was_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository")
    put(store, "a", b"x")
    os.utime(tmp_path / "repository" / "a", (1000, 1234.5))

    assert store.list("")[0].modified_s == 1234.5


def test_a_put_is_traced_step_by_step(tmp_path: Path) -> None:
    spans: list[str] = []
    store = LocalStore(tmp_path, trace=Trace(lambda event, name, _: spans.append(f"{event} {name}")))

    put(store, "a", b"x")
    store.delete("a")

    begun = [span.removeprefix("begin ") for span in spans if span.startswith("begin")]
    assert begun[:5] == ["store.create", "store.write", "store.fsync", "store.rename", "store.fsync_directory"]
    assert begun[-2:] == ["store.delete", "store.fsync_directory"]


def test_fencing_keeps_the_first_object_and_leaves_no_second_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository")
    put(store, "a", b"first", create_only=True)

    with pytest.raises(FencedError):
        put(store, "a", b"other", create_only=True)
    put(store, "a", b"first", create_only=True)

    assert files_below(tmp_path) == ["repository/a"]


def test_a_local_store_imports_no_network_package() -> None:
    program = (
        "import sys\n"
        "from moc.store.open import open_store\n"
        "open_store(sys.argv[1]).list('')\n"
        "print(sorted({'fsspec', 's3fs', 'aiohttp', 'torch', 'numpy'} & set(sys.modules)))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, "repository"], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout == "[]\n"


def test_facts_tell_files_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"four")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")

    rows: list[FileFacts] = sorted(PosixFilesystem().list_directory(str(tmp_path)), key=lambda facts: facts.name)

    assert [(facts.name, facts.kind) for facts in rows] == [
        ("file", "file"),
        ("folder", "directory"),
        ("link", "link"),
        ("pipe", "other"),
    ]
    assert rows[0].size_bytes == 4
