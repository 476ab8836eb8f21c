"""The `Filesystem` port over a model of a disk, with a fault at a chosen operation.

Faults, at operation n (counted from 1; every call of the port is one operation, closing a handle excepted):

- `crash`: the process dies before n; nothing of it runs any more, not even its clean-up
- `error`: n does nothing and fails once with an errno (an fsync that fails loses what it should have written)
- `applied`: n does its work, and then fails once with an errno
- `dead`: n and everything after it fails with an errno
- `short`: n, a write, writes half of what it was given
- `stale`: n, a listing, answers what was there before the directory's last change

An observer sees the disk before and after every operation, and in the middle of every write (a torn one).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from moc.store.filesystem import FileFacts, Filesystem
from tests.support.model_files import ModelFilesystem

__all__ = ["CHANGING", "Crash", "Fault", "FaultKind", "FaultyFilesystem", "Operation", "Phase"]

T = TypeVar("T")
FaultKind = Literal["crash", "error", "applied", "dead", "short", "stale"]
Phase = Literal["before", "torn", "after"]

CHANGING = frozenset(
    {
        "make_directory",
        "remove_directory",
        "fsync_directory",
        "create",
        "preallocate",
        "write",
        "fsync",
        "rename",
        "link",
        "unlink",
    }
)
"""The operations that change the disk, or what of it survives."""


class Crash(BaseException):
    """The process ends here. Nothing in moc may catch it and live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    kind: FaultKind
    number: int
    errno: int = errno.EIO

    def __str__(self) -> str:
        return f"{self.kind} {errno.errorcode[self.errno]} at {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call of the port."""

    number: int
    name: str
    path: str

    @property
    def is_change(self) -> bool:
        return self.name in CHANGING

    def __str__(self) -> str:
        return f"{self.number} {self.name} {self.path}"


