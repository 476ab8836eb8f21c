"""A trainer's or the command line's connection to the node agent.

The verbs `hello` and `drain` keep their meaning in every version, so that a new trainer can talk an old agent into
leaving.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import moc
from moc.agent import wire
from moc.agent.runtime import LOCK_NAME, LOG_NAME, SOCKET_NAME
from moc.errors import CoordinationError, StoreUnavailableError, UsageError, WaitTimeoutError
from moc.host import Host, SystemHost
from moc.trace import Trace

__all__ = ["AgentClient", "ensure_agent"]

START_TIMEOUT_S = 20.0
DRAIN_TIMEOUT_S = 600.0
LEAVE_TIMEOUT_S = 60.0  # between an agent's last reply and its end
LEAVE_WAIT_S = 0.01
SYSTEM = SystemHost()  # for the command line; the workflows pass their own


class AgentClient:
    """One connection. Thread: any; requests are serialised."""

    def __init__(self, sock: socket.socket, folder: Path, *, host: Host) -> None:
        self._sock, self.folder, self._host = sock, folder, host
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, folder: Path, *, timeout_s: float, host: Host = SYSTEM) -> AgentClient:
        """Connect to the agent of a runtime folder; raises StoreUnavailableError if none answers."""
        return cls(wire.connect(str(folder / SOCKET_NAME), timeout_s, host=host), folder, host=host)

    def request(
        self,
        verb: str,
        fields: Mapping[str, object] | None = None,
        descriptors: Sequence[int] = (),
        *,
        timeout_s: float | None = None,
    ) -> tuple[wire.Message, list[int]]:
        """Send a request and return the reply and its descriptors.

        Raises: UsageError or CoordinationError with the words of an agent that refuses, WaitTimeoutError,
        StoreUnavailableError if it is gone.
        """
        with self._lock:
            before = self._sock.gettimeout()
            try:
                if timeout_s is not None:
                    self._sock.settimeout(timeout_s)
                wire.send(self._sock, {"verb": verb, **(fields or {})}, descriptors)
                if not self._host.wait_readable(self._sock, timeout_s or before):
                    raise TimeoutError
                reply, received = wire.receive(self._sock)
            except TimeoutError as error:
                self._sock.close()  # the late reply must not answer the next request
                raise WaitTimeoutError(
                    f"agent did not answer in time: folder={self.folder} verb={verb} timeout_s={timeout_s or before}"
                ) from error
            except (OSError, ValueError) as error:
                raise StoreUnavailableError(f"agent is gone: verb={verb} reason={error}") from error
            if timeout_s is not None:
                self._sock.settimeout(before)
        if "error" in reply:
            for descriptor in received:
                os.close(descriptor)
            kind = UsageError if reply.get("is_usage") else CoordinationError
            raise kind(f"agent refused: verb={verb} reason={reply['error']}")
        return reply, received

    def ring(self) -> None:
        """Tell the agent that there is something to see.

        Never blocks, and a lost bell costs the agent's polling interval.
        """
        try:
            self._sock.setblocking(False)
            wire.send(self._sock, {"verb": "bell"})
        except OSError:
            return  # full queue, or no agent: it looks by itself, or will be replaced at the next boundary

    def is_gone(self) -> bool:
        """Return whether the agent has closed this connection; never blocks."""
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        return any(
            event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL)
            for _, event in poller.poll(0)
        )

    def hello(self, *, rank: int | None, incarnation: int | None) -> wire.Message:
        """Introduce this process, with a pidfd of it; the agent watches the pidfd of a trainer."""
        pidfd = self._host.pidfd()
        try:
            fields = {"version": moc.__version__, "pid": self._host.pid, "rank": rank, "incarnation": incarnation}
            return self.request("hello", fields, [pidfd])[0]
        finally:
            os.close(pidfd)

    def status(self) -> wire.Message:
        """Return the agent's report."""
        return self.request("status")[0]

    def drain(self, timeout_s: float = DRAIN_TIMEOUT_S) -> wire.Message:
        """Have the agent persist the newest global snapshot and leave.

        Returns once it is persisted and its lock is free.
        """
        reply, _ = self.request("drain", timeout_s=timeout_s)
        self.close()
        _wait_unlocked(self.folder, self._host)
        return reply

    def close(self) -> None:
        self._sock.close()


def ensure_agent(
    folder: Path,
    *,
    run: str,
    idle_s: float,
    timeout_s: float,
    before_drain: Callable[[AgentClient], None] | None = None,
    host: Host = SYSTEM,
    trace: Trace | None = None,
) -> AgentClient:
    """Return a connection to this version's agent, starting one if need be and draining one of another version.

    `before_drain` may refuse, by raising, to drain an agent whose job is alive. Called by one trainer per node. Blocks:
    about 0.3 s for a start, longer for a drain.
    """
    for _ in range(3):  # connect; replace an old version; start
        try:
            client = AgentClient.connect(folder, timeout_s=timeout_s, host=host)
        except StoreUnavailableError:
            with (trace or Trace()).span("agent.start", folder=str(folder)):
                _start(folder, run=run, idle_s=idle_s, host=host)
            continue
        reply = client.hello(rank=None, incarnation=None)
        is_leaving = bool(reply.get("leaving"))
        if reply.get("version") == moc.__version__ and not is_leaving:
            return client
        if before_drain is not None and not is_leaving:
            before_drain(client)
        client.drain()
    raise CoordinationError(f"agent could not be started: folder={folder} log={folder / LOG_NAME}")


def _start(folder: Path, *, run: str, idle_s: float, host: Host) -> None:
    """Start an agent; return when it listens, or when it gave up."""
    try:
        host.start_agent(folder, run=run, idle_s=idle_s, log=folder / LOG_NAME, timeout_s=START_TIMEOUT_S)
    except TimeoutError as error:
        raise CoordinationError(f"agent did not start in time: folder={folder} timeout_s={START_TIMEOUT_S}") from error


def _wait_unlocked(folder: Path, host: Host) -> None:
    """Wait until the agent that is leaving has let go of its lock; raises WaitTimeoutError."""
    deadline_s = host.now_s() + LEAVE_TIMEOUT_S
    while True:
        lock = host.lock(folder / LOCK_NAME)
        if lock is not None:
            lock.close()
            return
        if host.now_s() > deadline_s:
            raise WaitTimeoutError(f"agent does not leave: folder={folder} timeout_s={LEAVE_TIMEOUT_S}")
        host.sleep(LEAVE_WAIT_S)
