"""Brings a node's snapshots to one other node's agent, on a thread of its own, one parcel at a time.

Whatever the other agent does (it is gone, slow, refuses, answers something else), a parcel ends within a bounded time
and number of attempts, with an outcome that says so; training does not notice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from moc.agent.peers.client import PeerClient
from moc.agent.peers.proof import Membership
from moc.errors import ClosedError, CoordinationError, MocError
from moc.host import Host
from moc.plan.freeing import Moment
from moc.snapshot.arena import Arena
from moc.snapshot.parcel import parcel_bytes, parcel_chunks, seal_mark, write_seal
from moc.snapshot.seal import SealRecord
from moc.trace import Trace

__all__ = ["Courier", "Delivery", "Parcel"]

log = logging.getLogger(__name__)

ATTEMPTS = 3  # a host that fails so often in a row is counted as away: it is tried once for each moment from then on
RETRY_WAIT_S = 0.5
STALL_S = 10.0  # for one operation on the socket
SLOWEST_BYTES_PER_S = 20e6  # a host that takes less is no better than none: a moment would wait for it for too long
FASTEST_BYTES_PER_S = 1e9  # leaves most of a 100 Gbit/s network to training


@dataclass(slots=True, eq=False)
class Parcel:
    """The seals of one moment of this node's ranks, pinned until the delivery ends; `known` is global already."""

    arena: Arena
    records: Mapping[int, SealRecord]
    moment: Moment
    token: str
    known: Moment | None
    url: str
    is_cancelled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """Read the arena no more: when this returns nothing does."""
        with self.lock:
            self.is_cancelled = True

    def chunks(self, record: SealRecord, units: tuple[int, ...]) -> Iterator[memoryview]:
        """Yield the bytes of a rank's units; raises ClosedError once it is cancelled."""
        pieces = parcel_chunks(self.arena, record, units)
        while True:
            with self.lock:
                if self.is_cancelled:
                    raise ClosedError(f"the parcel was cancelled: step={self.moment[0]}")
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How a parcel ended at one host; `error` is None if the host holds all of it."""

    node: int
    moment: Moment
    size_bytes: int
    seconds: float
    error: str | None


class Courier:
    """Delivers to the agent of one node. Thread: public methods from one; `on_end` is called on the courier's."""

    def __init__(
        self,
        member: Membership,
        node: int,
        *,
        stall_s: float,
        pace: float = FASTEST_BYTES_PER_S,
        on_end: Callable[[Delivery], None],
        host: Host,
        trace: Trace,
    ) -> None:
        """`stall_s` bounds each wait for the other side, `pace` the bytes per second."""
        self._member, self._node, self._stall_s, self._pace = member, node, min(stall_s, STALL_S), pace
        self._on_end, self._host, self._trace = on_end, host, trace
        self._parcel: Parcel | None = None
        self._queued, self._closing = host.semaphore(), host.event()
        self._is_away = False
        self._thread = host.spawn(self._run, name=f"moc-courier-{node}")

    def send(self, parcel: Parcel) -> None:
        """Deliver a parcel; the one before has ended."""
        self._parcel = parcel
        self._queued.release()

    def close(self) -> None:
        """Cancel what is under way. Returns at once: the thread ends by itself, and reads no arena any more."""
        self._closing.set()
        parcel = self._parcel
        if parcel is not None:
            parcel.cancel()
        self._queued.release()

    def _run(self) -> None:
        while self._queued.acquire() and not self._closing.is_set():
            parcel = self._parcel
            assert parcel is not None, "queued with the permit"
            delivery = self._attempt(parcel)
            self._is_away = delivery.error is not None
            if not self._closing.is_set():
                self._on_end(delivery)

    def _attempt(self, parcel: Parcel) -> Delivery:
        """Deliver and say how it went: the thread's top, nothing escapes."""
        began_s, size, error = self._host.now_s(), 0, None
        for attempt in range(1, (1 if self._is_away else ATTEMPTS) + 1):
            error = None
            try:
                with self._trace.span("replica.send", step=parcel.moment[0], node=self._node):
                    size += sum(self._deliver(parcel, record) for record in parcel.records.values())
                break
            except ClosedError as failure:
                error = str(failure)
                break
            except MocError as failure:
                error = f"{type(failure).__name__}: {failure}"
            except Exception as failure:  # a defect: recorded, reported, and the next moment starts afresh
                error = f"InternalError: {type(failure).__name__}: {failure}"
                log.exception("replication failed: node=%d step=%d", self._node, parcel.moment[0])
            log.warning("replica was not taken: node=%d step=%d %s", self._node, parcel.moment[0], error)
            if attempt < ATTEMPTS and not self._is_away and self._closing.wait(RETRY_WAIT_S):
                break
        seconds = self._host.now_s() - began_s
        return Delivery(node=self._node, moment=parcel.moment, size_bytes=size, seconds=seconds, error=error)

    def _deliver(self, parcel: Parcel, record: SealRecord) -> int:
        """Bring one rank's snapshot; return the bytes that travelled. Raises: MocError."""
        client = PeerClient(self._member, parcel.url, stall_s=self._stall_s, host=self._host)
        known = None if parcel.known is None else list(parcel.known)
        offer = {"seal": write_seal(record), "token": parcel.token, "known": known}
        answer = client.ask("/replica/offer", offer)
        if "held" in answer:
            return self._refuse_other(record, answer, size_bytes=0)
        units = answer.get("units")
        if not isinstance(units, list) or any(type(u) is not int or not 0 <= u < len(record.slots) for u in units):
            raise CoordinationError(f"answer to an offer is not readable: node={self._node} units={units!r:.80}")
        wanted = tuple(sorted(set(units)))
        size = parcel_bytes(parcel.arena, record, wanted)
        target = f"/replica/data?rank={record.rank}&step={record.step}&attempt={record.attempt}"
        deadline_s = self._host.now_s() + self._stall_s + size / SLOWEST_BYTES_PER_S
        client.put(target, parcel.chunks(record, wanted), size_bytes=size, deadline_s=deadline_s, pace=self._pace)
        sealed = {"rank": record.rank, "step": record.step, "attempt": record.attempt}
        return self._refuse_other(record, client.ask("/replica/seal", sealed), size_bytes=size)

    def _refuse_other(self, record: SealRecord, answer: Mapping[str, object], *, size_bytes: int) -> int:
        """Return the bytes that travelled; raises CoordinationError if the peer holds something else than was sent."""
        expected = seal_mark(record)
        if answer.get("held") != expected:
            raise CoordinationError(
                f"the replica is not what was sent: node={self._node} rank={record.rank} step={record.step} "
                f"{expected=} actual={answer.get('held')!r:.80}"
            )
        return size_bytes
