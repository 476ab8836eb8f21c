"""An agent among those of the other nodes: it tells each of them what it knows, and hears what they know.

One exchange per node is under way at a time: report there, report back, at every change and at least every second.
The newest report is sent, so a slow node costs nobody anything but its own news. A report may be long and is told at
least every second: it is encoded once, who has it already is sent none, and what is not newer is not decoded. Nothing
here decides: `Council` does.
Thread: the agent's main thread; the exchanges run on the transport's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moc.agent.peers.council import Council
from moc.agent.peers.proof import Membership
from moc.agent.peers.report import Order, Report, offer_from_text, order_from_json, report_from_json
from moc.agent.peers.transport import Routes, Transport
from moc.errors import CoordinationError, MocError, UsageError
from moc.host import Host
from moc.plan.offers import Offer

__all__ = ["Fellows"]

log = logging.getLogger(__name__)

REPORT = "/moc/report"
EXCHANGE_TIMEOUT_S = 5.0
HEARTBEAT_S = 1.0
SPACING_S = 0.01  # between two exchanges with one node: what changes meanwhile goes in one report
RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class _Told(NamedTuple):
    """The newest report: which one it is, and its bytes."""

    order: Order
    text: bytes


class Fellows:
    """Owns the transport and the exchanges of the present life."""

    def __init__(self, *, host: Host, wake: Callable[[], None]) -> None:
        self._host, self._wake = host, wake
        self._transport: Transport | None = None
        self._place: tuple[str, int] | None = None
        self._exchanges: list[asyncio.Task[None]] = []
        self._dirty: dict[int, asyncio.Event] = {}
        self._urls: dict[int, str] = {}
        self._told: _Told | None = None
        self._acknowledged: dict[int, Order | None] = {}
        self._offers: dict[int, tuple[str, Offer]] = {}
        self.council: Council | None = None
        self.routes = Routes()
        """Add what else is to be answered before `begin`."""
        self.routes.message(REPORT, self._answer)

    @property
    def url(self) -> str:
        assert self._transport is not None, "a life of several nodes has begun"
        return self._transport.url

    def urls(self) -> list[str]:
        """Return where each node's agent was last seen, this one's included; empty before `meet`."""
        council = self.council
        if council is None or not self._urls:
            return []
        found = {**self._urls, council.node: self.url}
        return [found[node] for node in sorted(found)]

    def begin(self, member: Membership, ranks_of: Sequence[tuple[int, ...]], *, address: str, port: int) -> str:
        """Begin a life, ending the one before, and return this agent's URL.

        `port` is where this node's agent was reached before, 0 if that is all the same. Blocks: until it listens.
        Raises: UsageError if it cannot.
        """
        self.end("a new life has begun")
        council = Council(
            node=member.node, ranks_of=ranks_of, incarnation=member.incarnation, host=self._host, wake=self._wake
        )
        url = self.listen(member, address=address, port=port)
        self.council = council
        return url

    def listen(self, member: Membership, *, address: str, port: int) -> str:
        """Answer this life's members, reports excepted, and return this agent's URL. As `begin` says."""
        if self._transport is None or self._place != (address, port):
            self.close()
            self._transport = Transport(self.routes, address=address, port=port, host=self._host)
            self._place = (address, port)
        self._transport.enter(member)
        log.info("listening for the agents of other nodes: node=%d url=%s", member.node, self._transport.url)
        return self._transport.url

    def meet(self, urls: Sequence[str]) -> None:
        """Begin to exchange reports with the agents at these URLs, one per node."""
        council = self.council
        if council is None or self._transport is None or len(urls) != len(council.ranks_of):
            raise UsageError(f"not the agents of this life: given={len(urls)}")
        self._urls = {node: url for node, url in enumerate(urls) if node != council.node}
        self._transport.submit(self._start(council)).result()

    def publish(self, report: Report | None) -> None:
        """Have the others told; None: nothing has changed."""
        if report is None or self._transport is None:
            return
        self._told = _Told(report.order, json.dumps(report.to_json(), separators=(",", ":")).encode())
        self._transport.submit(self._mark())

    def flush(self, timeout_s: float) -> None:
        """Tell everybody once more what is known, as far as they answer. Blocks: at most the timeout."""
        if self._transport is not None and self._told is not None and self._urls:
            self._transport.submit(self._tell_all(timeout_s)).result()

    def end(self, reason: str) -> None:
        """End the life among the others: nobody is told or answered anything any more."""
        if self.council is not None:
            self.council.close(reason)
            self.council = None
        if self._transport is not None:
            self._transport.enter(None)
            self._transport.submit(self._stop()).result()
        self._urls, self._told, self._acknowledged, self._offers = {}, None, {}, {}

    def close(self) -> None:
        """End the life and stop listening."""
        self.end("the agent leaves")
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    # On the transport's loop

    async def _start(self, council: Council) -> None:
        self._dirty = {node: asyncio.Event() for node in self._urls}
        self._exchanges = [asyncio.ensure_future(self._exchange(council, node)) for node in sorted(self._urls)]

    async def _stop(self) -> None:
        exchanges, self._exchanges = self._exchanges, []
        for task in exchanges:
            task.cancel()
        await asyncio.gather(*exchanges, return_exceptions=True)

    async def _mark(self) -> None:
        for event in self._dirty.values():
            event.set()

    async def _exchange(self, council: Council, node: int) -> None:
        """Tell one node and hear it, for as long as the life lasts."""
        failures = 0
        while self.council is council:  # a cancellation may be lost: `wait_for` drops one that comes with its event
            self._dirty[node].clear()
            told = self._told
            if told is not None:
                try:
                    await self._tell(council, node, told, EXCHANGE_TIMEOUT_S)
                    if failures:
                        log.info("agent of another node answers again: node=%d url=%s", node, self._urls[node])
                    failures = 0
                except MocError as error:
                    if not failures:
                        log.warning("agent of another node cannot be told: node=%d reason=%s", node, error)
                    failures += 1
                except Exception:  # a task's top: told, and tried again like any other failure
                    log.exception("exchange failed: node=%d", node)
                    failures += 1
            await self._pause(node, failures)

    async def _pause(self, node: int, failures: int) -> None:
        if failures:
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S)) - 1])
            return
        try:
            await asyncio.wait_for(self._dirty[node].wait(), HEARTBEAT_S)
        except asyncio.TimeoutError:
            return
        await asyncio.sleep(SPACING_S)

    async def _tell(self, council: Council, node: int, told: _Told, timeout_s: float) -> None:
        assert self._transport is not None, "exchanges end before the transport"
        texts = [told.text] if self._acknowledged.get(node) != told.order else [None, told.text]
        for text in texts:
            letter = _letter(council, node, text)
            answer = await self._transport.ask(self._urls[node], REPORT, letter, timeout_s=timeout_s)
            self._hear(council, node, answer)
            if self._acknowledged.get(node) == told.order:
                return  # else it had known the report, and has a successor that does not

    async def _tell_all(self, timeout_s: float) -> None:
        council, told = self.council, self._told
        if council is None or told is None:
            return
        results = await asyncio.gather(
            *(self._tell(council, node, told, timeout_s) for node in sorted(self._urls)), return_exceptions=True
        )
        for node, result in zip(sorted(self._urls), results, strict=True):
            if isinstance(result, BaseException):
                log.info("agent of another node was not told the last news: node=%d reason=%s", node, result)

    def _answer(self, node: int, body: dict[str, Any]) -> bytes:
        """Hear another node and answer with the own report, unless there is none yet or it has that."""
        council = self.council
        if council is None:
            raise CoordinationError("this agent is between two lives")
        self._hear(council, node, body)
        told = self._told
        is_known = told is None or self._acknowledged.get(node) == told.order
        return _letter(council, node, None if told is None or is_known else told.text)

    def _hear(self, council: Council, node: int, body: Mapping[str, Any]) -> None:
        """Take which report another node knows, and its own one. Raises: UsageError for what no agent says."""
        heard, told = body.get("heard"), body.get("report")
        self._acknowledged[node] = None if heard is None else order_from_json(heard)
        if told is None:
            council.note_alive(node)
            return
        if not isinstance(told, dict):
            raise UsageError(f"report is not readable: node={node} type={type(told).__name__}")
        known = council.known(node)
        if known is not None and known >= order_from_json(told.get("order")):
            council.note_alive(node)
            return
        report = report_from_json(
            told, node=node, ranks=council.ranks_of[node], read_offer=lambda text: self._read_offer(node, text)
        )
        if council.hear(report) and self._urls.get(node, report.url) != report.url:
            log.info("agent of another node has moved: node=%d url=%s", node, report.url)
            self._urls[node] = report.url

    def _read_offer(self, node: int, text: str) -> Offer:
        """Return another node's offer, decoded once: it stays as it is in many reports."""
        known = self._offers.get(node)
        if known is None or known[0] != text:
            known = self._offers[node] = (text, offer_from_text(text))
        return known[1]


def _letter(council: Council, node: int, report: bytes | None) -> bytes:
    """Return what is said to a node: which of its reports is known here, and the own one where it is to be told."""
    heard = json.dumps(council.known(node)).encode()
    return b'{"heard":%b}' % heard if report is None else b'{"heard":%b,"report":%b}' % (heard, report)
