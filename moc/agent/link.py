"""A trainer's standing relation to its agent: the bell, and a new agent when the old one has died.

Nothing here blocks the training thread: reconnecting happens on a thread of its own, and while there is no agent
snapshots go on until the arena has no free record.
"""

from __future__ import annotations

import logging
from pathlib import Path

from moc.agent.client import AgentClient, ensure_agent
from moc.errors import MocError
from moc.host import Host, Task
from moc.snapshot.arena import Arena
from moc.trace import Trace

__all__ = ["AgentLink"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
RECONNECT_WAIT_S = 0.2
RECONNECT_ATTEMPTS = 150  # 30 s; after that the next boundary starts over


class AgentLink:
    """Thread: `ring` from the copy thread, the rest from the training thread."""

    def __init__(
        self,
        folder: Path,
        *,
        run: str,
        rank: int,
        is_leader: bool,
        incarnation: int,
        idle_s: float,
        arena: Arena,
        host: Host,
        trace: Trace,
    ) -> None:
        """`is_leader` marks the one trainer of the node that starts agents."""
        self.folder, self._run, self._rank, self._is_leader = folder, run, rank, is_leader
        self._incarnation, self._idle_s, self._arena, self._host = incarnation, idle_s, arena, host
        self._trace = trace
        self._bell = AgentClient.connect(folder, timeout_s=CONNECT_TIMEOUT_S, host=host)
        self._closing = host.event()
        self._reconnecting: Task | None = None
        self.agents_replaced = 0

    def ring(self, _step: int) -> None:
        """Tell the agent that a snapshot was sealed; never blocks."""
        self._bell.ring()

    def look(self) -> None:
        """See whether the agent is still there; begin to replace it if not. Never blocks."""
        if not self._is_reconnecting() and self._bell.is_gone():
            self._replace()

    def _is_reconnecting(self) -> bool:
        return self._reconnecting is not None and self._reconnecting.is_alive()

    def _replace(self) -> None:
        log.warning("agent is gone: folder=%s rank=%d", self.folder, self._rank)
        self._reconnecting = self._host.spawn(self._reconnect, name="moc-reconnect")

    def wait_connected(self, timeout_s: float, *, is_gone: bool) -> None:
        """Wait until the agent is there, or a new one has adopted the arena, or the time is over.

        `is_gone`: the caller knows better than the bell, which a dying agent closes among its last descriptors.
        """
        self.look()
        if is_gone and not self._is_reconnecting():
            self._replace()
        if self._reconnecting is not None:
            self._reconnecting.join(timeout_s)

    def skip(self, step: int, attempt: str, reason: str) -> None:
        """Tell the agent that this rank has no snapshot for a save. Blocks: for one round trip. Raises: MocError."""
        client = AgentClient.connect(self.folder, timeout_s=CONNECT_TIMEOUT_S, host=self._host)
        try:
            client.request("skip", {"step": step, "attempt": attempt, "rank": self._rank, "reason": reason})
        finally:
            client.close()

    def close(self) -> None:
        self._closing.set()
        if self._reconnecting is not None:
            self._reconnecting.join()
        self._bell.close()

    def _reconnect(self) -> None:
        for _ in range(RECONNECT_ATTEMPTS):
            try:
                with self._trace.span("agent.reconnect", rank=self._rank):
                    client = self._connect()
                    client.hello(rank=self._rank, incarnation=self._incarnation)
                    client.request("adopt", descriptors=[self._arena.fd])
                    bell = AgentClient.connect(self.folder, timeout_s=CONNECT_TIMEOUT_S, host=self._host)
            except (MocError, OSError) as error:
                log.info("no agent yet: rank=%d reason=%s", self._rank, error)
                if self._closing.wait(RECONNECT_WAIT_S):
                    return
                continue
            client.close()
            self._bell, former = bell, self._bell
            former.close()
            self.agents_replaced += 1
            log.warning("a new agent has adopted the arena: folder=%s rank=%d", self.folder, self._rank)
            return

    def _connect(self) -> AgentClient:
        if self._is_leader:
            return ensure_agent(
                self.folder,
                run=self._run,
                idle_s=self._idle_s,
                timeout_s=CONNECT_TIMEOUT_S,
                host=self._host,
                trace=self._trace,
            )
        return AgentClient.connect(self.folder, timeout_s=CONNECT_TIMEOUT_S, host=self._host)
