"""What agents of several nodes say to each other: who is served, what is proved, what is bounded."""

from __future__ import annotations

import errno
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.agent.peers.client import PeerClient
from moc.agent.peers.fellows import REPORT, Fellows
from moc.agent.peers.proof import (
    PROOF,
    STREAM,
    Membership,
    answer_proof,
    body_digest,
    refuse_stranger,
    request_headers,
)
from moc.agent.peers.report import Verdict, report_from_json
from moc.agent.peers.transport import Routes, Transport
from moc.errors import CoordinationError, MocError, StoreUnavailableError, UsageError
from moc.host import SystemHost
from moc.network import http
from moc.network.http import CONTROL_LIMIT_BYTES, STRANGER_LIMIT
from moc.network.port import Visit, query_of
from moc.plan.offers import Offer, OfferedExpert
from moc.state import Expert

TIMEOUT_S = 20.0
WORDS = st.text(max_size=20)


def member(node: int, *, secret: str = "a secret", incarnation: int = 1, run: str = "run") -> Membership:
    return Membership(run=run, incarnation=incarnation, node=node, nodes=3, secret=secret)


@contextmanager
def transport(who: Membership | None, *, port: int = 0) -> Iterator[Transport]:
    routes = Routes()
    routes.message("/echo", lambda node, body: {"node": node, "body": body})
    routes.message("/fail", _fail)

    async def serve(node: int, visit: Visit) -> None:
        visit.answer(200, f"{node} {query_of(visit.target)['part']}".encode())

    routes.stream("GET", "/stream", serve)
    opened = Transport(routes, address="127.0.0.1", port=port, host=SystemHost())
    opened.enter(who)
    try:
        yield opened
    finally:
        opened.close()


def _fail(node: int, _: dict[str, Any]) -> dict[str, object]:
    raise UsageError(f"not that: node={node}")


def ask(of: Transport, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return of.submit(of.ask(url, path, body, timeout_s=TIMEOUT_S)).result(TIMEOUT_S)


@given(WORDS, WORDS, WORDS)
def test_a_proof_holds_for_nothing_but_what_was_proved(path: str, other_path: str, body: str) -> None:
    headers = request_headers(member(1), "POST", path, body_digest(body.encode()))
    assert refuse_stranger(member(0), "POST", path, headers) == 1
    if path != other_path:
        with pytest.raises(UsageError):
            refuse_stranger(member(0), "POST", other_path, headers)
    for changed in ("Moc-Body", "Moc-Proof"):
        with pytest.raises(UsageError):
            refuse_stranger(member(0), "POST", path, {**headers, changed: headers[changed] + "0"})
    with pytest.raises(UsageError):
        refuse_stranger(member(0), "GET", path, headers)


@pytest.mark.parametrize(
    "stranger",
    [
        member(1, secret="another secret"),
        member(1, incarnation=2),
        member(1, run="another"),
        member(0),
    ],
    ids=["secret", "life", "run", "itself"],
)
def test_strangers_are_refused(stranger: Membership) -> None:
    headers = request_headers(stranger, "POST", "/x", body_digest(b""))
    with pytest.raises(UsageError):
        refuse_stranger(member(0), "POST", "/x", headers)
    with pytest.raises(UsageError):
        refuse_stranger(None, "POST", "/x", headers)


def test_an_answer_is_proved_for_its_own_request_only() -> None:
    first = request_headers(member(1), "POST", "/x", body_digest(b"1"))[PROOF]
    other = request_headers(member(1), "POST", "/x", body_digest(b"2"))[PROOF]
    assert answer_proof(member(0), first, 200, b"yes") == answer_proof(member(1), first, 200, b"yes")
    assert answer_proof(member(0), first, 200, b"yes") != answer_proof(member(0), other, 200, b"yes")


def test_the_secret_is_not_shown() -> None:
    assert "a secret" not in repr(member(0))
    headers = request_headers(member(1), "POST", "/x", body_digest(b""))
    assert "a secret" not in str(headers)


def test_agents_of_one_life_talk_and_others_are_refused() -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(transport(member(node))) for node in (0, 1))
        assert ask(second, first.url, "/echo", {"x": 1}) == {"node": 1, "body": {"x": 1}}
        with pytest.raises(CoordinationError, match="not that: node=0"):
            ask(first, second.url, "/fail", {})
        for stranger in (member(1, secret="another"), member(1, incarnation=2)):
            with pytest.raises(CoordinationError, match="status=403"):
                ask(stack.enter_context(transport(stranger)), first.url, "/echo", {})
        first.enter(None)
        with pytest.raises(CoordinationError, match="status=403"):
            ask(second, first.url, "/echo", {})


