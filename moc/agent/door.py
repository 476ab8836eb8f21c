"""The agent's door: who may come in, how many at once, and when it stays shut for a moment.

A connection never blocks: a message comes whole or not at all, and a client whose buffer is full does not read and is
shown out, so that nobody can hold up the loop that frees memory. Thread: the agent's main thread.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
from collections.abc import Callable
from pathlib import Path

from moc.agent import wire
from moc.host import Host

__all__ = ["CONNECTION_LIMIT", "Door"]

log = logging.getLogger(__name__)

BACKLOG = 256
BURST = 32
CONNECTION_LIMIT = 512  # a rank keeps one open and needs up to three more for a moment
REST_S = 1.0
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Door:
    """The listening socket. `serve` is called with a connection that has something to read."""

    def __init__(self, selector: selectors.BaseSelector, *, serve: Callable[[socket.socket], None], host: Host) -> None:
        self._selector, self._serve, self._host = selector, serve, host
        self._listener: socket.socket | None = None
        self._is_shut = True
        self._shut_until_s = 0.0
        self._has_complained = False
        self.connections = 0

    def open(self, path: Path) -> None:
        """Listen at a path, which is taken from whoever had it before. Raises: OSError."""
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        os.chmod(path, 0o600)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self.look()

    def look(self) -> None:
        """Open again after a rest, or once there is room; called by every turn of the loop."""
        if not self._is_shut or self._listener is None:
            return
        if self.connections < CONNECTION_LIMIT and self._host.now_s() >= self._shut_until_s:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._is_shut = False

    def hang_up(self, connection: socket.socket) -> None:
        """Close a connection; again is harmless."""
        if connection.fileno() >= 0:
            self._selector.unregister(connection)
            connection.close()
            self.connections -= 1

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _accept(self, _: object) -> None:
        """Let in who waits, a few at a time: a full queue turns clients away at once."""
        assert self._listener is not None, "only an open door is registered"
        for _ in range(BURST):
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return  # that was all
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._rest(f"no connection can be accepted for now: {error}")
                else:
                    log.warning("accept failed: %s", error)
                return
            self._let_in(connection)
            if self._is_shut:
                return

    def _let_in(self, connection: socket.socket) -> None:
        if not wire.peer_is_me(connection):
            log.warning("refused a connection of another user")
            connection.close()
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, self._serve)
        self.connections += 1
        if self.connections >= CONNECTION_LIMIT:
            self._rest(f"no more connections for now: open={self.connections} allowed={CONNECTION_LIMIT}")
        else:
            self._has_complained = False

    def _rest(self, reason: str) -> None:
        """Do not look at the listener for a while: it stays readable, and the loop would spin."""
        assert self._listener is not None, "only an open door is shut"
        self._selector.unregister(self._listener)
        self._is_shut = True
        self._shut_until_s = self._host.now_s() + REST_S
        if not self._has_complained:  # once, until somebody comes in again
            log.warning("%s", reason)
            self._has_complained = True
