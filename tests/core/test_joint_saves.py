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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from moc.agent.custody import Custody
from moc.agent.peers.council import Council
from moc.agent.peers.report import Report, report_from_json
from moc.agent.saves import Saves
from moc.config import Config
from moc.format.keys import manifest_key
from moc.format.manifest import Manifest, Parent, encode_incarnation
from moc.format.tagged import decode_state
from moc.host import SystemHost
from moc.plan.freeing import second_attempt
from moc.plan.offers import Offer, OfferedExpert
from moc.recover import StorageSource
from moc.repository import Repository
from moc.snapshot.seal import EXPLICIT, PERSIST
from moc.state import Expert
from moc.store.open import open_store
from moc.trace import RingSink, Trace
from tests.core.test_custody import CATALOGS, FIRST, _descriptor
from tests.core.test_saves import VERSIONS, Desk, SlowHost

PATIENCE_S = 20.0
TIMEOUT_S = 600.0  # of a save: far more than any test waits
WHOLE, TURNS = Config(), Config(mode="partial", k_persist=1, persist_every=1)
EXPERTS = [Expert(layer=0, index=index) for index in (0, 1)]
WORLD = {"world_size": 2, "node_of_rank": [0, 1], "ep_sizes": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Desk):
    """One of two agents, with what it has to do with the other one; `bell` is what wakes its loop."""

    bell: int
    told: list[Report] = field(default_factory=list)

    @property
    def council(self) -> Council:
        assert self.saves.council is not None
        return self.saves.council

    def begin(self, parent: Parent, config: Config) -> None:
        """Begin the next life on the same memory."""
        record = replace(FIRST, number=2, token="1" * 8, reason="recover", parent=parent)
        described = {**self.custody.life.descriptor, "config": asdict(config)}
        described["lineage"] = [encode_incarnation(life).decode() for life in (FIRST, record)]
        self.council.close("a new life has begun")
        self.custody.renew(described)
        self.saves.begin_life()
        self.saves.enter(_council(self.council.node, self.bell, life=2))

    def tell(self, other: Node) -> None:
        told = self.council.report(
            "http://x",
            self.custody.held,
            self.custody.passed,
            ended=(),
            wishes=self.saves.wishes,
            verdicts=self.saves.verdicts(self.custody.life.record.number, self.council.asked()),
            leaning=self.custody.leaning,
        )
        if told is not None:
            self.told.append(told)
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


@pytest.fixture
def turning(storage: str) -> Iterator[Pair]:
    """Two agents of such a job, one of whose two experts has its turn at every commit; each has one of them."""
    with ExitStack() as stack:
        yield (
            stack.enter_context(_node(0, storage, config=TURNS)),
            stack.enter_context(_node(1, storage, config=TURNS)),
        )


@contextmanager
def _node(number: int | None, storage: str, trace: Trace | None = None, *, config: Config = WHOLE) -> Iterator[Node]:
    """An agent of one node of two; None: of one node that has both ranks."""
    described = {**_descriptor(FIRST), "storage": storage, "versions": VERSIONS, "topology": WORLD}
    described |= {"config": asdict(config), "timeout_s": TIMEOUT_S, "experts": [len(EXPERTS)]}
    if number is not None:
        described["catalogs"] = [CATALOGS[number].to_json()]
        described["fellows"] = {"node": number, "secret": "a secret", "address": "127.0.0.1", "urls": []}
    custody, host = Custody.create(described, earlier=None), SlowHost()
    host.answers.set()
    receive, send = os.pipe()
    saves = Saves(host=host, trace=trace or Trace(), reply=lambda _connection, _message: None, wake_fd=send)
    if number is not None:
        saves.enter(_council(number, send))
    try:
        yield Node(saves=saves, custody=custody, host=host, woken=receive, bell=send)
    finally:
        if saves.council is not None:
            saves.council.close("over")
        saves.close()
        custody.close()
        os.close(receive)
        os.close(send)


def _council(node: int, bell: int, *, life: int = FIRST.number) -> Council:
    return Council(node=node, ranks_of=[(0,), (1,)], incarnation=life, host=SystemHost(), wake=lambda: _ring(bell))


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


