"""What an agent answers to others about replicas: takes them in from the node they belong to, and gives them, and what
it has of its own, to any member.

    POST /replica/offer   {seal, token, known}             -> {held} or {units}
    PUT  /replica/data?rank=&step=&attempt=                the units' bytes, checked against the seal on arrival
    POST /replica/seal    {rank, step, attempt}            -> {held}: it is a replica from now on
    POST /replica/find    {rank, incarnation, step, attempt}  -> {seal}
    POST /replica/catalog {rank, incarnation, step, attempt}  -> {catalog, life: {topology, software, fingerprint}}
    POST /replica/describe {rank}                          -> {descriptor}: of the lost arena that the rank was in
    GET  /replica/data?rank=&incarnation=&step=&attempt=   all bytes of a rank's part; &piece= only those of the shard
                                                           of this number, or of the "state" blob

Thread: the peers' event loop; checksums are computed beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from moc.agent import wire
from moc.agent.guests import Guests
from moc.agent.loans import Loans
from moc.agent.peers.transport import Routes
from moc.errors import MocError, UsageError
from moc.network.port import Visit, query_of
from moc.plan.freeing import Moment
from moc.snapshot.parcel import Intake, piece_range, range_chunks, read_seal, seal_mark, unit_ranges, write_seal

__all__ = ["Reception"]

STALL_S = 30.0  # between two pieces of a parcel; its sender gives up sooner
LIFE_FACTS = ("topology", "software", "fingerprint")  # of a descriptor, which holds secrets too


class Reception:
    """Answers for one agent's guests, and lends what it has."""

    def __init__(self, guests: Guests, loans: Loans) -> None:
        self._guests, self._loans = guests, loans
        self._arriving: dict[int, Intake] = {}
        self._arrived: dict[int, Intake] = {}

    def add_to(self, routes: Routes) -> None:
        routes.message("/replica/offer", self._offer)
        routes.message("/replica/seal", self._seal)
        routes.message("/replica/find", self._find)
        routes.message("/replica/catalog", self._catalog)
        routes.message("/replica/describe", self._describe)
        routes.stream("PUT", "/replica/data", self._receive)
        routes.stream("GET", "/replica/data", self._send)

    def _offer(self, node: int, body: dict[str, Any]) -> Mapping[str, object]:
        record = read_seal(body.get("seal"))
        self._arriving.pop(record.rank, None)
        self._arrived.pop(record.rank, None)
        intake = self._guests.offer(record, node=node, token=wire.text(body, "token"), known=_moment(body.get("known")))
        if not isinstance(intake, Intake):
            return {"held": seal_mark(intake)}
        self._arriving[record.rank] = intake
        return {"units": list(intake.units)}

    async def _receive(self, node: int, visit: Visit) -> None:
        query = query_of(visit.target)
        moment = (_number(query.get("step")), query.get("attempt", ""))
        intake = self._arriving.pop(_number(query.get("rank")), None)
        is_meant = intake is not None and (intake.record.step, intake.record.attempt) == moment
        if intake is None or not is_meant or visit.length != intake.size_bytes:
            visit.answer(409, f"nothing of {visit.length} bytes is expected".encode())
            return
        try:
            await visit.read_each(lambda data: self._guests.take(intake, data), stall_s=STALL_S)
            await asyncio.to_thread(self._guests.check, intake)
        except MocError as error:
            self._guests.drop(intake)
            visit.answer(422, str(error).encode())
            return
        except BaseException:  # the sender is gone, or stalls
            self._guests.drop(intake)
            raise
        self._arrived[intake.record.rank] = intake
        visit.answer(200)

    def _seal(self, node: int, body: dict[str, Any]) -> Mapping[str, object]:
        rank, moment = wire.integer(body, "rank"), (wire.integer(body, "step"), wire.text(body, "attempt"))
        intake = self._arrived.pop(rank, None)
        if intake is None or (intake.record.step, intake.record.attempt) != moment:
            raise UsageError(f"nothing has arrived: rank={rank} step={moment[0]}")
        self._guests.publish(intake)
        return {"held": seal_mark(intake.record)}

    def _find(self, node: int, body: dict[str, Any]) -> Mapping[str, object]:
        with self._loans.open(_snapshot(body), wire.integer(body, "rank")) as (_, record):
            return {"seal": write_seal(record)}

    def _catalog(self, node: int, body: dict[str, Any]) -> Mapping[str, object]:
        rank = wire.integer(body, "rank")
        with self._loans.open(_snapshot(body), rank) as (arena, _):
            life = {name: arena.descriptor[name] for name in LIFE_FACTS}
            return {"catalog": arena.catalog(rank).to_json(), "life": life}

    def _describe(self, node: int, body: dict[str, Any]) -> Mapping[str, object]:
        return {"descriptor": self._guests.describe(wire.integer(body, "rank"))}

    async def _send(self, node: int, visit: Visit) -> None:
        query = query_of(visit.target)
        snapshot = (_number(query.get("incarnation")), _number(query.get("step")), query.get("attempt", ""))
        try:
            with self._loans.open(snapshot, _number(query.get("rank"))) as (arena, record):
                if "piece" in query:
                    ranges = [piece_range(arena, record, query["piece"])]
                else:
                    ranges = list(unit_ranges(arena, record, range(len(record.slots))))
                length = sum(length for _, length in ranges)
                await visit.answer_pieces(map(bytes, range_chunks(arena, ranges)), length=length, stall_s=STALL_S)
        except UsageError as error:
            visit.answer(404, str(error).encode())


def _snapshot(body: Mapping[str, Any]) -> tuple[int, int, str]:
    return (wire.integer(body, "incarnation"), wire.integer(body, "step"), wire.text(body, "attempt"))


def _moment(value: object) -> Moment | None:
    match value:
        case None:
            return None
        case [int(step), str(attempt)]:
            return (step, attempt)
        case _:
            raise UsageError(f"not a moment: given={value!r:.80}")


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else -1
