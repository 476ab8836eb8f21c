"""Whether snapshots fit into memory, asked before anything is created."""

from __future__ import annotations

import resource

from moc.agent.memory import available_memory
from moc.errors import UsageError

__all__ = ["RESERVE_BYTES", "refuse_if_too_large"]

RESERVE_BYTES = 512 << 20  # left to everything else on the node when an arena is created


def refuse_if_too_large(
    size_bytes: int, budget_bytes: int | None, *, held_bytes: int = 0, replica_bytes: int = 0
) -> None:
    """Raise UsageError if an arena of this size and room for other nodes' replicas do not fit into memory."""
    wanted = size_bytes + replica_bytes
    sizes = f"arena_bytes={size_bytes}" + (f" replica_bytes={replica_bytes}" if replica_bytes else "")
    if budget_bytes is not None and wanted > budget_bytes:
        raise UsageError(f"snapshots do not fit: {sizes} allowed=memory_budget_bytes={budget_bytes}")
    file_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size_bytes > file_bytes != resource.RLIM_INFINITY:
        raise UsageError(
            f"snapshots do not fit: arena_bytes={size_bytes} allowed={file_bytes} (the agent's RLIMIT_FSIZE, "
            "`ulimit -f` where it was started; `moc agent stop` ends it)"
        )
    room = available_memory()
    free = max(room.size_bytes - RESERVE_BYTES, 0)
    if wanted > free:
        hint = (
            f"; {held_bytes} bytes are held for the earlier life, `moc agent stop` persists and frees them"
            if held_bytes
            else ""
        )
        raise UsageError(
            f"snapshots do not fit: {sizes} allowed={free} ({room.limit}, less a reserve of "
            f"{RESERVE_BYTES}); fewer versions, replicas or ranks per node make it smaller{hint}"
        )