class FaultyFilesystem(Filesystem):
    """Counts and reports the operations of one process, and has one of them fail. Thread: any."""

    def __init__(
        self,
        inner: ModelFilesystem,
        fault: Fault | None = None,
        *,
        observe: Callable[[Operation, Phase], None] | None = None,
    ) -> None:
        self.inner, self._fault, self._observe = inner, fault, observe
        self.operations: list[Operation] = []
        self.has_fired = False
        self._paths: dict[int, str] = {}
        self._former: dict[str, list[FileFacts]] = {}
        self._lock = threading.RLock()

    def arm(self, fault: Fault | None, observe: Callable[[Operation, Phase], None] | None) -> None:
        """Count from here on, and have this fault happen."""
        self.operations.clear()
        self._fault, self._observe = fault, observe

    def path_of(self, handle: int) -> str:
        """Return the path under which a file was opened."""
        return self._paths[handle]

    def now_epoch_s(self) -> float:
        return self.inner.now_epoch_s()

    def facts(self, path: str, *, follow: bool = False) -> FileFacts:
        return self._run("facts", path, lambda: self.inner.facts(path, follow=follow))

    def list_directory(self, path: str) -> list[FileFacts]:
        def answer() -> list[FileFacts]:
            if self._is_now("stale") and path in self._former:
                self.has_fired = True
                return self._former[path]
            return self.inner.list_directory(path)

        return self._run("list_directory", path, answer)

    def make_directory(self, path: str) -> None:
        self._run("make_directory", path, lambda: self.inner.make_directory(path), changed=path)

    def remove_directory(self, path: str) -> None:
        self._run("remove_directory", path, lambda: self.inner.remove_directory(path), changed=path)

    def fsync_directory(self, path: str) -> None:
        self._run("fsync_directory", path, lambda: self.inner.fsync_directory(path))

    def create(self, path: str) -> int:
        return self._open("create", path, lambda: self.inner.create(path), changed=path)

    def open_direct(self, path: str) -> int | None:
        return self._open("open_direct", path, lambda: self.inner.open_direct(path))

    def open_read(self, path: str) -> int:
        return self._open("open_read", path, lambda: self.inner.open_read(path))

    def preallocate(self, handle: int, size_bytes: int) -> None:
        self._run("preallocate", self._paths[handle], lambda: self.inner.preallocate(handle, size_bytes))

    def write(self, handle: int, offset: int, views: Sequence[memoryview]) -> int:
        content = b"".join(views)

        def act() -> int:
            if self._is_now("short"):
                self.has_fired = True
                return self.inner.write(handle, offset, [memoryview(content)[: -(-len(content) // 2)]])
            return self.inner.write(handle, offset, views)

        def tear() -> None:
            untorn = self.inner.disk.nodes
            self.inner.disk.nodes = dict(untorn)
            # A kernel stops a write between pages; half a direct write is still a whole number of sectors.
            self.inner.write(handle, offset, [memoryview(content)[: len(content) // 1024 * 512]])
            assert self._observe is not None
            self._observe(self.operations[-1], "torn")
            self.inner.disk.nodes = untorn

        return self._run("write", self._paths[handle], act, tear=tear)

    def read(self, handle: int, offset: int, view: memoryview) -> int:
        return self._run("read", self._paths[handle], lambda: self.inner.read(handle, offset, view))

    def size_bytes(self, handle: int) -> int:
        return self._run("size_bytes", self._paths[handle], lambda: self.inner.size_bytes(handle))

    def fsync(self, handle: int) -> None:
        fails = self._fault is not None and self._fault.kind == "error"
        self._run(
            "fsync",
            self._paths[handle],
            lambda: self.inner.fsync(handle),
            instead=(lambda: self.inner.lose_writes(handle)) if fails else None,
        )

    def close(self, handle: int) -> None:
        self.inner.close(handle)

    def rename(self, source: str, target: str) -> None:
        self._run("rename", target, lambda: self.inner.rename(source, target), changed=target)

    def link(self, source: str, target: str) -> None:
        self._run("link", target, lambda: self.inner.link(source, target), changed=target)

    def unlink(self, path: str) -> None:
        self._run("unlink", path, lambda: self.inner.unlink(path), changed=path)

    def free_bytes(self, path: str) -> int:
        return self._run("free_bytes", path, lambda: self.inner.free_bytes(path))

    # Faults

    def _open(self, name: str, path: str, act: Callable[[], T], *, changed: str | None = None) -> T:
        handle = self._run(name, path, act, changed=changed)
        if isinstance(handle, int):
            self._paths[handle] = path
        return handle

    def _is_now(self, kind: FaultKind) -> bool:
        return self._fault is not None and self._fault.kind == kind and self._fault.number == len(self.operations)

    def _run(
        self,
        name: str,
        path: str,
        act: Callable[[], T],
        *,
        changed: str | None = None,
        instead: Callable[[], None] | None = None,
        tear: Callable[[], None] | None = None,
    ) -> T:
        with self._lock:
            self.operations.append(Operation(number=len(self.operations) + 1, name=name, path=path))
            self._fail_before(instead)
            if changed is not None and self._fault is not None and self._fault.kind == "stale":
                folder = os.path.dirname(changed)
                self._former[folder] = self.inner.list_directory(folder)
            if self._observe is not None:
                self._observe(self.operations[-1], "before")
                if tear is not None:
                    tear()
            result = act()
            if self._observe is not None:
                self._observe(self.operations[-1], "after")
            if self._is_now("applied"):
                self._fail()
            return result

    def _fail_before(self, instead: Callable[[], None] | None) -> None:
        number = len(self.operations)
        if self._fault is None or number < self._fault.number:
            return
        if self._fault.kind == "crash":
            self.has_fired = True
            raise Crash(str(self._fault))
        if self._fault.kind == "dead" or self._is_now("error"):
            if instead is not None:
                instead()
            self._fail()

    def _fail(self) -> None:
        assert self._fault is not None
        self.has_fired = True
        raise OSError(self._fault.errno, os.strerror(self._fault.errno))