def test_what_an_agent_leaves_with_is_saved_however_many_saves_wait_at_another_node(pair: Pair, storage: str) -> None:
    first, second = pair
    second.host.answers.clear()
    for node in pair:
        node.seal(5, record=0, flags=PERSIST | EXPLICIT)
    first.look(may_start=False)
    first.tell(second)
    second.look()
    assert second.host.asked.wait(PATIENCE_S), "this one is under way"
    for node in pair:
        node.seal(6, record=1, flags=PERSIST | EXPLICIT)
        node.seal(7, record=2, flags=PERSIST | EXPLICIT)
    first.look(may_start=False)
    first.tell(second)
    second.look()
    assert all(second.custody.is_saving((step, f"{step:08x}")) for step in (5, 6, 7)), "no more are awaited at once"
    for node in pair:
        node.seal(8, record=3, flags=0)
    second.look()
    second.tell(first)

    first.look(may_start=False)
    first.saves.persist_newest(first.custody)
    first.tell(second)
    second.look()
    second.host.answers.set()
    _talk_until(pair, lambda: not any(node.saves.is_busy for node in pair), may_start=False)

    assert [manifest.name.step for manifest in _manifests(storage)] == [8]
    assert all("too many" not in str(row["error"]) for node in pair for row in node.saves.outcomes())


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


def _moments(node: Node, *, life: int = FIRST.number) -> set[tuple[int, str]]:
    return {verdict.moment for verdict in node.saves.verdicts(life)}


def _commit(pair: Pair, step: int, *, record: int, flags: int = PERSIST) -> None:
    """Have both seal a step and make its checkpoint."""
    moments = {node.seal(step, record=record, flags=flags) for node in pair}
    _talk_until(pair, lambda: all(moments <= _moments(node) for node in pair), may_start=True)
    assert [node.saves.last_error for node in pair] == [None, None]


def _written(manifest: Manifest) -> list[int]:
    """Return which experts a checkpoint has written."""
    return [expert.index for expert in EXPERTS if manifest.version(expert)[0] == manifest.name]


def test_experts_of_two_nodes_take_turns(turning: Pair, storage: str) -> None:
    stored = []
    for step in range(6, 11):
        _commit(turning, step, record=step % 3)
        stored.append(_manifests(storage)[-1])

    assert [_written(manifest) for manifest in stored] == [[0, 1], [0], [1], [0], [1]]
    assert all(manifest.is_finite for manifest in stored)


def test_an_offer_is_not_told_again_after_its_save_however_many_were_skipped_since(turning: Pair) -> None:
    first, second = turning
    _commit(turning, 6, record=0)
    first.council.close("its agent has died")
    first.saves.enter(_council(0, first.bell))  # a successor, which has no part in the save
    first.tell(second)
    for step in range(7, 40):
        second.saves.give_up(second.custody, (step, "00000000"), "a rank skipped its snapshot")

    second.tell(first)

    last = second.told[-1]
    assert min(verdict.moment[0] for verdict in last.verdicts) > 6
    assert last.offer is None


@pytest.mark.parametrize(("config", "whole"), [(TURNS, [0]), (WHOLE, [0, 1])])
def test_what_ranks_have_alike_is_stored_by_the_lowest_node_that_has_offered(
    storage: str, config: Config, whole: list[int]
) -> None:
    """Without offers nobody knows what another node has."""
    with ExitStack() as stack:
        pair = (
            stack.enter_context(_node(0, storage, config=config)),
            stack.enter_context(_node(1, storage, config=config)),
        )
        moments = {node.seal(6, record=0, flags=PERSIST, alike=bytes(range(256)) * 2) for node in pair}
        _talk_until(pair, lambda: all(moments <= _moments(node) for node in pair), may_start=True)
        assert [node.saves.last_error for node in pair] == [None, None]
        outlines = [{r.offer.state is not None for r in node.told if r.offer is not None} for node in pair]
        assert outlines == ([{True}, {False}] if config is TURNS else [set(), set()]), "it is long, and said once"

    repository, manifest = Repository(open_store(storage)), _manifests(storage)[-1]
    dense = [row for row in manifest.objects if row.key.endswith("-d.safetensors")]
    trees = [decode_state(repository.read_state(row, repository.read_header(row))) for row in dense]
    assert [rank for rank, tree in enumerate(trees) if "alike" in tree] == whole  # type: ignore[operator]
    for rank in (0, 1):
        found = StorageSource(repository, manifest, rank=rank).state(rank)
        assert found == ({"alike": bytes(range(256)) * 2, "rank": rank}, True)
    repository.close()


@pytest.mark.parametrize("leaver", [0, 1])
def test_an_agent_that_leaves_has_the_other_one_make_a_second_checkpoint_of_its_newest_moment(
    turning: Pair, storage: str, leaver: int
) -> None:
    for step in (6, 7):
        _commit(turning, step, record=step % 3)
    assert _written(_manifests(storage)[-1]) == [0]

    leaving = turning[leaver]
    leaving.saves.persist_newest(leaving.custody)
    target = (7, second_attempt("00000007"))
    _talk_until(turning, lambda: all(target in _moments(node) for node in turning), may_start=True)

    last = _manifests(storage)[-1]
    assert (last.name.step, last.name.attempt) == target
    assert last.stale_experts == ()
    assert [node.saves.last_error for node in turning] == [None, None]
    for node in turning:
        assert not node.saves.is_busy, "it is not made again"
    other = turning[1 - leaver]
    other.saves.persist_newest(other.custody)
    assert not other.saves.is_busy, "all of it is stored"


