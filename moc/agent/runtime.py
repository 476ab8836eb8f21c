"""Where an agent lives: one private folder per run under a root that stands for a node."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import IO

from moc.errors import UsageError
from moc.format.keys import check_run_id

__all__ = [
    "LOCK_NAME",
    "LOG_NAME",
    "SOCKET_NAME",
    "default_root",
    "existing_root",
    "live_agents",
    "node_identity",
    "open_private",
    "own_address",
    "remember_run",
    "remembered_run",
    "runtime_folder",
]

SOCKET_NAME = "agent.sock"
LOCK_NAME = "agent.lock"
LOG_NAME = "agent.log"
NOTE_LIMIT_BYTES = 64  # a run id has at most 32
SOCKET_PATH_LIMIT = 100  # sun_path holds 108 bytes


def default_root() -> Path:
    """Return this user's root; two "nodes" on one machine need two roots."""
    return Path(f"/tmp/moc-{os.getuid()}")


def existing_root(root: Path | None) -> Path | None:
    """Return the root, None if there is none; raises UsageError for one that somebody else could put things into."""
    base = default_root() if root is None else root
    try:
        status = base.lstat()
    except FileNotFoundError:
        return None
    _require_private(base, status)
    return base


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
    base = existing_root(root)
    if base is None:
        return []
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


def own_address() -> str | None:
    """Return this machine's address on the way to the launcher's host, None if there is no way or its name is not
    known.

    Sends nothing. The launcher's host is MASTER_ADDR, by which the ranks of torch find each other.
    """
    host = os.environ.get("MASTER_ADDR", socket.gethostname())
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)  # any port: a datagram socket has no connection
    except (OSError, UnicodeError):  # the latter for what cannot be a name
        return None
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as probe:
            if probe.connect_ex(place) == 0:
                return str(probe.getsockname()[0])
    return None


def remember_run(root: Path | None, url_digest: str, run: str) -> None:
    """Note which run uses a repository, so that a recovery from memory can start while the storage is down."""
    base = default_root() if root is None else root
    _make_private(base)
    note = base / f"{url_digest}.run"
    staged = base / f".{url_digest}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):  # of a process with this pid that died here
        staged.unlink()
    with open_private(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as stream:
        stream.write(run.encode())
    staged.replace(note)


def remembered_run(root: Path | None, url_digest: str) -> str | None:
    """Return the run noted for a repository, None if there is none. Raises UsageError for a root of somebody else."""
    base = existing_root(root)
    if base is None:
        return None
    try:
        with open_private(base / f"{url_digest}.run", os.O_RDONLY) as stream:
            text = stream.read(NOTE_LIMIT_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    return check_run_id(text) if text else None  # nothing in it: a power loss, which no memory has survived


def open_private(path: Path, flags: int) -> IO[bytes]:
    """Open a file of a runtime folder, mode 0600 where it is made.

    Raises FileNotFoundError, and UsageError for a link, for anything that is no plain file, and for somebody else's.
    """
    try:
        handle = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise UsageError(f"not a plain file: path={path} allowed=a file of this user's own") from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_nlink > 1:
        os.close(handle)
        raise UsageError(
            f"not a plain file of this user: path={path} owner={status.st_uid} mode={stat.filemode(status.st_mode)} "
            f"links={status.st_nlink} allowed=a file of this user's own with one name"
        )
    kind = "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "ab" if flags & os.O_APPEND else "wb"
    return os.fdopen(handle, kind)


def _make_private(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    _require_private(path, path.lstat())


def _require_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise UsageError(
            f"runtime folder is not private: path={path} owner={status.st_uid} mode={stat.filemode(status.st_mode)} "
            "allowed=a folder of this user's own, mode drwx------"
        )
