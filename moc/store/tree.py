"""The folders of a local store: its root, which must stay the same one, and the directories below it.

A root that existed is never made again: one that is gone, or is another directory than before, is an unmounted disk
until proven otherwise, and an empty mount point must not look like a repository without checkpoints. No symbolic link
below the root is followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from moc.errors import StoreDeniedError, StoreUnavailableError, UsageError
from moc.store.filesystem import FileFacts, Filesystem
from moc.store.key import is_key
from moc.trace import Trace

__all__ = ["Tree", "require_kind"]


class Tree:
    """The directories at and below an absolute path `root`. Thread: any. Raises OSError untranslated."""

    def __init__(self, root: str, files: Filesystem, trace: Trace) -> None:
        self._root = root
        self._files = files
        self._trace = trace
        self._is_root_durable = False
        self._root_identity: tuple[int, int] | None = None
        self.is_present()

    def nearest_directory(self) -> str:
        """Return the root, or the nearest directory above it that exists."""
        directory = self._root
        while not self._exists(directory):
            directory = os.path.dirname(directory)
        return directory

    def make_directories(self, key: str) -> None:
        """Make the directories that the key needs, and the root if it never existed."""
        if not self.is_present():
            nearest = self.nearest_directory()
            missing = []
            directory = self._root
            while directory != nearest:
                missing.append(directory)
                directory = os.path.dirname(directory)
            for directory in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    self._files.make_directory(directory)
            self.is_present()
        directory = self._root
        for segment in key.split("/")[:-1]:
            directory = f"{directory}/{segment}"
            with contextlib.suppress(FileExistsError):
                self._files.make_directory(directory)
            require_kind(self._files.facts(directory), directory, "directory")

    def sync_directories(self, key: str) -> None:
        """Make every name on the way to the object durable, from the object up.

        Also the names that were there before: the process that made them may have died before it synced them.
        """
        directory = os.path.dirname(f"{self._root}/{key}")
        while True:
            self._sync_directory(directory)
            if directory == self._root:
                break
            directory = os.path.dirname(directory)
        self._sync_root_once()

    def sync_nearest(self, key: str) -> None:
        """Make it durable that the key is missing: in its directory, or in the nearest that exists above it."""
        directory = os.path.dirname(f"{self._root}/{key}")
        while not self._is_synced(directory) and directory != self._root:
            directory = os.path.dirname(directory)

    def sync_below(self, prefix: str) -> None:
        """Make the names in every directory under `prefix` durable, and those above it, where they exist."""
        top = f"{self._root}/{prefix}" if prefix else self._root
        pending = [top]
        while pending:
            directory = pending.pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                rows = self._files.list_directory(directory)
                self._sync_directory(directory)
                pending += [f"{directory}/{row.name}" for row in rows if row.kind == "directory" and is_key(row.name)]
        while top != self._root:
            top = os.path.dirname(top)
            self._is_synced(top)
        self._sync_root_once()

    def _is_synced(self, directory: str) -> bool:
        """Sync a directory and return whether it exists."""
        try:
            self._sync_directory(directory)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _sync_root_once(self) -> None:
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

    def remove_empty_directories(self, key: str) -> None:
        """Remove the key's directories from the bottom up to the first that is in use; need not be durable."""
        directory = os.path.dirname(f"{self._root}/{key}")
        try:
            while directory != self._root:
                self._files.remove_directory(directory)
                directory = os.path.dirname(directory)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                raise

    def walk(self, prefix: str) -> Iterator[tuple[str, FileFacts]]:
        """Yield the path below the root and the facts of every file under `prefix`, temporary files included.

        Directories and links whose names no key can have (a disk's ``lost+found``) are none of the store's.
        """
        pending = [prefix]
        while pending:
            directory = pending.pop()
            try:
                rows = self._files.list_directory(f"{self._root}/{directory}" if directory else self._root)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for facts in rows:
                name = f"{directory}/{facts.name}" if directory else facts.name
                if facts.kind == "file":
                    yield name, facts
                elif is_key(facts.name) and facts.kind == "directory":
                    pending.append(name)
                elif is_key(facts.name):
                    require_kind(facts, f"{self._root}/{name}", "file")

    def find(self, key: str) -> FileFacts | None:
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
                require_kind(facts, path, "directory")
        return facts

    def is_present(self) -> bool:
        """Return whether the root exists; raises StoreUnavailableError when it has gone or was replaced."""
        try:
            facts = self._files.facts(self._root, follow=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._root_identity is None and isinstance(error, NotADirectoryError):
                raise UsageError(f"not a folder above path={self._root} allowed=a path below a folder") from error
            if self._root_identity is None:
                return False
            raise StoreUnavailableError(f"the repository's folder has gone path={self._root}") from None
        if facts.kind != "directory":
            raise UsageError(f"not a folder path={self._root} kind={facts.kind} allowed=a folder or a free path")
        if self._root_identity is None:
            self._root_identity = facts.identity
        if self._root_identity != facts.identity:
            raise StoreUnavailableError(f"another folder has taken the repository's place path={self._root}")
        return True

    def _exists(self, path: str) -> bool:
        try:
            self._files.facts(path, follow=True)
        except FileNotFoundError:
            return False
        return True


def require_kind(facts: FileFacts, path: str, allowed: str) -> None:
    """Raise unless the path is what is allowed there."""
    if facts.kind == allowed:
        return
    if facts.kind == "link":
        raise StoreDeniedError(f"symbolic link inside the repository path={path} allowed=files and folders")
    raise UsageError(f"path is occupied path={path} kind={facts.kind} allowed={allowed}")
