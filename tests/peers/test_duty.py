"""A node's duty to a moment: done with or without its hosts, kept until it is global, told to the trainers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moc.agent.custody import Custody
from moc.agent.guests import Guests
from moc.agent.peers.report import Others
from moc.agent.replicas import Replicas
from moc.host import SystemHost
from moc.plan.freeing import Moment, Seal
from moc.snapshot.seal import REPLICATE
from moc.trace import Trace
from tests.peers.nodes import DEADLINE_S, HOST, LIFE, SENDER, Sender, descriptor, listening, member, whole_descriptor

NOWHERE = "http://127.0.0.1:9"  # the port of a service that no machine offers any more


class Node:
    """Node 1 with its custody and its replicas; node 0 has sealed whatever it is said to have."""

    def __init__(self) -> None:
        self.custody = Custody.create(whole_descriptor(SENDER), earlier=None)
        self.sender = Sender(self.custody.arena)
        self._woken = threading.Semaphore(0)
        self.replicas = Replicas(Guests(), host=SystemHost(), trace=Trace(), wake=self._woken.release)
        self.replicas.begin_life(self.custody, member(SENDER))
        self.held: list[Moment] = []

    def seal(self, step: int, *, record: int, flags: int = 0) -> Moment:
        moment = self.sender.seal(step, record=record, flags=flags)
        self.held.append(moment)
        return moment

    def look(self, url: str, *, done: tuple[Moment, ...] = (), is_silent: bool = False) -> None:
        """Do one turn of the agent's loop; `done` is what node 0 has replicated, by its last report."""
        seals = [
            Seal(incarnation=LIFE.number, step=step, attempt=attempt, rank=rank, record=0)
            for step, attempt in self.held
            for rank in (0, 1)
        ]
        silent = (HOST,) if is_silent else ()
        self.custody.scan(others=Others(seals=tuple(seals), done={HOST: done}, silent=silent))
        self.replicas.look(self.custody, [url, ""])

    def wait_delivered(self) -> None:
        assert self._woken.acquire(timeout=DEADLINE_S)

    def steps(self) -> list[int]:
        return sorted({record.step for rank in (2, 3) for record in self.custody.arena.seals(rank).values()})

    def close(self) -> None:
        self.replicas.close()
        self.custody.close()


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


@contextmanager
def host() -> Iterator[str]:
    guests = Guests()
    guests.begin_life(LIFE, descriptor(HOST))
    with listening(guests) as url:
        yield url
    guests.close()


def test_a_moment_is_global_once_the_hosts_of_all_nodes_hold_it(node: Node) -> None:
    moment = node.seal(5, record=0, flags=REPLICATE)
    with host() as url:
        node.look(url, done=(moment,))
        assert node.custody.global_step is None, "sealed everywhere, and no replica of node 1 yet"
        assert node.custody.arena.settled_step() is None
        node.wait_delivered()
        node.look(url)
        assert node.custody.done == (moment,)
        assert node.custody.global_step is None, "node 0 has not said that its own are held"
        node.look(url, done=(moment,))
        assert node.custody.global_step == 5
        assert node.custody.arena.settled_step() == 5, "the next snapshot may be flagged"
        assert node.replicas.status()["replicated_step"] == 5
        assert node.replicas.away == []


def test_a_dead_host_is_told_and_holds_nothing_up(node: Node) -> None:
    moment = node.seal(5, record=0, flags=REPLICATE)
    node.look(NOWHERE, done=(moment,))
    node.wait_delivered()
    node.look(NOWHERE, done=(moment,))
    node.look(NOWHERE, done=(moment,))

    assert node.custody.global_step == 5
    assert node.custody.arena.settled_step() == 5
    status = node.replicas.status()
    assert status["away"] == [HOST]
    assert status["replicated_step"] is None, "nothing has a replica, whatever is global"
    assert "does not answer" in str(status["last_error"])

    later = node.seal(8, record=1, flags=REPLICATE)
    with host() as url:
        node.look(url, done=(later,))
        node.wait_delivered()
        node.look(url, done=(later,))
        node.look(url, done=(later,))
        assert node.replicas.away == []
        assert node.replicas.status()["replicated_step"] == 8
        assert node.replicas.status()["last_error"] is None


def test_a_lost_node_does_not_make_global_what_it_has_not_replicated(node: Node) -> None:
    """What it has sealed and not sent is gone: the older moment is the only one that every rank's part is left of."""
    five = node.seal(5, record=0, flags=REPLICATE)
    with host() as url:
        node.look(url, done=(five,))
        node.wait_delivered()
        node.look(url, done=(five,))
        node.look(url, done=(five,))
    assert node.custody.global_step == 5

    eight = node.seal(8, record=1, flags=REPLICATE)
    node.look(NOWHERE, done=(five,))
    node.wait_delivered()
    for _ in range(3):
        node.look(NOWHERE, done=(five,), is_silent=True)
    assert node.custody.done[-1] == eight, "the lost node is counted as away by this one"
    assert node.custody.global_step == 5
    assert node.steps() == [5, 8]
    assert node.custody.arena.settled_step() == 7, "nothing newer is flagged while nobody knows what is left"


def test_what_is_under_way_and_what_is_global_stay_and_nothing_else_does(node: Node) -> None:
    five = node.seal(5, record=0, flags=REPLICATE)
    six = node.seal(6, record=1)
    seven = node.seal(7, record=2)
    with host() as url:
        node.look(url)
        assert node.steps() == [5, 7], "the moment on its way, and the newest"
        node.wait_delivered()
        node.held.remove(six)
        node.look(url, done=(five,))
        node.look(url, done=(five,))
        assert node.custody.global_step == 5
        assert node.steps() == [5, 7], "the newest global one, and the newest"

        nine = node.seal(9, record=1, flags=REPLICATE)
        node.look(url, done=(five,))
        assert node.steps() == [5, 9]
        node.held.remove(seven)
        node.wait_delivered()
        node.look(url, done=(five, nine))
        node.look(url, done=(five, nine))
        assert node.custody.global_step == 9
        assert node.steps() == [9]


def test_only_the_newest_flagged_moment_is_sent(node: Node) -> None:
    """An older one that was not begun would come too late to be of use."""
    node.seal(5, record=0, flags=REPLICATE)
    newest = node.seal(6, record=1, flags=REPLICATE)
    with host() as url:
        node.look(url, done=(newest,))
        node.wait_delivered()
        node.look(url, done=(newest,))
        node.look(url, done=(newest,))

    assert node.custody.global_step == 6
    assert node.custody.done == (newest,)
    assert node.custody.arena.settled_step() == 6
    assert node.steps() == [6]


def test_a_life_that_ends_takes_no_notice_of_what_is_delivered_late(node: Node) -> None:
    moment = node.seal(5, record=0, flags=REPLICATE)
    with host() as url:
        node.look(url, done=(moment,))
        node.replicas.end_life()
        node.replicas.begin_life(node.custody, member(SENDER))
        assert node.custody.arena.settled_step() is None
        node.look(url, done=(moment,))
        while node.custody.global_step is None:
            node.wait_delivered()
            node.look(url, done=(moment,))
            node.look(url, done=(moment,))
        assert node.custody.global_step == 5