def test_nodes_that_leave_while_one_of_them_has_begun_a_turn_store_all_at_once(turning: Pair, storage: str) -> None:
    """Else one would wait for the other's part of the first checkpoint, and that one for the second's."""
    first, second = turning
    _commit(turning, 6, record=0)
    for node in turning:
        node.seal(7, record=1, flags=PERSIST)
    first.look(may_start=False)
    first.tell(second)
    second.look()
    assert second.custody.is_saving((7, "00000007"))
    second.tell(first)

    first.look(may_start=False)
    for node in turning:
        node.saves.persist_newest(node.custody)
    target = (7, second_attempt("00000007"))
    _talk_until(turning, lambda: all(target in _moments(node) for node in turning), may_start=False)

    last = _manifests(storage)[-1]
    assert (last.name.step, last.name.attempt) == target
    assert last.stale_experts == ()


def test_how_a_save_has_ended_is_told_to_who_is_at_it_however_many_were_skipped_since(turning: Pair) -> None:
    first, second = turning
    for node in turning:
        node.seal(6, record=0, flags=PERSIST)
        node.custody.scan()
    first.tell(second)
    second.look()
    assert second.custody.is_saving((6, "00000006"))
    first.saves.give_up(first.custody, (6, "00000006"), "of the test")
    for step in range(7, 40):
        first.saves.give_up(first.custody, (step, "00000000"), "a rank skipped its snapshot")

    _talk_until(turning, lambda: (6, "00000006") in _moments(second), may_start=False)

    assert "of the test" in str(second.saves.last_error)


def test_a_node_that_knows_of_no_commit_grows_its_checkpoint_from_the_other_ones(turning: Pair, storage: str) -> None:
    first, second = turning
    first.saves.recall(first.custody)  # it looks up what is committed: nothing yet
    first.look_until(lambda: not first.saves.is_busy)
    with _node(None, storage, config=TURNS) as other:
        other.seal(7, record=0, flags=PERSIST)
        other.look_until(lambda: other.saves.last_committed_step == 7)
    for node in turning:
        node.seal(8, record=0, flags=PERSIST)
    second.custody.scan()
    second.tell(first)
    first.look()
    assert first.custody.is_saving((8, "00000008")), "begun before it has heard of the commit"
    second.saves.recall(second.custody)
    _talk_until(turning, lambda: all((8, "00000008") in _moments(node) for node in turning), may_start=True)

    assert [node.saves.last_error for node in turning] == [None, None]
    last = _manifests(storage)[-1]
    assert last.parent == Parent(incarnation=FIRST.number, step=7, attempt="00000007")
    assert [(row.step, row.source.step) for row in last.stale_experts] == [(7, 7)]


def test_a_base_that_one_node_cannot_read_fails_the_save_and_the_next_is_made(turning: Pair, storage: str) -> None:
    _commit(turning, 6, record=0)
    (stored,) = Repository(open_store(storage)).checkpoints()
    path = Path(storage) / manifest_key(stored.name)
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"0" + content[-8:])  # the committer knows what stood there, the other one reads it
    moments = {node.seal(7, record=1, flags=PERSIST) for node in turning}
    _talk_until(turning, lambda: all(moments <= _moments(node) for node in turning), may_start=True)

    words = {node.saves.last_error for node in turning}
    assert len(words) == 1
    assert "ManifestCorruptError" in str(words)
    assert "node=1" in str(words)
    _commit(turning, 8, record=2)
    assert _manifests_of(storage, 8).stale_experts == (), "nobody can read what it could grow from"


def _manifests_of(storage: str, step: int) -> Manifest:
    repository = Repository(open_store(storage))
    (name,) = [stored.name for stored in repository.checkpoints() if stored.name.step == step]
    return repository.read_manifest(name)


@pytest.mark.parametrize(("mode", "leaving"), [(TURNS, {0, 1}), (WHOLE, {0, 1}), (TURNS, {0}), (TURNS, {1})])
def test_what_a_life_has_inherited_is_stored_by_both_nodes_under_one_name(
    storage: str, mode: Config, leaving: set[int]
) -> None:
    """One of them has an expert of an earlier step, and cannot know that the other one has not, nor the reverse."""
    with _node(0, storage, config=TURNS) as first, _node(1, storage, config=TURNS) as second:
        pair = (first, second)
        _commit(pair, 6, record=0)
        for node in pair:
            node.seal(7, record=1, flags=0, older={EXPERTS[1]: 6})
        _talk_until(pair, lambda: all(node.custody.global_step == 7 for node in pair), may_start=True)
        for node in pair:
            node.begin(Parent(incarnation=1, step=7, attempt=None), mode)

        for number in leaving:
            pair[number].saves.persist_newest(pair[number].custody)
        target = (7, second_attempt("00000007"))
        _talk_until(pair, lambda: all(target in _moments(node, life=2) for node in pair), may_start=len(leaving) == 1)
        for node in pair:
            node.saves.persist_newest(node.custody)
            assert not node.saves.is_busy, "it is not made again"

    last = _manifests(storage)[-1]
    assert (last.name.incarnation, last.name.step, last.name.attempt) == (2, *target)
    assert [(row.expert, row.step, row.source.step) for row in last.stale_experts] == [(EXPERTS[1], 6, 6)]


