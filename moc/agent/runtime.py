"""Where an agent lives: one private folder per run under a root that stands for a node."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from moc.errors import UsageError
from moc.format.keys import check_run_id

__all__ = [
    "LOCK_NAME",
    "LOG_NAME",
    "SOCKET_NAME",
    "default_root",
    "live_agents",
    "node_identity",
    "remember_run",
    "remembered_run",
    "runtime_folder",
]

SOCKET_NAME = "agent.sock"
LOCK_NAME = "agent.lock"
LOG_NAME = "agent.log"
SOCKET_PATH_LIMIT = 100  # sun_path holds 108 bytes


def default_root() -> Path:
    """Return this user's root; two "nodes" on one machine need two roots."""
    return Path(f"/tmp/moc-{os.getuid()}")


def runtime_folder(run: str, root: Path | None) -> Path:
    """Return (and create, mode 0700) the folder of a run's agent; raises UsageError if somebody else could enter it."""
    base = default_root() if root is None else root
    folder = base.absolute() / check_run_id(run)
    if len(str(folder / SOCKET_NAME)) > SOCKET_PATH_LIMIT:
        raise UsageError(
            f"runtime folder is too long for a socket: path={folder} allowed={SOCKET_PATH_LIMIT} characters"
        )
    for path in (base, folder):
        _make_private(path)
    return folder


def live_agents(root: Path | None) -> list[tuple[str, Path]]:
    """Return (run, folder) of every agent that answers under the root, sorted by run."""
    base = default_root() if root is None else root
    found = []
    for path in sorted(base.glob(f"*/{SOCKET_NAME}")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if probe.connect_ex(str(path)) == 0:
                found.append((path.parent.name, path.parent))
    return found


def node_identity(root: Path | None) -> str:
    """Return a text that is equal for two processes exactly if they would share one agent."""
    base = default_root() if root is None else root
    _make_private(base)
    status = base.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{status.st_dev}/{status.st_ino}"


def remember_run(root: Path | None, url_digest: str, run: str) -> None:
    """Note which run uses a repository, so that a recovery from memory can start while the storage is down."""
    base = default_root() if root is None else root
    _make_private(base)
    note = base / f"{url_digest}.run"
    staged = base / f".{url_digest}.{os.getpid()}"
    staged.write_text(run)
    staged.replace(note)


def remembered_run(root: Path | None, url_digest: str) -> str | None:
    """Return the run noted for a repository, None if there is none."""
    note = (default_root() if root is None else root) / f"{url_digest}.run"
    return note.read_text() if note.exists() else None


def _make_private(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or path.is_symlink():
        raise UsageError(
            f"runtime folder is not private: path={path} owner={status.st_uid} mode={status.st_mode & 0o777:o} "
            "allowed=own, 700"
        )
