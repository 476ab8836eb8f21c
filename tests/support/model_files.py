"""The `Filesystem` port over a model of a disk: one object is one process's view, with its open handles."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moc.store.filesystem import FileFacts, Filesystem
from tests.support.model_disk import ROOT, Directory, Disk, File, Write

__all__ = ["ModelFilesystem"]

DEVICE = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class _Handle:
    number: int
    is_writable: bool
    is_direct: bool


class ModelFilesystem(Filesystem):
    """What a well-behaved filesystem does while nothing fails. Thread: any."""

    def __init__(self, disk: Disk, *, capacity_bytes: int | None = None) -> None:
        self.disk = disk
        self._capacity_bytes = capacity_bytes
        self._handles: dict[int, _Handle] = {}
        self._next = 3
        self._lock = threading.RLock()

    def now_epoch_s(self) -> float:
        return self.disk.now_s

    def facts(self, path: str, *, follow: bool = False) -> FileFacts:
        with self._lock:
            return self._facts(path.rsplit("/", 1)[1], self._find(path))

    def list_directory(self, path: str) -> list[FileFacts]:
        with self._lock:
            entries = self.disk.directory(self._find(path)).entries
            return [self._facts(name, number) for name, number in entries.items()]

    def make_directory(self, path: str) -> None:
        with self._lock:
            parent, name = self._place(path)
            self.disk.change(parent, added=(name, self.disk.add(Directory(modified_s=self.disk.now_s))))

    def remove_directory(self, path: str) -> None:
        with self._lock:
            number = self._find(path)
            if self.disk.directory(number).entries:
                raise _error(errno.ENOTEMPTY)
            parent, name = self._parent(path)
            self.disk.change(parent, removed=name)

    def fsync_directory(self, path: str) -> None:
        with self._lock:
            number = self._find(path)
            self.disk.nodes[number] = self.disk.directory(number).synced()

    def create(self, path: str) -> int:
        with self._lock:
            parent, name = self._place(path)
            number = self.disk.add(File(modified_s=self.disk.now_s))
            self.disk.change(parent, added=(name, number))
            return self._open(number, is_writable=True)

    def open_direct(self, path: str) -> int | None:
        with self._lock:
            return self._open(self._find_file(path), is_writable=True, is_direct=True)

    def open_read(self, path: str) -> int:
        with self._lock:
            return self._open(self._find_file(path))

    def preallocate(self, handle: int, size_bytes: int) -> None:
        with self._lock:
            self._require_space(size_bytes)
            self._write(handle, Write(offset=0, length=size_bytes, content=None))

    def write(self, handle: int, offset: int, views: Sequence[memoryview]) -> int:
        content = b"".join(views)
        with self._lock:
            opened = self._handles[handle]
            is_aligned = offset % 512 == 0 and all(view.nbytes % 512 == 0 for view in views)
            if opened.is_direct and not is_aligned:
                raise _error(errno.EINVAL)
            self._write(handle, Write(offset=offset, length=len(content), content=content, is_direct=opened.is_direct))
        return len(content)

    def read(self, handle: int, offset: int, view: memoryview) -> int:
        with self._lock:
            content = self.disk.file(self._handles[handle].number).content
        part = memoryview(content)[offset : offset + view.nbytes]
        view[: part.nbytes] = part
        return part.nbytes

    def size_bytes(self, handle: int) -> int:
        with self._lock:
            return len(self.disk.file(self._handles[handle].number).content)

    def fsync(self, handle: int) -> None:
        with self._lock:
            number = self._handles[handle].number
            self.disk.nodes[number] = self.disk.file(number).synced()

    def lose_writes(self, handle: int) -> None:
        """Do what the kernel does when an fsync fails: mark the pages clean, so that no later one writes them."""
        with self._lock:
            number = self._handles[handle].number
            self.disk.nodes[number] = self.disk.file(number).unsyncable()

    def overwrite(self, path: str, offset: int, content: bytes) -> None:
        """Change bytes behind everybody's back, as a failing disk does."""
        with self._lock:
            number = self._find_file(path)
            file = self.disk.file(number)
            changed = file.content[:offset] + content + file.content[offset + len(content) :]
            self.disk.nodes[number] = replace(file, content=changed, durable=changed)

    def close(self, handle: int) -> None:
        with self._lock:
            del self._handles[handle]

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            number = self._find_file(source)
            parent, name = self._parent(target)
            source_parent, source_name = self._parent(source)
            present = self.disk.directory(parent).entries.get(name)
            if present is not None and isinstance(self.disk.nodes[present], Directory):
                raise _error(errno.EISDIR)
            assert parent == source_parent, "a rename between directories is not modelled"
            self.disk.change(parent, added=(name, number), removed=source_name)

    def link(self, source: str, target: str) -> None:
        with self._lock:
            number = self._find_file(source)
            parent, name = self._place(target)
            self.disk.change(parent, added=(name, number))

    def unlink(self, path: str) -> None:
        with self._lock:
            self._find_file(path)
            parent, name = self._parent(path)
            self.disk.change(parent, removed=name)

    def free_bytes(self, path: str) -> int:
        with self._lock:
            self._find(path)
            return (self._capacity_bytes or 1 << 40) - self._used_bytes()

    # Paths

    def _find(self, path: str) -> int:
        number = ROOT
        for name in path.strip("/").split("/") if path != "/" else ():
            entries = self.disk.directory(number).entries
            if name not in entries:
                raise _error(errno.ENOENT)
            number = entries[name]
        return number

    def _find_file(self, path: str) -> int:
        number = self._find(path)
        if isinstance(self.disk.nodes[number], Directory):
            raise _error(errno.EISDIR)
        return number

    def _parent(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        number = self._find(folder or "/")
        self.disk.directory(number)
        return number, name

    def _place(self, path: str) -> tuple[int, str]:
        """Return where a name that must not exist will stand."""
        parent, name = self._parent(path)
        if name in self.disk.directory(parent).entries:
            raise _error(errno.EEXIST)
        return parent, name

    # Files

    def _open(self, number: int, *, is_writable: bool = False, is_direct: bool = False) -> int:
        self._next += 1
        self._handles[self._next] = _Handle(number=number, is_writable=is_writable, is_direct=is_direct)
        return self._next

    def _write(self, handle: int, write: Write) -> None:
        opened = self._handles[handle]
        assert opened.is_writable, "written through a handle for reading"
        self.disk.nodes[opened.number] = self.disk.file(opened.number).written(write, self.disk.tick())

    def _require_space(self, size_bytes: int) -> None:
        if self._capacity_bytes is not None and size_bytes > self._capacity_bytes - self._used_bytes():
            raise _error(errno.ENOSPC)

    def _used_bytes(self) -> int:
        return sum(len(content) for content in self.disk.files().values())

    def _facts(self, name: str, number: int) -> FileFacts:
        node = self.disk.nodes[number]
        is_file = isinstance(node, File)
        return FileFacts(
            name=name,
            kind="file" if is_file else "directory",
            size_bytes=len(node.content) if isinstance(node, File) else 0,
            modified_s=node.modified_s,
            identity=(DEVICE, number),
        )


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
