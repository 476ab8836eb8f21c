"""This node's part in replication: which flagged moments go to its hosts, and how far that has come.

One moment is under way at a time, the newest complete one; what is older and was not begun never will be. A host that
does not take its parcel is counted as away, and the node's duty is done without it: the loss of a peer costs safety,
which is shown, and never training (docs/decisions/, record 25). Thread: the agent's main thread, but for `_note`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moc.agent.custody import Custody
from moc.agent.guests import Guests
from moc.agent.peers.courier import Courier, Delivery, Parcel
from moc.agent.peers.proof import Membership
from moc.format.keys import LAST_STEP
from moc.host import Host
from moc.plan.freeing import Moment
from moc.plan.replication import settled_step
from moc.trace import Trace

__all__ = ["Replicas"]

log = logging.getLogger(__name__)

DONE_LIMIT = 8  # of the newest moments, told to other nodes: they look at the newest ones only


@dataclass(slots=True)
class _Duty:
    """A moment on its way to this node's hosts."""

    parcels: dict[int, Parcel]
    deliveries: dict[int, Delivery] = field(default_factory=dict)


class Replicas:
    """Owns the couriers of the present life."""

    def __init__(self, guests: Guests, *, host: Host, trace: Trace, wake: Callable[[], None]) -> None:
        """`guests` are what this node holds of others; `wake` tells the main thread that there is something to see."""
        self._guests, self._host, self._trace, self._wake = guests, host, trace, wake
        self._couriers: dict[int, Courier] = {}
        self._duties: dict[Moment, _Duty] = {}
        self._done: list[Moment] = []
        self._kept: list[Moment] = []
        self._ended: list[tuple[Moment, Delivery]] = []
        self._lock = threading.Lock()
        self._life = 0
        self._failures = self._sent_bytes = 0
        self.last_error: str | None = None

    @property
    def is_active(self) -> bool:
        """Return whether the present life's snapshots have replicas."""
        return bool(self._couriers)

    @property
    def away(self) -> list[int]:
        """The hosts that did not take the newest parcel, ascending."""
        newest = max((moment for moment, duty in self._duties.items() if duty.deliveries), default=None)
        rows = {} if newest is None else self._duties[newest].deliveries
        return sorted(node for node, delivery in rows.items() if delivery.error is not None)

    def begin_life(self, custody: Custody, member: Membership | None) -> None:
        """Serve a life of this custody from now on, among these nodes; None for a life of one node."""
        self.end_life()
        self._life = custody.life.record.number
        custody.arena.publish_settled(None)
        hosts = custody.life.hosts if member is not None else ()
        stall_s = float(custody.life.descriptor["timeout_s"])
        for node in hosts:
            assert member is not None, "a node alone has no hosts"
            self._couriers[node] = Courier(
                member, node, stall_s=stall_s, on_end=self._note, host=self._host, trace=self._trace
            )

    def end_life(self) -> None:
        """Read no arena any more and forget the life. Returns at once."""
        for courier in self._couriers.values():
            courier.close()
        self._couriers, self._duties, self._done, self._kept = {}, {}, [], []
        with self._lock:
            self._ended = []

    def look(self, custody: Custody, urls: Sequence[str]) -> None:
        """Take notice of what has been delivered, begin with what is complete, tell the trainers how far it is.

        `urls` say where the agents of all nodes are; none before they have met.
        """
        if not self._couriers or not urls or custody.life.record.number != self._life:
            return
        self._collect()
        ready = max((moment for moment in custody.unreplicated() if moment in custody.complete), default=None)
        is_busy = any(len(duty.deliveries) < len(duty.parcels) for duty in self._duties.values())
        if ready is not None and not is_busy and ready > max(self._duties, default=(-1, "")):
            self._begin(custody, ready, urls)
        custody.begun, custody.done = max(self._duties, default=None), tuple(self._done)
        # Of a dead rank it is said that it has passed everything.
        passed = [custody.passed.get(rank, (None, ""))[0] for rank in custody.life.ranks]
        steps = [None if step is None else min(step, LAST_STEP) for step in passed]
        custody.arena.publish_settled(settled_step(custody.unreplicated(), passed=steps))

    def status(self) -> dict[str, object]:
        """Return what `moc status` shows: how many replicas there are to be, who is away, what all hosts hold."""
        return {
            "replicas": len(self._couriers),
            "away": self.away,
            "replicated_step": max((moment[0] for moment in self._kept), default=None),
            "sent_bytes": self._sent_bytes,
            "failures": self._failures,
            "guest_bytes": self._guests.size_bytes(),
            "last_error": self.last_error,
        }

    def close(self) -> None:
        self.end_life()
        self._guests.close()

    def _begin(self, custody: Custody, moment: Moment, urls: Sequence[str]) -> None:
        """Send a moment to all hosts; its seals are kept until it is global, or passed over for a newer one."""
        life = custody.life.record
        records = custody.records_of(life.number, moment)
        parcels = {
            node: Parcel(
                arena=custody.arena,
                records=records,
                moment=moment,
                token=life.token,
                known=custody.stable,
                url=urls[node],
            )
            for node in self._couriers
        }
        self._duties[moment] = _Duty(parcels=parcels)
        for old in sorted(self._duties)[:-DONE_LIMIT]:
            del self._duties[old]
        for node, parcel in parcels.items():
            self._couriers[node].send(parcel)

    def _collect(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
        for moment, delivery in ended:
            duty = self._duties.get(moment)
            if duty is None:
                continue  # of a life that is over
            duty.deliveries[delivery.node] = delivery
            self._sent_bytes += delivery.size_bytes
            self._failures += delivery.error is not None
            if delivery.error is not None:
                self.last_error = f"node {delivery.node}: {delivery.error}"
                log.error("node is counted as away: node=%d step=%d %s", delivery.node, moment[0], delivery.error)
            if len(duty.deliveries) < len(duty.parcels):
                continue
            self._done = [*self._done, moment][-DONE_LIMIT:]
            if all(d.error is None for d in duty.deliveries.values()):
                self._kept = [*self._kept, moment][-DONE_LIMIT:]
                self.last_error = None

    def _note(self, delivery: Delivery) -> None:
        """Thread: a courier's."""
        with self._lock:
            self._ended.append((delivery.moment, delivery))
        self._wake()
