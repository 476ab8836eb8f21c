"""What the agents of several nodes know and decide together, whatever of their reports is late, lost or repeated."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.agent.peers.council import PATIENCE_S, SILENCE_S, Council
from moc.agent.peers.report import Contribution, Report, Verdict, report_from_json
from moc.errors import CoordinationError, PlanDivergedError, SaveFailedError, UsageError, WaitTimeoutError
from moc.format.manifest import ObjectRow, Parent
from moc.host import SystemHost
from moc.persist import Receipt
from moc.plan.freeing import Moment, Seal, complete_moments, freeable, hopeless_moments
from moc.plan.offers import Offer, OfferedExpert
from moc.state import Expert

LIFE, MOMENT, DEADLINE_S = 3, (7, "00abcdef"), 20.0


class Host(SystemHost):
    """This machine under a clock of the test's own."""

    def __init__(self) -> None:
        super().__init__()
        self.time_s, self.tick_s = 100.0, 0.0

    def now_s(self) -> float:
        self.time_s += self.tick_s  # by as much with every look at it
        return self.time_s


@dataclass
class Node:
    """A council and what its agent would tell of itself."""

    council: Council
    woken: threading.Event
    verdicts: list[Verdict] = field(default_factory=list)

    def report(self) -> Report:
        told = self.council.report("http://x", {}, {}, ended=(), wishes=(), verdicts=self.verdicts)
        assert told is not None
        return report_from_json(json.loads(json.dumps(told.to_json())), node=told.node, ranks=(told.node,))


@contextmanager
def saving(host: Host) -> Iterator[ThreadPoolExecutor]:
    """Run saves on threads that end at the latest when the test does."""
    with ThreadPoolExecutor() as pool:
        try:
            yield pool
        finally:
            host.tick_s = 1000.0


def nodes(host: Host, count: int = 2) -> list[Node]:
    found = []
    for number in range(count):
        woken = threading.Event()
        council = Council(
            node=number, ranks_of=[(n,) for n in range(count)], incarnation=LIFE, host=host, wake=woken.set
        )
        found.append(Node(council, woken))
    return found


def contribution(node: int) -> Contribution:
    key = f"objects/000003-run/000000000007-00abcdef/r{node:05d}-d.safetensors"
    row = ObjectRow(key=key, size_bytes=9, header_bytes=8, header_crc32c=7)
    receipt = Receipt(rank=node, digest="0" * 16, rows=(row,), is_finite=True)
    parent = Parent(incarnation=3, step=5, attempt="00000000")
    return Contribution(moment=MOMENT, parent=parent, receipts=(receipt,))


def offer(node: int, **change: object) -> Offer:
    rows = (OfferedExpert(expert=Expert(layer=0, index=node), step=7),)
    return replace(Offer(moment=MOMENT, experts=rows, is_whole=False, is_inherited=False), **change)


def consult(pool: ThreadPoolExecutor, node: Node) -> Future[tuple[Offer, ...] | Verdict]:
    """Begin to compose a save at a node; return once it has offered."""
    node.woken.clear()
    future = pool.submit(node.council.consult, offer(node.council.node), timeout_s=60.0)
    assert node.woken.wait(DEADLINE_S)
    return future


def gather(pool: ThreadPoolExecutor, node: Node) -> Future[tuple[Contribution, ...] | Verdict]:
    """Begin a save at a node; return once it has contributed."""
    node.woken.clear()
    future = pool.submit(node.council.gather, contribution(node.council.node), timeout_s=60.0)
    assert node.woken.wait(DEADLINE_S)
    return future


def test_the_lowest_node_commits_and_the_other_hears_of_it() -> None:
    host = Host()
    first, second = nodes(host)
    with saving(host) as pool:
        saves = [gather(pool, node) for node in (first, second)]
        first.council.hear(second.report())
        second.council.hear(first.report())
        assert saves[0].result(DEADLINE_S) == (contribution(0), contribution(1))
        assert not saves[1].done(), "it is not this node's turn"
        first.verdicts = [Verdict(moment=MOMENT, size_bytes=18, error=None)]
        second.council.hear(first.report())
        assert saves[1].result(DEADLINE_S) == first.verdicts[0]


