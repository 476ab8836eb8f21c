"""What the node agents of this machine know about live jobs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.runtime import live_agents
from moc.errors import CoordinationError, StoreUnavailableError
from moc.store.redact import redact_url

__all__ = ["ANSWER_TIMEOUT_S", "add_runtime_root", "living_ranks", "read_status", "read_statuses", "serving_agents"]

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
