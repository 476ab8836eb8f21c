"""What this agent lends to those who recover on other nodes: its own ranks' snapshots, and replicas of others'.

Own snapshots are read through a mapping of their own, so nothing here depends on what the agent does with its arena
meanwhile, and the agent waits for nobody: a snapshot that is freed while it is read fails the reader's checksums.

Thread: `show` and `close` from the agent's main thread, `open` from the peers'.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from moc.agent.custody import Custody
from moc.agent.guests import Guests
from moc.errors import MocError
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.snapshot.shared import SharedArena

__all__ = ["Loans"]

log = logging.getLogger(__name__)


class Loans:
    """Gives access to whatever this agent holds of a snapshot."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._lock = threading.Lock()
        self._own: SharedArena | None = None
        self._shown: tuple[Arena, int] | None = None

    def show(self, custody: Custody) -> None:
        """Lend what a recovery would read of this custody from now on; called again whenever that may have changed."""
        source = custody.source()
        shown = (source.arena, source.life.record.number)
        if shown == self._shown:
            return
        self._shown = shown
        try:
            own = SharedArena(Arena.attach(os.dup(source.arena.fd)))
        except (MocError, OSError) as error:  # no reason to end: this node's own trainers may read it still
            log.error("this node's snapshots cannot be lent: reason=%s", error)
            own = None
        self._replace(own)

    @contextmanager
    def open(self, snapshot: tuple[int, int, str], rank: int) -> Iterator[tuple[Arena, SealRecord]]:
        """Give access to a rank's part of a snapshot while the block lasts. Raises: UsageError if there is none."""
        with ExitStack() as stack:
            with self._lock:
                arena = None if self._own is None else stack.enter_context(self._own.use())
            if arena is not None and any(catalog.rank == rank for catalog in arena.catalogs):
                for record in arena.seals(rank).values():
                    if (record.incarnation, record.step, record.attempt) == snapshot:
                        yield arena, record
                        return
            yield stack.enter_context(self._guests.open(snapshot, rank))

    def close(self) -> None:
        """Lend nothing of one's own any more."""
        self._replace(None)
        self._shown = None

    def _replace(self, own: SharedArena | None) -> None:
        with self._lock:
            former, self._own = self._own, own
        if former is not None:
            former.retire()