def test_another_node_commits_the_same_where_the_lowest_does_not() -> None:
    host = Host()
    first, second = nodes(host)
    with saving(host) as pool:
        saves = [gather(pool, node) for node in (first, second)]
        second.council.hear(first.report())
        host.tick_s = PATIENCE_S
        assert saves[1].result(DEADLINE_S) == (contribution(0), contribution(1))
        first.council.close("over")
        with pytest.raises(CoordinationError, match="over"):
            saves[0].result(DEADLINE_S)


@pytest.mark.parametrize("is_hurried", [False, True])
def test_a_node_that_says_nothing_is_waited_for_within_limits(is_hurried: bool) -> None:
    host = Host()
    first, _ = nodes(host)
    with saving(host) as pool:
        save = gather(pool, first)
        host.time_s += SILENCE_S + 1
        if is_hurried:
            first.council.hurry()
        else:
            assert not save.done(), "it may be restarting"
            host.time_s += 60.0
        with pytest.raises(WaitTimeoutError, match=r"nodes=\[1\]"):
            save.result(DEADLINE_S)


@pytest.mark.parametrize("jump_s", [1e6, -1e6])
def test_a_clock_that_jumps_makes_nodes_silent_until_they_are_heard_and_frees_nothing(jump_s: float) -> None:
    host = Host()
    first, second = nodes(host)
    first.council.hear(second.report())
    before = first.council.others()
    host.time_s += jump_s

    after = first.council.others()

    assert after.silent == ((1,) if jump_s > 0 else ())
    assert replace(after, silent=()) == replace(before, silent=()), "silence says nothing of what a node holds"
    second.verdicts = [Verdict(moment=MOMENT, size_bytes=1, error=None)]
    first.council.hear(second.report())
    assert first.council.others().silent == ()
    assert list(first.council.others().verdicts) == second.verdicts


def test_a_clock_that_jumps_forwards_in_a_joint_save_fails_it_and_the_next_one_is_made() -> None:
    host = Host()
    first, second = nodes(host)
    with saving(host) as pool:
        save = gather(pool, first)
        host.time_s += 1e6
        with pytest.raises(WaitTimeoutError, match=r"nodes=\[1\]"):
            save.result(DEADLINE_S)

        saves = [gather(pool, node) for node in (first, second)]
        first.council.hear(second.report())
        assert saves[0].result(DEADLINE_S) == (contribution(0), contribution(1))
        first.verdicts = [Verdict(moment=MOMENT, size_bytes=18, error=None)]
        second.council.hear(first.report())
        assert saves[1].result(DEADLINE_S) == first.verdicts[0]


def test_what_fails_at_one_node_fails_at_all_with_its_words_but_a_commit_stays_one() -> None:
    host = Host()
    first, second, third = nodes(host, 3)
    with saving(host) as pool:
        save = gather(pool, first)
        second.verdicts = [Verdict(moment=MOMENT, size_bytes=0, error="disk full node=1")]
        first.council.hear(second.report())
        with pytest.raises(SaveFailedError, match=r"^disk full node=1$"):
            save.result(DEADLINE_S)
        third.verdicts = [Verdict(moment=MOMENT, size_bytes=5, error=None)]
        first.council.hear(third.report())
        assert first.council.verdict(MOMENT) == third.verdicts[0]


def test_every_node_has_the_offers_of_all_at_once_and_in_their_order() -> None:
    host = Host()
    first, second, third = nodes(host, 3)
    with saving(host) as pool:
        offers = [consult(pool, node) for node in (first, second, third)]
        reports = [node.report() for node in (first, second, third)]
        for node in (first, second, third):
            for report in reversed(reports):
                if report.node != node.council.node:
                    assert not offers[node.council.node].done()
                    node.council.hear(report)
        assert [found.result(DEADLINE_S) for found in offers] == [(offer(0), offer(1), offer(2))] * 3


def test_an_offer_for_another_save_is_none_and_a_verdict_ends_the_wait() -> None:
    host = Host()
    first, second = nodes(host)
    with saving(host) as pool:
        waiting = consult(pool, first)
        late = replace(second.report(), offer=offer(1, moment=(6, "00abcdef")))
        first.council.hear(replace(late, order=(late.order[0], late.order[1] + 1)))
        assert not waiting.done()
        second.verdicts = [Verdict(moment=MOMENT, size_bytes=5, error=None)]
        found = replace(second.report(), order=(late.order[0], late.order[1] + 2))
        first.council.hear(found)
        assert waiting.result(DEADLINE_S) == second.verdicts[0]