def test_a_message_that_is_too_long_is_refused() -> None:
    with transport(member(0)) as first, transport(member(1)) as second, pytest.raises(MocError):
        ask(second, first.url, "/echo", {"x": "y" * CONTROL_LIMIT_BYTES})


@contextmanager
def call(of: Transport) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", of.port), timeout=TIMEOUT_S) as connection:
        yield connection


def say(connection: socket.socket, method: str, path: str, headers: dict[str, str]) -> bytes:
    """Send a request without its body and return the first line of the answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
    connection.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
    return connection.recv(4096).split(b"\r\n")[0]


async def _nothing() -> None:
    """Whoever has run this on a loop knows that what came before has been looked at."""


@pytest.mark.parametrize("is_over", [False, True])
def test_a_message_is_heard_in_no_other_life_than_its_own(is_over: bool) -> None:
    body = b'{"x": 1}'
    headers = request_headers(member(1), "POST", "/echo", body_digest(body))
    headers |= {"Content-Length": str(len(body)), "Expect": "100-continue"}
    with transport(member(0)) as first, call(first) as connection:
        assert say(connection, "POST", "/echo", headers) == b"HTTP/1.1 100 Continue"
        first.submit(_nothing()).result(TIMEOUT_S)
        if is_over:
            first.enter(member(0, incarnation=2))
        connection.sendall(body)
        assert connection.recv(4096).split(b" ")[1] == (b"403" if is_over else b"200")


def test_strangers_can_neither_open_any_number_of_connections_nor_keep_members_out() -> None:
    with transport(member(0)) as first, transport(member(1)) as second, ExitStack() as stack:
        headers = request_headers(member(1), "GET", "/stream?part=7", STREAM)
        members_own = stack.enter_context(call(first))
        assert say(members_own, "GET", "/stream?part=7", headers) == b"HTTP/1.1 200 OK"
        for _ in range(8):
            stranger = stack.enter_context(call(first))
            assert say(stranger, "GET", "/stream?part=7", {}) == b"HTTP/1.1 403 Forbidden"
            assert stranger.recv(4096) == b"", "closed"
        silent = [stack.enter_context(call(first)) for _ in range(STRANGER_LIMIT + 8)]
        assert ask(second, first.url, "/echo", {})["node"] == 1
        assert say(members_own, "GET", "/stream?part=7", headers) == b"HTTP/1.1 200 OK"
        assert all(stranger.recv(4096) == b"" for stranger in silent[:8]), "closed"


def test_members_that_come_all_at_once_are_all_answered() -> None:
    """Each request of a recovery opens a connection, and a job has hundreds of ranks."""
    headers = request_headers(member(1), "GET", "/stream?part=7", STREAM)
    with transport(member(0)) as first, ExitStack() as stack:
        members = [stack.enter_context(call(first)) for _ in range(2 * STRANGER_LIMIT)]
        for each in members:
            assert say(each, "GET", "/stream?part=7", headers) == b"HTTP/1.1 200 OK"


def test_a_reader_that_goes_away_costs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()

    async def serve(_: int, visit: Visit) -> None:
        try:
            await visit.answer_pieces((b"x" * (1 << 20) for _ in range(64)), length=64 << 20, stall_s=TIMEOUT_S)
        finally:
            ended.set()

    routes = Routes()
    routes.stream("GET", "/long", serve)
    with (
        closing(Transport(routes, address="127.0.0.1", port=0, host=SystemHost())) as opened,
        caplog.at_level("INFO"),
    ):
        opened.enter(member(0))
        with call(opened) as connection:
            assert say(connection, "GET", "/long", request_headers(member(1), "GET", "/long", STREAM)).endswith(b"OK")
        assert ended.wait(TIMEOUT_S)
    (record,) = (each for each in caplog.records if each.levelno > logging.DEBUG)
    assert record.getMessage().startswith("who asked is gone")
    assert record.exc_info is None


def test_a_successor_is_found_at_the_same_place_and_takes_another_where_that_is_taken() -> None:
    with transport(member(1)) as second:
        with transport(member(0)) as first:
            url, port = first.url, first.port
            with transport(member(0), port=port) as other:
                assert other.port != port
                assert ask(second, other.url, "/echo", {})["node"] == 1
            assert ask(second, url, "/echo", {})["node"] == 1
        with pytest.raises(StoreUnavailableError):
            ask(second, url, "/echo", {})
        with transport(member(0), port=port) as first:
            assert first.url == url
            assert ask(second, url, "/echo", {})["node"] == 1


def test_a_life_ends_at_once_although_there_is_news_at_the_same_moment() -> None:
    heard = threading.Event()
    agents = [Fellows(host=SystemHost(), wake=heard.set) for _ in range(2)]
    try:
        for turn in range(1, 40):
            urls = []
            for node, agent in enumerate(agents):
                membership = Membership(run="run", incarnation=turn, node=node, nodes=2, secret="a secret")
                urls.append(agent.begin(membership, [(0,), (1,)], address="127.0.0.1", port=0))
            heard.clear()
            for agent in agents:
                agent.meet(urls)
                _publish(agent, committed=0)
            assert heard.wait(TIMEOUT_S), "agents hear of each other"
            for step in (1, 2, 3):
                _publish(agents[0], committed=step)
            ending = threading.Thread(target=agents[0].end, args=("over",), daemon=True)
            ending.start()
            ending.join(TIMEOUT_S)
            assert not ending.is_alive(), f"the life of turn {turn} does not end"
    finally:
        for agent in agents:
            threading.Thread(target=agent.close, daemon=True).start()  # one that hangs must not hang the test


@contextmanager
def _listener(letters: queue.Queue[dict[str, Any]], answers: queue.Queue[dict[str, Any]]) -> Iterator[Transport]:
    """Node 1 of two, whose words are the test's."""

    def hear(_: int, letter: dict[str, Any]) -> dict[str, Any]:
        letters.put(letter)
        return answers.get(timeout=TIMEOUT_S)

    routes = Routes()
    routes.message(REPORT, hear)
    opened = Transport(routes, address="127.0.0.1", port=0, host=SystemHost())
    opened.enter(Membership(run="run", incarnation=1, node=1, nodes=2, secret="a secret"))
    try:
        yield opened
    finally:
        answers.put({})  # whoever is still asked
        opened.close()


