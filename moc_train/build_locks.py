"""Clear the way for DeepSpeed's native operations, which torch builds at first use under a lock file.

A process that is killed while it builds leaves its lock behind, and every later start would wait for it for ever.
A living builder keeps the file open, so a lock that no process here has open, and that is not new, is a dead one's.
"""

import os
import time
from pathlib import Path

import torch.utils.cpp_extension

__all__ = ["clear_dead_locks", "extension_roots"]

# Other machines may share the folder, and their open files can not be seen: a build takes less than this.
DEAD_AFTER_S = 300.0


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
            is_old = now_s - lock.stat().st_mtime > DEAD_AFTER_S
            if is_old and not _is_open(lock):
                lock.unlink()
                dead.append(lock)
        except FileNotFoundError:  # its builder has just finished
            continue
    return tuple(dead)


def _is_open(path: Path) -> bool:
    target = str(path.resolve())
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) == target for entry in folder.iterdir()):
                return True
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # it has ended, or is another user's, who could not have made our lock
    return False