def test_a_node_that_offers_nothing_is_named_and_not_waited_for_when_this_one_leaves() -> None:
    host = Host()
    first, _, _ = nodes(host, 3)
    with saving(host) as pool:
        waiting = consult(pool, first)
        host.time_s += SILENCE_S + 1
        first.council.hurry()
        with pytest.raises(WaitTimeoutError, match=r"nodes gave no offers: step=7 nodes=\[1, 2\]"):
            waiting.result(DEADLINE_S)


def test_a_node_composes_nothing_else_than_another_one_has_composed() -> None:
    """Its predecessor may have written its part of that, and the other node may commit it."""
    host = Host()
    first, second = nodes(host)
    second.council.confirm(offer(1, composed="a"))
    first.council.hear(second.report())
    first.council.confirm(offer(0, composed="a"))
    first.council.confirm(offer(0, composed="b", moment=(9, "00abcdef")))
    with pytest.raises(PlanDivergedError, match=r"step=7 nodes=\[1\]"):
        first.council.confirm(offer(0, composed="b"))


def test_an_offer_is_told_until_its_save_has_ended_here() -> None:
    host = Host()
    (first, _) = nodes(host)
    first.council.confirm(offer(0))
    assert first.report().offer == offer(0)
    first.verdicts = [Verdict(moment=MOMENT, size_bytes=0, error="disk full node=1")]
    assert first.report().offer == offer(0), "made once more, it is of this offer"
    first.council.announce(Verdict(moment=MOMENT, size_bytes=5, error=None))
    assert first.report().offer is None
    first.council.confirm(offer(0, moment=(9, "00abcdef")))
    assert first.report().offer is not None
    first.council.withdraw()
    assert first.report().offer is None


def test_old_reports_change_nothing_and_those_of_a_successor_do() -> None:
    host = Host()
    first, second = nodes(host)
    second.verdicts = [Verdict(moment=(1, "00000000"), size_bytes=1, error=None)]
    old = second.report()
    second.verdicts = [Verdict(moment=(2, "00000000"), size_bytes=2, error=None)]
    new = second.report()
    assert first.council.hear(new)
    assert not first.council.hear(old)
    assert not first.council.hear(new)
    assert first.council.others().verdicts == new.verdicts
    host.time_s += 1
    successor = nodes(host)[1].report()
    assert first.council.hear(successor)
    assert first.council.others().verdicts == ()


OFFER = {
    "moment": [7, "00abcdef"],
    "experts": [[0, 0, 7], [0, 1, 5, 3], [0, 2, None]],
    "is_whole": False,
    "is_inherited": False,
    "base": [3, 5, "00000000"],
    "finite": [[3, 5, "00000000"]],
    "routing": {"basis": "kept", "routed": [[9, 9, 9]], "lost": [[0, 0, 0]]},
    "composed": "0" * 16,
    "state": [1, ["00" * 16, "ff" * 16]],
}
LIES: list[dict[str, object]] = [
    {"moment": [7]},
    {"experts": [[0, 0]]},
    {"experts": [[0, 0, 8]]},
    {"experts": [[0, -1, 7]]},
    {"experts": [[0, 0, True]]},
    {"experts": [[0, 0, 5, -1]]},
    {"experts": [[0, 0, 5, 1 << 63]]},
    {"experts": [[0, 0, 5, 1, 1]]},
    {"experts": [[0, 1, 7], [0, 0, 7]]},
    {"experts": [[0, 0, 7], [0, 0, 7]]},
    {"is_whole": 1},
    {"is_inherited": None},
    {"base": [0, 5, "00000000"]},
    {"base": [3, 5, "../../x"]},
    {"base": [3, 10**12, "00000000"]},
    {"finite": [[3, 5]]},
    {"routing": {"basis": "kept"}},
    {"composed": 5},
    {"state": [0, []]},
    {"state": [-1, []]},
    {"state": [1]},
    {"state": [1, ["x"]]},
    {"state": [1, [5]]},
]


def _text(offer: dict[str, object]) -> str:
    return json.dumps(offer, separators=(",", ":"))


