"""Saves that the agents of two nodes make together: over real arenas and a real folder, with reports handed over by
the test.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from moc.agent.custody import Custody
from moc.agent.peers.council import Council
from moc.agent.peers.report import report_from_json
from moc.agent.saves import Saves
from moc.config import Config
from moc.format.manifest import Manifest, Parent
from moc.host import SystemHost
from moc.repository import Repository
from moc.snapshot.seal import EXPLICIT, PERSIST
from moc.store.open import open_store
from moc.trace import RingSink, Trace
from tests.core.test_custody import CATALOGS, FIRST, _descriptor
from tests.core.test_saves import VERSIONS, Desk, SlowHost

PATIENCE_S = 20.0
TIMEOUT_S = 600.0  # of a save: far more than any test waits
WORLD = {"world_size": 2, "node_of_rank": [0, 1], "ep_sizes": []}


class Node(Desk):
    """One of two agents, with what it has to do with the other one."""

    @property
    def council(self) -> Council:
        assert self.saves.council is not None
        return self.saves.council

    def tell(self, other: Node) -> None:
        told = self.council.report(
            "http://x",
            self.custody.held,
            self.custody.passed,
            ended=(),
            wishes=self.saves.wishes,
            verdicts=self.saves.verdicts(FIRST.number),
        )
        if told is not None:
            ranks = self.custody.life.ranks
            other.council.hear(report_from_json(json.loads(json.dumps(told.to_json())), node=told.node, ranks=ranks))


Pair = tuple[Node, Node]


@pytest.fixture
def storage(tmp_path: Path) -> str:
    repository = Repository(open_store(str(tmp_path / "storage")))
    repository.create()
    repository.put_incarnation(FIRST)
    repository.close()
    return str(tmp_path / "storage")


@pytest.fixture
def pair(storage: str) -> Iterator[Pair]:
    """Two agents of a job of two nodes with a rank each."""
    with ExitStack() as stack:
        yield stack.enter_context(_node(0, storage)), stack.enter_context(_node(1, storage))


@contextmanager
def _node(number: int | None, storage: str, trace: Trace | None = None) -> Iterator[Node]:
    """An agent of one node of two; None: of one node that has both ranks."""
    described = {**_descriptor(FIRST), "storage": storage, "versions": VERSIONS, "topology": WORLD}
    described |= {"config": asdict(Config()), "timeout_s": TIMEOUT_S}
    if number is not None:
        described["catalogs"] = [CATALOGS[number].to_json()]
        described["fellows"] = {"node": number, "secret": "a secret", "address": "127.0.0.1", "urls": []}
    custody, host = Custody.create(described, earlier=None), SlowHost()
    host.answers.set()
    receive, send = os.pipe()
    saves = Saves(host=host, trace=trace or Trace(), reply=lambda _connection, _message: None, wake_fd=send)
    if number is not None:
        saves.enter(
            Council(
                node=number,
                ranks_of=[(0,), (1,)],
                incarnation=FIRST.number,
                host=SystemHost(),
                wake=lambda: _ring(send),
            )
        )
    try:
        yield Node(saves=saves, custody=custody, host=host, woken=receive)
    finally:
        if saves.council is not None:
            saves.council.close("over")
        saves.close()
        custody.close()
        os.close(receive)
        os.close(send)


def _ring(bell: int) -> None:
    os.write(bell, b"x")


def _talk_until(pair: Pair, is_true: Callable[[], bool], *, may_start: bool) -> None:
    """Let both look and tell each other what is new until something holds."""
    while True:
        for node, other in (pair, pair[::-1]):
            node.look(may_start=may_start)
            node.tell(other)
        if is_true():
            return
        woken, _, _ = select.select([node.woken for node in pair], [], [], PATIENCE_S)
        assert woken, [node.saves.outcomes() for node in pair]
        for bell in woken:
            os.read(bell, 4096)


def _manifests(storage: str) -> list[Manifest]:
    repository = Repository(open_store(storage))
    return [repository.read_manifest(stored.name) for stored in repository.checkpoints()]


def test_nodes_that_leave_while_one_of_them_has_begun_a_save_store_the_newest_moment_at_once(
    pair: Pair, storage: str
) -> None:
    first, second = pair
    for node in pair:
        node.seal(7, record=0, flags=PERSIST)
        node.seal(8, record=1, flags=0)
    first.look(may_start=False)  # it has been asked to leave, and has not heard of the other node yet
    first.tell(second)
    second.look()
    assert second.custody.is_saving((7, "00000007")), "complete as far as this one knows"
    second.tell(first)

    first.look(may_start=False)
    for node in pair:
        node.saves.persist_newest(node.custody)
    _talk_until(pair, lambda: all(node.saves.last_committed_step == 8 for node in pair), may_start=False)

    assert [manifest.name.step for manifest in _manifests(storage)] == [8]
    assert all(node.saves.last_error is None for node in pair)


def test_a_commit_is_told_before_its_node_does_a_round_of_retention(storage: str) -> None:
    """Else the next node, which waits a while only, would commit too."""
    is_heard = threading.Event()
    spans = RingSink(1000, now_s=SystemHost().now_s)

    def hold_up(event: str, name: str, _: dict[str, object]) -> None:
        if (event, name) == ("begin", "retention.list"):
            is_heard.wait(PATIENCE_S)

    with _node(0, storage, Trace(hold_up)) as first, _node(1, storage, Trace(spans)) as second:
        for node in (first, second):
            node.seal(7, record=0, flags=PERSIST)
        _talk_until((first, second), lambda: second.saves.last_committed_step == 7, may_start=True)
        assert first.custody.is_saving((7, "00000007")), "its own job is not done"
        is_heard.set()

    assert "save.gather" in {row["span"] for row in spans.rows()}
    assert "commit.put" not in {row["span"] for row in spans.rows()}


def test_a_save_follows_a_commit_that_was_heard_of_only(pair: Pair, storage: str) -> None:
    first, second = pair
    first.saves.recall(first.custody)  # its predecessor has died: it looks up what is committed, nothing yet
    first.look_until(lambda: not first.saves.is_busy)
    with _node(None, storage) as other:
        other.seal(7, record=0, flags=PERSIST)
        other.look_until(lambda: other.saves.last_committed_step == 7)
    second.saves.recall(second.custody)
    _talk_until(pair, lambda: all(node.saves.last_committed_step == 7 for node in pair), may_start=True)

    for node in pair:
        node.seal(8, record=0, flags=PERSIST | EXPLICIT)
    _talk_until(pair, lambda: all((8, "00000008") in _moments(node) for node in pair), may_start=True)

    assert [node.saves.last_error for node in pair] == [None, None]
    assert [manifest.parent for manifest in _manifests(storage)] == [
        Parent(incarnation=FIRST.number, step=7, attempt="00000007")
    ]


def _moments(node: Node) -> set[tuple[int, str]]:
    return {verdict.moment for verdict in node.saves.verdicts(FIRST.number)}