def test_a_leaving_agent_hears_at_once_that_another_node_has_nothing_of_what_the_life_has_inherited(
    storage: str,
) -> None:
    with _node(0, storage, config=TURNS) as first, _node(1, storage, config=TURNS) as second:
        pair = (first, second)
        _commit(pair, 6, record=0)
        first.seal(7, record=1, flags=0)
        for node in pair:
            node.begin(Parent(incarnation=1, step=7, attempt=None), TURNS)

        first.saves.persist_newest(first.custody)
        target = (7, second_attempt("00000007"))
        _talk_until(pair, lambda: target in _moments(first, life=2), may_start=True)

        assert "nothing of what the life was recovered from node=1" in str(first.saves.last_error)


def test_contributions_to_different_checkpoints_fail_the_save(turning: Pair, storage: str) -> None:
    """As those of an agent that was replaced, and whose successor knows another commit."""
    first, second = turning
    _commit(turning, 6, record=0)
    moments = {node.seal(7, record=1, flags=PERSIST) for node in turning}
    _talk_until(turning, lambda: all(moments <= _moments(node) for node in turning), may_start=True)
    heard = second.council.report("http://y", {}, {}, ended=(), wishes=(), verdicts=())
    assert heard is not None
    (_, part) = heard.contributions
    for node in turning:
        node.seal(8, record=2, flags=PERSIST)
    second.custody.scan()
    second.tell(first)
    first.look()
    moment = (8, "00000008")
    offer = Offer(moment=moment, experts=_offered(8), is_whole=False, is_inherited=False)
    forged = replace(part, moment=moment, parent=Parent(incarnation=1, step=7, attempt="00000007"), composed="0" * 16)
    order = (heard.order[0], heard.order[1] + 10)
    first.council.hear(replace(heard, order=order, offer=offer, contributions=(forged,), verdicts=()))
    first.look_until(lambda: moment in _moments(first))

    assert "nodes have composed different checkpoints: step=8" in str(first.saves.last_error)
    assert [manifest.name.step for manifest in _manifests(storage)] == [7]


def test_contributions_that_grow_from_different_commits_fail_the_save(pair: Pair, storage: str) -> None:
    first, second = pair
    _commit(pair, 6, record=0)
    moments = {node.seal(7, record=1, flags=PERSIST) for node in pair}
    _talk_until(pair, lambda: all(moments <= _moments(node) for node in pair), may_start=True)
    heard = second.council.report("http://y", {}, {}, ended=(), wishes=(), verdicts=())
    assert heard is not None
    (_, part) = heard.contributions
    for node in pair:
        node.seal(8, record=2, flags=PERSIST)
    second.custody.scan()
    second.tell(first)
    first.look()
    moment = (8, "00000008")
    grown = replace(part, moment=moment, parent=Parent(incarnation=1, step=6, attempt="00000006"))
    order = (heard.order[0], heard.order[1] + 10)
    first.council.hear(replace(heard, order=order, contributions=(grown,), verdicts=()))
    first.look_until(lambda: moment in _moments(first))

    assert "nodes follow different commits: step=8" in str(first.saves.last_error)
    assert [manifest.name.step for manifest in _manifests(storage)] == [7]


def test_an_offer_that_leaves_an_expert_out_fails_the_save(turning: Pair, storage: str) -> None:
    first, second = turning
    for node in turning:
        node.seal(6, record=0, flags=PERSIST)
        node.custody.scan()
    second.tell(first)
    first.look()
    moment = (6, "00000006")
    heard = second.council.report("http://y", {}, {}, ended=(), wishes=(), verdicts=())
    assert heard is not None
    first.council.hear(replace(heard, offer=Offer(moment=moment, experts=(), is_whole=False, is_inherited=False)))
    first.look_until(lambda: moment in _moments(first))

    assert "offers have other experts than the model" in str(first.saves.last_error)
    assert Repository(open_store(storage)).objects() == [], "nothing was written"


def _offered(step: int) -> tuple[OfferedExpert, ...]:
    return (OfferedExpert(expert=EXPERTS[1], step=step),)