@pytest.mark.parametrize(
    "change",
    [
        {"held": [[1, "a", [0]]]},
        {"passed": [[0, 1, "a"]]},
        {"ended": [0]},
        {"node": 0},
        {"order": [1]},
        {"url": 5},
        {"verdicts": [[1, "a", -1, None]]},
        {"contributions": [[1, "a", None, [[1, "d", True, [["../x", 1, 1, 1]]]], None, None]]},
        {"contributions": [[1, "a", None, [], None, 5]]},
        {"wishes": [[1, "00000000", 1, False]]},
        {"wishes": [[1, "00000000", True, 0]]},
        {"wishes": [[1, "../x", True, False]]},
        {"leaning": [5]},
        {"offer": 5},
        {"offer": {}},
        {"offer": "{"},
        {"offer": "[" * 100_000},
        *({"offer": _text(OFFER | change)} for change in LIES),
        {"held": {}},
    ],
    ids=lambda change: str(change)[:80],
)
def test_a_report_that_no_agent_makes_is_refused(change: dict[str, object]) -> None:
    body = nodes(Host())[1].report().to_json() | {"offer": _text(OFFER)}
    assert report_from_json(body, node=1, ranks=(1,)).to_json() == body, "what is changed is sound"
    body |= change
    if change == {"held": {}}:
        body["held"] = 5
    with pytest.raises(UsageError, match="node=1"):
        report_from_json(body, node=1, ranks=(1,))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_the_newest_moment_that_all_hold_is_never_freed(data: st.DataObject) -> None:
    """Nodes seal, skip, report and look in any order; each decides by reports that may be old."""
    count, versions = data.draw(st.integers(2, 3)), 3
    ranks = range(count)
    held: list[set[Moment]] = [set() for _ in ranks]
    passed: list[Moment] = [(0, "")] * count
    known: list[dict[int, tuple[frozenset[Moment], Moment]]] = [{} for _ in ranks]
    sealed: dict[Moment, set[int]] = {}
    for _ in range(data.draw(st.integers(1, 60))):
        rank = data.draw(st.integers(0, count - 1))
        action = data.draw(st.sampled_from(["step", "step", "look", "tell"]))
        if action == "step":
            moment = (passed[rank][0] + 1, "00")
            passed[rank] = moment
            if len(held[rank]) < versions and data.draw(st.booleans()):
                held[rank].add(moment)
                sealed.setdefault(moment, set()).add(rank)
        elif action == "tell":
            for other in ranks:
                if other != rank and data.draw(st.booleans()):  # else it is late, or lost
                    known[other][rank] = (frozenset(held[rank]), passed[rank])
        else:
            held[rank] -= _freed(rank, count, held[rank], passed[rank], known[rank])
        complete = [moment for moment, by in sealed.items() if by == set(ranks)]
        if complete:
            assert all(max(complete) in held[rank] for rank in ranks)


def _freed(
    rank: int,
    count: int,
    held: set[Moment],
    passed: Moment,
    known: dict[int, tuple[frozenset[Moment], Moment]],
) -> set[Moment]:
    """Return what an agent frees of its own, as `Custody.scan` does."""
    views = {**known, rank: (frozenset(held), passed)}
    seals = [
        Seal(incarnation=LIFE, step=moment[0], attempt=moment[1], rank=other, record=0)
        for other, (moments, _) in views.items()
        for moment in sorted(moments)
    ]
    after = {other: (seen[0], seen[1] + "~") for other, (_, seen) in views.items()}
    hopeless = hopeless_moments(seals, range(count), LIFE, passed=after)
    assert complete_moments(seals, range(count), LIFE) == () or len(views) == count
    freed = freeable(seals, range(count), LIFE, pinned=(), source=None, hopeless=hopeless)
    return {seal.moment for seal in freed if seal.rank == rank}


def test_a_report_is_sent_only_where_something_is_new() -> None:
    (node, _) = nodes(Host())
    first = node.report()
    assert node.council.report("http://x", {}, {}, ended=(), wishes=(), verdicts=()) is None
    node.verdicts = [Verdict(moment=MOMENT, size_bytes=1, error=None)]
    second = node.report()
    assert replace(second, order=first.order, verdicts=()) == first
    assert second.order > first.order
