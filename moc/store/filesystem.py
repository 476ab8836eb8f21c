"""The few operating-system calls of a local store, behind a port, so that a model of a disk can take their place.

Every method is one action that a power loss can come before or after; all raise OSError and translate nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["FileFacts", "FileKind", "Filesystem", "PosixFilesystem"]

FileKind = Literal["file", "directory", "link", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What the filesystem says of one name."""

    name: str
    kind: FileKind
    size_bytes: int
    modified_s: float
    identity: tuple[int, int]
    """Device and inode: another value at the same path is another file, or another filesystem mounted there."""


class Filesystem(Protocol):
    """Files by absolute path and integer handle. Thread: any method from any thread."""

    def now_epoch_s(self) -> float:
        """Return the present time in the scale of `FileFacts.modified_s`."""

    def facts(self, path: str, *, follow: bool = False) -> FileFacts:
        """Return the facts of one path, of a link's target with `follow`."""

    def list_directory(self, path: str) -> list[FileFacts]:
        """Return the facts of each name in a directory, links not followed, in no order."""

    def make_directory(self, path: str) -> None:
        """Create one directory."""

    def remove_directory(self, path: str) -> None:
        """Remove one empty directory."""

    def fsync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""

    def create(self, path: str) -> int:
        """Create a file that must not exist and open it for writing."""

    def open_direct(self, path: str) -> int | None:
        """Open an existing file for writes past the page cache, or return None where the filesystem has none."""

    def open_read(self, path: str) -> int:
        """Open an existing file for reading; a link as last part of the path is refused."""

    def preallocate(self, handle: int, size_bytes: int) -> None:
        """Reserve space, so that a full disk is found out before the first byte is written."""

    def write(self, handle: int, offset: int, views: Sequence[memoryview]) -> int:
        """Write the views one after the other at `offset`; returns how many bytes were written, which may be fewer."""

    def read(self, handle: int, offset: int, view: memoryview) -> int:
        """Read into `view`; returns how many bytes were read, 0 at the end."""

    def size_bytes(self, handle: int) -> int:
        """Return the size of an open file."""

    def fsync(self, handle: int) -> None:
        """Make the content of a file durable."""

    def close(self, handle: int) -> None:
        """Close a handle."""

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, replacing the file that has it."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name that must not exist."""

    def unlink(self, path: str) -> None:
        """Remove a name."""

    def free_bytes(self, path: str) -> int:
        """Return the space left for this user on the filesystem of `path`."""


class PosixFilesystem:
    """The operating system's own files."""

    def now_epoch_s(self) -> float:
        return time.time()

    def facts(self, path: str, *, follow: bool = False) -> FileFacts:
        return _facts(os.path.basename(path), os.stat(path, follow_symlinks=follow))

    def list_directory(self, path: str) -> list[FileFacts]:
        rows = []
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # deleted since the directory was read
                    rows.append(_facts(entry.name, entry.stat(follow_symlinks=False)))
        return rows

    def make_directory(self, path: str) -> None:
        os.mkdir(path)

    def remove_directory(self, path: str) -> None:
        os.rmdir(path)

    def fsync_directory(self, path: str) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        except OSError as error:
            # Some network filesystems have no such call because their names are durable when the server has answered.
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
        finally:
            os.close(handle)

    def create(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def open_direct(self, path: str) -> int | None:
        try:
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:
                return None
            raise

    def open_read(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def preallocate(self, handle: int, size_bytes: int) -> None:
        try:
            os.posix_fallocate(handle, 0, size_bytes)
        except OSError as error:
            # Without reservations a full disk shows at the write or the fsync, which also come before the rename.
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}:
                raise

    def write(self, handle: int, offset: int, views: Sequence[memoryview]) -> int:
        return os.pwritev(handle, views, offset)

    def read(self, handle: int, offset: int, view: memoryview) -> int:
        return os.preadv(handle, [view], offset)

    def size_bytes(self, handle: int) -> int:
        return os.fstat(handle).st_size

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def free_bytes(self, path: str) -> int:
        facts = os.statvfs(path)
        return facts.f_bavail * facts.f_frsize


def _facts(name: str, status: os.stat_result) -> FileFacts:
    mode = status.st_mode
    kind: FileKind
    if stat.S_ISREG(mode):
        kind = "file"
    elif stat.S_ISDIR(mode):
        kind = "directory"
    elif stat.S_ISLNK(mode):
        kind = "link"
    else:
        kind = "other"
    return FileFacts(
        name=name,
        kind=kind,
        size_bytes=status.st_size,
        modified_s=status.st_mtime,
        identity=(status.st_dev, status.st_ino),
    )
