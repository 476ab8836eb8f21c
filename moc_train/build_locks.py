"""Clear the way for DeepSpeed's native operations, which torch builds at first use under a lock file.

A process that is killed while it builds, or looks whether it must, leaves its lock behind, and every later start would
wait for it for ever. A living builder keeps the file open, so what no process here has open is a dead one's lock; in a
folder that other machines may share, whose processes cannot be seen, it must be old as well.
"""

import os
import time
from pathlib import Path

import torch.utils.cpp_extension

__all__ = ["clear_dead_locks", "extension_roots"]

DEAD_AFTER_S = 300.0  # a build takes less than this
LOCAL = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})
"""Types of file systems that belong to one machine."""


def extension_roots() -> tuple[Path, ...]:
    """Return the folders under which torch keeps the operations that it has built."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (Path(given or torch.utils.cpp_extension.get_default_build_root()),)


def clear_dead_locks(roots: tuple[Path, ...], *, now_s: float | None = None) -> tuple[Path, ...]:
    """Remove the locks of builders that are gone and return them."""
    now_s = time.time() if now_s is None else now_s
    locks = {lock for root in roots for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)}
    dead = []
    for lock in sorted(locks):
        try:
            before = lock.stat()
            may_be_elsewhere = not is_local(lock) and now_s - before.st_mtime <= DEAD_AFTER_S
            # The same file still: another builder may have made a new one since.
            if not may_be_elsewhere and not _is_open(lock) and os.path.samestat(before, lock.stat()):
                lock.unlink()
                dead.append(lock)
        except FileNotFoundError:  # its builder has just finished
            continue
    return tuple(dead)


def is_local(path: Path, mounts: str | None = None) -> bool:
    """Return whether only processes of this machine can have the file open; `mounts` is as /proc/self/mounts."""
    mounts = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    kind_of = {Path(fields[1].replace("\\040", " ")): fields[2] for fields in map(str.split, mounts.splitlines())}
    resolved = path.resolve()
    kind = next((kind_of[folder] for folder in (resolved, *resolved.parents) if folder in kind_of), "")
    return kind in LOCAL


def _is_open(path: Path) -> bool:
    target = str(path.resolve())
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) == target for entry in folder.iterdir()):
                return True
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # it has ended, or is another user's, who could not have made our lock
    return False