def test_a_report_is_told_to_who_does_not_know_it_and_read_by_who_does_not() -> None:
    letters: queue.Queue[dict[str, Any]] = queue.Queue()
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    with _listener(letters, answers) as other, closing(Fellows(host=SystemHost(), wake=threading.Event().set)) as agent:
        membership = Membership(run="run", incarnation=1, node=0, nodes=2, secret="a secret")
        url = agent.begin(membership, [(0,), (1,)], address="127.0.0.1", port=0)
        _publish(agent, committed=1)
        agent.meet([url, other.url])
        first = letters.get(timeout=TIMEOUT_S)
        assert (first["heard"], first["report"]["node"]) == (None, 0)
        order = first["report"]["order"]
        answers.put({"heard": order})

        assert letters.get(timeout=TIMEOUT_S) == {"heard": None}, "it has it"
        answers.put({"heard": None})  # a successor that has not
        assert letters.get(timeout=TIMEOUT_S)["report"]["order"] == order
        own = {**first["report"], "node": 1, "order": [7, 1]}
        answers.put({"heard": order, "report": own})

        assert ask(other, url, REPORT, {"heard": order}) == {"heard": [7, 1]}
        assert ask(other, url, REPORT, {"heard": [0, 0]}) == {"heard": [7, 1], "report": first["report"]}
        _check_offers(other, agent, own, order)
        old = {"heard": order, "report": {"order": [7, 4], "held": "nothing that could be read"}}
        assert ask(other, url, REPORT, old) == {"heard": [7, 4]}
        for wrong in ({"order": [7, 5], "held": "as before"}, {"order": "8"}, {}, [7, 5]):
            with pytest.raises(CoordinationError, match="report"):
                ask(other, url, REPORT, {"heard": order, "report": wrong})
        with pytest.raises(CoordinationError, match="order of a report"):
            ask(other, url, REPORT, {"heard": "all"})


