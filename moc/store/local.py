"""A store on local or mounted files: whole objects appear by rename, after their bytes are durable.

Put: temporary file in the object's directory, preallocate, write, fsync, rename (or link, which fails where the name exists),
then fsync of the directory and of every directory above it up to the root. The directories above are synced at each put, not
only by the process that made them: it may have died in between. No symbolic link below the root is followed, and a root that
existed is never made again: a root that is gone, or is another directory than before, is an unmounted disk until proven otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from moc.errors import (
    ClosedError,
    FencedError,
    IntegrityError,
    ObjectMissingError,
    StorageError,
    StoreDeniedError,
    StoreUnavailableError,
    UsageError,
)
from moc.store.filesystem import FileFacts, Filesystem, PosixFilesystem
from moc.store.key import byte_views, is_key, require_key, require_prefix
from moc.store.pieces import ALIGNMENT_BYTES, Piece, batch_pieces, split_pieces
from moc.store.port import Entry, Segment, StoreProperties
from moc.store.translate import translate_os_error
from moc.trace import Trace

__all__ = ["DIRECT_MINIMUM_BYTES", "LocalStore"]

DIRECT_MINIMUM_BYTES = 2**20  # below, opening a second handle costs more than the copy through the page cache
READ_BYTES = 16 * 2**20  # one call stays below a second on a slow disk
CREATE_ATTEMPTS = 5  # a delete may remove the empty directory that a put has just made

_TEMPORARY = re.compile(r"\.[A-Za-z0-9._-]+~[0-9]+-[0-9a-f]{8}")


class LocalStore:
    """Objects as files below `root`, which is created by the first put where it does not exist. Thread: any."""

    def __init__(self, root: Path, *, trace: Trace | None = None, filesystem: Filesystem | None = None) -> None:
        self._root = os.path.abspath(root)
        self._trace = trace or Trace()
        self._files: Filesystem = filesystem or PosixFilesystem()
        self._properties = StoreProperties(url=self._root, create_only=True, is_local=True)
        self._is_closed = False
        self._is_root_durable = False
        self._root_identity: tuple[int, int] | None = None
        with self._translated("open"):
            self._is_root_present()

    @property
    def properties(self) -> StoreProperties:
        return self._properties

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        views = byte_views(segments)
        path = self._path(key)
        with self._translated("put", key):
            temporary, handle = self._create(key)
            try:
                self._fill(handle, temporary, key, views)
                with self._trace.span("store.rename", key=key):
                    if create_only:
                        self._link(temporary, path, key, views)
                    else:
                        self._files.rename(temporary, path)
            except BaseException:
                # A file that cannot be removed now is left to sweep_temporaries: the first error is the one to report.
                with contextlib.suppress(OSError):
                    self._files.unlink(temporary)
                raise
            self._sync_directories(key)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        with self._opened(key, "read") as handle:
            size_bytes = self._files.size_bytes(handle)
            if size_bytes > limit_bytes:
                raise IntegrityError(f"object is too large {self._subject(key)} {size_bytes=} {limit_bytes=}")
            content = bytearray(size_bytes)
            self._read_fully(handle, key, 0, memoryview(content))
            return bytes(content)

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        if offset < 0 or view.readonly or not view.c_contiguous:
            raise UsageError(f"cannot read into this view {offset=} readonly={view.readonly} allowed=writable and contiguous")
        with self._opened(key, "read") as handle:
            self._read_fully(handle, key, offset, view.cast("B"))

    def size_bytes(self, key: str) -> int:
        with self._opened(key, "stat") as handle:
            return self._files.size_bytes(handle)

    def list(self, prefix: str) -> list[Entry]:
        require_prefix(prefix)
        self._require_open()
        with self._translated("list", prefix):
            if not self._is_root_present() or (prefix and self._find(prefix) is None):
                return []
            entries = [
                Entry(key=key, size_bytes=facts.size_bytes, modified_s=facts.modified_s)
                for key, facts in self._walk(prefix)
                if is_key(key)
            ]
            self._is_root_present()  # a root that went away in the meantime must not look like an empty one
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._translated("delete", key):
            if not self._is_root_present() or self._find(key) is None:
                return
            with self._trace.span("store.delete", key=key):
                # Another process may delete the same key: missing is what was asked for.
                with contextlib.suppress(FileNotFoundError):
                    self._files.unlink(path)
                # Deletes come in an order that matters (a manifest before its objects), so each is durable by itself.
                with contextlib.suppress(FileNotFoundError):
                    self._files.fsync_directory(os.path.dirname(path))
                self._remove_empty_directories(key)

    def free_bytes(self) -> int | None:
        self._require_open()
        with self._translated("statvfs"):
            directory = self._root
            if not self._is_root_present():
                while not os.path.isdir(directory):
                    directory = os.path.dirname(directory)
            return self._files.free_bytes(directory)

    def close(self) -> None:
        self._is_closed = True

    def sweep_temporaries(self, older_than_s: float) -> int:
        """Remove what crashed puts left behind, and return how many files that were; a writer touches its own file all the time."""
        self._require_open()
        removed = 0
        with self._translated("sweep"):
            if not self._is_root_present():
                return 0
            newest_s = self._files.now_epoch_s() - older_than_s
            for name, facts in list(self._walk("")):
                if _TEMPORARY.fullmatch(facts.name) and facts.modified_s <= newest_s:
                    with contextlib.suppress(FileNotFoundError):
                        self._files.unlink(f"{self._root}/{name}")
                        removed += 1
        return removed

    # Writing

    def _create(self, key: str) -> tuple[str, int]:
        """Make the key's directories and a temporary file; returns its path and handle."""
        directory, name = os.path.split(self._path(key))
        temporary = f"{directory}/.{name}~{os.getpid()}-{secrets.token_hex(4)}"
        with self._trace.span("store.create", key=key):
            for attempt in range(1, CREATE_ATTEMPTS + 1):
                self._make_directories(key)
                try:
                    return temporary, self._files.create(temporary)
                except FileNotFoundError:
                    if attempt == CREATE_ATTEMPTS:
                        raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _fill(self, handle: int, temporary: str, key: str, views: Sequence[memoryview]) -> None:
        """Write all bytes and make them durable; closes `handle`."""
        total_bytes = sum(view.nbytes for view in views)
        try:
            with self._trace.span("store.write", key=key, bytes=total_bytes):
                if total_bytes:
                    self._files.preallocate(handle, total_bytes)
                self._write(handle, temporary, views, total_bytes)
                written_bytes = self._files.size_bytes(handle)
                if written_bytes != total_bytes:
                    raise StoreUnavailableError(f"wrong length after write {self._subject(key)} {total_bytes=} {written_bytes=}")
            with self._trace.span("store.fsync", key=key):
                self._files.fsync(handle)
        finally:
            self._files.close(handle)

    def _write(self, handle: int, temporary: str, views: Sequence[memoryview], total_bytes: int) -> None:
        is_large = total_bytes >= DIRECT_MINIMUM_BYTES
        # Address 1 is aligned for nothing, so nothing of a small object is direct.
        pieces = split_pieces(views, _addresses(views) if is_large else [1] * len(views))
        direct = self._files.open_direct(temporary) if any(piece.is_direct for piece in pieces) else None
        try:
            for batch in batch_pieces(pieces):
                self._write_batch(handle, direct if batch[0].is_direct else None, batch)
        finally:
            if direct is not None:
                self._files.close(direct)

    def _write_batch(self, handle: int, direct: int | None, batch: Sequence[Piece]) -> None:
        """Write one batch whole, past the page cache while `direct` takes it."""
        offset = batch[0].offset
        views = [piece.view for piece in batch]
        while views:
            try:
                count = self._files.write(handle if direct is None else direct, offset, views)
            except OSError as error:
                if direct is None or error.errno != errno.EINVAL:
                    raise
                direct = None  # this disk wants a larger alignment
                continue
            if count <= 0:
                raise OSError(errno.EIO, "write made no progress")
            if count % ALIGNMENT_BYTES:
                direct = None
            offset += count
            views = _without_first(views, count)

    def _link(self, temporary: str, path: str, key: str, views: Sequence[memoryview]) -> None:
        """Give the object its name unless it exists with other bytes."""
        try:
            self._files.link(temporary, path)
        except FileExistsError:
            if not self._has_content(key, views):
                raise FencedError(f"object exists with other bytes {self._subject(key)}") from None
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}:
                raise
            raise StoreDeniedError(
                f"filesystem refuses hard links, which create-only puts need {self._subject(key)} errno={error.errno}"
            ) from error
        self._files.unlink(temporary)

    def _has_content(self, key: str, views: Sequence[memoryview]) -> bool:
        with self._opened(key, "compare") as handle:
            if self._files.size_bytes(handle) != sum(view.nbytes for view in views):
                return False
            offset = 0
            for view in views:
                for begin in range(0, view.nbytes, READ_BYTES):
                    expected = view[begin : begin + READ_BYTES]
                    found = bytearray(expected.nbytes)
                    self._read_fully(handle, key, offset, memoryview(found))
                    if found != expected:
                        return False
                    offset += expected.nbytes
        return True

    # Directories

    def _make_directories(self, key: str) -> None:
        if not self._is_root_present():
            missing = [self._root]
            while not os.path.lexists(os.path.dirname(missing[-1])):
                missing.append(os.path.dirname(missing[-1]))
            for directory in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    self._files.make_directory(directory)
            self._is_root_present()
        directory = self._root
        for segment in key.split("/")[:-1]:
            directory = f"{directory}/{segment}"
            with contextlib.suppress(FileExistsError):
                self._files.make_directory(directory)
            self._require_kind(self._files.facts(directory), directory, "directory")

    def _sync_directories(self, key: str) -> None:
        """Make every name on the way to the object durable, from the object up."""
        directory = os.path.dirname(self._path(key))
        while True:
            self._sync_directory(directory)
            if directory == self._root:
                break
            directory = os.path.dirname(directory)
        if not self._is_root_durable:
            self._sync_above_root()
            self._is_root_durable = True

    def _sync_above_root(self) -> None:
        """Make the root's own name durable, up to where its filesystem begins or what this user may not open."""
        device = self._files.facts(self._root, follow=True).identity[0]
        directory = self._root
        while directory != os.path.dirname(directory):
            directory = os.path.dirname(directory)
            if self._files.facts(directory, follow=True).identity[0] != device:
                return
            try:
                self._sync_directory(directory)
            except PermissionError:
                return

    def _sync_directory(self, directory: str) -> None:
        with self._trace.span("store.fsync_directory", directory=directory):
            self._files.fsync_directory(directory)

    def _remove_empty_directories(self, key: str) -> None:
        for depth in range(key.count("/"), 0, -1):
            try:
                self._files.remove_directory(f"{self._root}/{'/'.join(key.split('/')[:depth])}")
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                    return
                raise

    # Reading

    @contextlib.contextmanager
    def _opened(self, key: str, action: str) -> Iterator[int]:
        path = self._path(key)
        with self._translated(action, key):
            facts = self._find(key) if self._is_root_present() else None
            if facts is None or facts.kind == "directory":
                raise ObjectMissingError(f"object does not exist {self._subject(key)}")
            self._require_kind(facts, path, "file")
            handle = self._files.open_read(path)
            try:
                yield handle
            finally:
                self._files.close(handle)

    def _read_fully(self, handle: int, key: str, offset: int, view: memoryview) -> None:
        done = 0
        while done < view.nbytes:
            count = self._files.read(handle, offset + done, view[done : done + READ_BYTES])
            if count == 0:
                wanted = offset + view.nbytes
                raise IntegrityError(f"object ends early {self._subject(key)} wanted_bytes={wanted} size_bytes={offset + done}")
            done += count

    def _walk(self, prefix: str) -> Iterator[tuple[str, FileFacts]]:
        """Yield the path below the root and the facts of every file under `prefix`."""
        pending = [prefix]
        while pending:
            directory = pending.pop()
            try:
                rows = self._files.list_directory(f"{self._root}/{directory}" if directory else self._root)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for facts in rows:
                name = f"{directory}/{facts.name}" if directory else facts.name
                if facts.kind == "directory":
                    pending.append(name)
                elif facts.kind == "file":
                    yield name, facts
                else:
                    self._require_kind(facts, f"{self._root}/{name}", "file")

    def _find(self, key: str) -> FileFacts | None:
        """Return the facts of a key or prefix, or None where it does not exist; raises when a link is on the way."""
        path = self._root
        facts = None
        for segment in key.split("/"):
            path = f"{path}/{segment}"
            try:
                facts = self._files.facts(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            if facts.kind == "link":
                self._require_kind(facts, path, "directory")
        return facts

    # Checks

    def _is_root_present(self) -> bool:
        """Return whether the root exists; raises StoreUnavailableError when it has gone or is another directory than before."""
        try:
            facts = self._files.facts(self._root, follow=True)
        except FileNotFoundError:
            if self._root_identity is None:
                return False
            raise StoreUnavailableError(f"the repository's folder has gone path={self._root}") from None
        if facts.kind != "directory":
            raise UsageError(f"not a folder path={self._root} kind={facts.kind} allowed=a folder or a path that does not exist")
        if self._root_identity is None:
            self._root_identity = facts.identity
        if self._root_identity != facts.identity:
            raise StoreUnavailableError(f"another folder is now at the repository's path path={self._root} reason='unmounted?'")
        return True

    def _require_kind(self, facts: FileFacts, path: str, allowed: str) -> None:
        if facts.kind == allowed:
            return
        if facts.kind == "link":
            raise StoreDeniedError(f"symbolic link inside the repository path={path} allowed=files and folders")
        raise UsageError(f"path is occupied path={path} kind={facts.kind} allowed={allowed}")

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"store is closed url={self._root}")

    def _path(self, key: str) -> str:
        require_key(key)
        self._require_open()
        return f"{self._root}/{key}"

    def _subject(self, key: str) -> str:
        return f"{key=} root={self._root}"

    @contextlib.contextmanager
    def _translated(self, action: str, key: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._translate(error, action, key) from error

    def _translate(self, error: OSError, action: str, key: str) -> StorageError:
        return translate_os_error(error, action=action, subject=self._subject(key))


def _addresses(views: Sequence[memoryview]) -> list[int]:
    """Return where each view's bytes lie in memory."""
    import numpy as np  # only for large puts: listing a repository stays quick

    return [int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) for view in views]


def _without_first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the views without their first `count` bytes."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
        count -= view.nbytes
    return []
