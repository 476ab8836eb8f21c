"""What the node agents of this machine know about live jobs."""

from __future__ import annotations

import argparse
import os
import socket
import struct
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.runtime import SOCKET_NAME, live_agents
from moc.errors import CoordinationError, StoreUnavailableError
from moc.store.redact import redact_url

__all__ = [
    "ANSWER_TIMEOUT_S",
    "add_runtime_root",
    "adopted_agents",
    "living_ranks",
    "read_status",
    "read_statuses",
    "serving_agents",
]

ANSWER_TIMEOUT_S = 10.0


def add_runtime_root(parser: argparse.ArgumentParser) -> None:
    """Add --runtime-root."""
    parser.add_argument(
        "--runtime-root",
        metavar="DIR",
        type=Path,
        default=None,
        help="folder of the agents' sockets (default: this user's own)",
    )


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return what the agent in this runtime folder says, None when it does not answer."""
    try:
        client = AgentClient.connect(folder, timeout_s=ANSWER_TIMEOUT_S)
    except StoreUnavailableError:
        return None
    try:
        return dict(client.status())
    except (CoordinationError, StoreUnavailableError):
        return None
    finally:
        client.close()


def read_statuses(run_id: str | None, root: Path | None) -> list[tuple[Path, dict[str, Any]]]:
    """Return folder and status of every agent that answers, of one run or of all, by run."""
    found = []
    for run, folder in live_agents(root):
        if run_id in (None, run):
            status = read_status(folder)
            if status is not None:
                found.append((folder, status))
    return found


def living_ranks(run_id: str, root: Path | None) -> list[int]:
    """Return the ranks of a run that live on this machine."""
    return sorted(
        int(row["rank"]) for _, status in read_statuses(run_id, root) for row in status["ranks"] if row.get("alive")
    )


def adopted_agents(root: Path | None) -> list[Path]:
    """Return the folders of the agents whose parent is this process, which adopts what its descendants leave behind.

    They end with this process's container or job step; others (a sidecar's, an earlier job's) do not.
    """
    return [folder for _, folder in live_agents(root) if _parent_pid(_peer_pid(folder)) == os.getpid()]


def _peer_pid(folder: Path) -> int:
    """Return the number of the agent that listens in a folder, as this process sees it; 0 if it cannot."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        if probe.connect_ex(str(folder / SOCKET_NAME)) != 0:
            return 0
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(pid)


def _parent_pid(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None  # it has just ended, or this /proc is not of this PID namespace
    return int(text.rpartition(")")[2].split()[1])  # the name in parentheses may hold anything


def serving_agents(url: str, root: Path | None) -> list[tuple[Path, dict[str, Any]]]:
    """Return folder and status of the agents of this machine that serve the repository at `url`."""
    wanted = _location(redact_url(url))
    return [
        (folder, status)
        for folder, status in read_statuses(None, root)
        if isinstance(status.get("storage"), str) and _location(str(status["storage"])) == wanted
    ]


def _location(url: str) -> str:
    """Return one spelling for one place."""
    return url.rstrip("/") if "://" in url else os.path.realpath(url)