def _check_offers(other: Transport, agent: Fellows, report: dict[str, Any], order: list[int]) -> None:
    """Tell three reports, the last one with another offer."""
    assert agent.council is not None
    found = []
    for number, step in ((2, 5), (3, 5), (4, 6)):
        rows = tuple(OfferedExpert(expert=Expert(layer=0, index=index), step=step) for index in range(3))
        told = Offer(moment=(6, "00abcdef"), experts=rows, is_whole=False, is_inherited=False)
        body = {**replace(report_from_json(report, node=1, ranks=(1,)), offer=told).to_json(), "order": [7, number]}
        assert ask(other, agent.url, REPORT, {"heard": order, "report": body}) == {"heard": [7, number]}
        found.append(agent.council._reports[1].offer)
        assert found[-1] == told
    assert found[0] is found[1], "not decoded again"


def _publish(agent: Fellows, *, committed: int) -> None:
    assert agent.council is not None
    verdicts = [Verdict(moment=(committed, "00000000"), size_bytes=1, error=None)]
    agent.publish(agent.council.report(agent.url, {}, {}, ended=(), wishes=(), verdicts=verdicts))


def test_streams_are_served_to_members_only() -> None:
    def get(who: Membership, url: str) -> bytes:
        received: list[bytes] = []
        client = PeerClient(who, url, stall_s=TIMEOUT_S, host=SystemHost())
        deadline_s = SystemHost().now_s() + TIMEOUT_S
        client.get("/stream?part=7", received.append, size_bytes=3, deadline_s=deadline_s)
        return b"".join(received)

    with transport(member(0)) as first:
        assert get(member(1), first.url) == b"1 7"
        with pytest.raises(CoordinationError, match="status=403"):
            get(member(1, secret="another"), first.url)


def test_an_address_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        Transport(Routes(), address="192.0.2.1", port=0, host=SystemHost())


@pytest.mark.parametrize("is_known", [True, False])
def test_a_name_that_is_looked_up_for_too_long_is_refused_and_nothing_listens_later(
    monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    answered, look_up = threading.Event(), socket.getaddrinfo
    threads: list[threading.Thread] = []

    def wait_for_servers(*question: Any, **options: Any) -> Any:
        assert answered.wait(TIMEOUT_S)
        if not is_known:
            raise socket.gaierror(socket.EAI_AGAIN, "no server answers")
        return look_up(*question, **options)

    def spawn(act: Callable[[], None], name: str) -> threading.Thread:
        threads.append(threading.Thread(target=act, name=name, daemon=True))
        threads[-1].start()
        return threads[-1]

    async def serve(visit: Visit) -> None:
        visit.answer(200)

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setattr(http, "START_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", wait_for_servers)
    outcome: Future[http.HttpNetwork] = Future()

    def open_network() -> None:
        try:
            outcome.set_result(http.HttpNetwork(serve, address="127.0.0.1", port=port, spawn=spawn))
        except OSError as error:
            outcome.set_exception(error)

    threading.Thread(target=open_network, daemon=True).start()  # one that hangs must not hang the test
    try:
        with pytest.raises(OSError, match="not looked up in time"):
            outcome.result(TIMEOUT_S / 4)
    finally:
        answered.set()
    threads[0].join(TIMEOUT_S)
    assert not threads[0].is_alive()
    with socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
