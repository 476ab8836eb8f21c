"""What a replaced node fetches before a recovery: what it asks of others, and what it does with a bad answer."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

from moc.agent.custody import Custody
from moc.agent.guests import Guests
from moc.agent.peers.lender import Lender
from moc.agent.restock import Errand, Restock
from moc.agent.trainers import Trainer, Trainers
from moc.host import SystemHost
from moc.plan.freeing import Moment
from moc.trace import Trace
from tests.peers.nodes import (
    DEADLINE_S,
    HOST,
    LIFE,
    Sender,
    Wire,
    descriptor,
    listening,
    whole_descriptor,
)

PASSWORD = "c4nary"
STORAGE = f"vault://me:{PASSWORD}@place/repo"


class _Tap(socketserver.BaseRequestHandler):
    """One connection to the server's target, of which all bytes are kept."""

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as target:  # type: ignore[attr-defined]
            answers = threading.Thread(target=self._pump, args=(target, self.request))
            answers.start()
            self._pump(self.request, target)
            answers.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one side has hung up
            while data := source.recv(1 << 16):
                self.server.heard.append(data)  # type: ignore[attr-defined]
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def tapped(url: str) -> Iterator[tuple[str, list[bytes]]]:
    """Put a listener before an agent; gives its URL and what it has heard."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Tap)
    parts = urlsplit(url)
    server.target, server.heard = (parts.hostname, parts.port), []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.heard  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def replicated(described: Mapping[str, object]) -> Iterator[tuple[str, Moment]]:
    """A host with this descriptor that holds a snapshot of node 1; gives its URL, and which one."""
    guests, sender, wire = Guests(), Sender(), Wire()
    with closing(guests), closing(sender), closing(wire.courier), listening(guests) as url:
        guests.begin_life(LIFE, described)
        moment = sender.seal(5, record=0)
        assert wire.send(sender.parcel(moment, url)).error is None
        yield url, moment


def fetch(url: str, moment: Moment) -> tuple[Custody | None, dict[str, object]]:
    """Have a node without any memory fetch its part; return what it has made, and its answer to the trainers."""
    host = Lender(run=LIFE.run, incarnation=LIFE.number, node=HOST, nodes=2, secret="a secret", url=url)
    errand = Errand(
        snapshot=(LIFE.number, *moment), rank=2, run=LIFE.run, storage=STORAGE, memory_budget_bytes=None,
        lenders={2: [host], 3: [host]},
    )  # fmt: skip
    woken = threading.Event()
    restock = Restock(host=SystemHost(), trace=Trace(), wake=woken.set)
    asking, answered = socket.socketpair()
    with asking, answered:
        restock.want(answered, errand)
        restock.start_next(None)
        assert woken.wait(DEADLINE_S)
        made, ((connection, reply),) = restock.collect()
        assert connection is answered
    return made, reply


def test_a_replaced_node_learns_the_password_of_the_storage_from_its_own_trainers_only() -> None:
    with replicated(whole_descriptor(HOST, storage=STORAGE)) as (url, moment), tapped(url) as (listened, heard):
        made, reply = fetch(listened, moment)

    assert made is not None, reply
    with closing(made):
        assert made.life.descriptor["storage"] == STORAGE
        for rank in (2, 3):
            (record,) = made.arena.seals(rank).values()
            made.arena.check(record)
    said = b"".join(heard)
    assert b"catalogs" in said, "the description was heard"
    assert PASSWORD.encode() not in said


def test_a_description_that_is_none_is_answered_with_the_problem() -> None:
    """An agent that ended by it would take all that it holds along, at every start again."""
    with replicated(descriptor(HOST)) as (url, moment):
        made, reply = fetch(url, moment)

    assert made is None
    assert "UsageError" in str(reply["problem"])


def test_a_trainer_of_the_job_that_attaches_is_no_reason_not_to_fetch() -> None:
    """It may be known from an attach of its own that failed."""
    with selectors.DefaultSelector() as selector, subprocess.Popen(["sleep", "1000"]) as process:
        try:
            trainers = Trainers(selector, on_death=lambda _: None, host=SystemHost())
            pidfd = os.pidfd_open(process.pid)
            trainer = Trainer(rank=2, pid=process.pid, pidfd=pidfd, incarnation=1, version="")
            trainers.enter(trainer, newest_incarnation=None)
            assert trainers.strangers() == [trainer], "of an earlier life, for all that is known"

            assert trainers.fence([process.pid]) == ([], [])

            assert trainers.strangers() == []
            assert trainers.living() == [trainer]
        finally:
            process.kill()
