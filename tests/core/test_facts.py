"""What ranks tell each other before a life begins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moc.agent.runtime import own_address
from moc.beginning import Beginning
from moc.config import Config
from moc.errors import TopologyError, UsageError
from moc.facts import Facts, gather_facts
from moc.format.manifest import Incarnation
from moc.host import SystemHost
from moc.survey import Request
from moc.training import World
from tests.support.plain import PlainState, SocketWorld

LIFE = Incarnation(run="run-7", number=1, token="0" * 8, parent=None, reason="start", fingerprint={})


def _request(folder: Path, *, node: str, address: str) -> Request:
    return Request(
        storage=str(folder / "storage"),
        config=Config(),
        restore="auto",
        run_id=None,
        take_over=False,
        on_mismatch=(),
        runtime_root=folder / node,
        agent_idle_s=1.0,
        fingerprint={},
        node_address=address,
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "partial", "k_snapshot": 4, "k_persist": 1}, "k_snapshot=4 allowed=1..3"),
        ({"mode": "partial", "k_persist": 9}, "k_persist=9 allowed=1..3"),
        ({"replicas": 1}, "replicas=1 nodes=1 allowed=0..0"),
        ({"memory_budget_bytes": 1000}, "allowed=memory_budget_bytes=1000"),
    ],
)
def test_settings_that_do_not_fit_the_job_are_refused_on_all_ranks_with_what_is_allowed(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    def ask(rank: int) -> str:
        with closing(SocketWorld(rank, 2, tmp_path / "world")) as world:
            request = replace(_request(tmp_path, node="node", address="127.0.0.1"), config=Config(**settings))
            state = PlainState(rank, 2, experts=3)
            with pytest.raises(UsageError) as caught:
                gather_facts(state, world, request, ep_sizes=(), host=SystemHost())
            return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first == second
    assert words in first


@pytest.mark.parametrize("budget_share", [0.9, 1.1])
def test_the_budget_includes_replicas_of_other_nodes(tmp_path: Path, budget_share: float) -> None:
    def ask(budget: int | None) -> list[str]:
        def act(rank: int) -> str:
            with closing(SocketWorld(rank, 2, tmp_path / f"world-{budget}")) as world:
                config = Config(replicas=1, memory_budget_bytes=budget)
                request = replace(_request(tmp_path, node=f"node-{rank}", address="127.0.0.1"), config=config)
                try:
                    _gather(rank, 2, world, request)
                except UsageError as error:
                    return str(error)
                return ""

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(act, range(2)))

    found = re.search(r"arena_bytes=(\d+) replica_bytes=(\d+) allowed=memory_budget_bytes=1$", ask(1)[0])
    assert found is not None
    own, replicas = int(found[1]), int(found[2])
    assert replicas > own / 3

    answers = ask(int(own + budget_share * replicas))

    assert answers == (["", ""] if budget_share > 1 else [answers[0]] * 2)
    assert bool(answers[0]) == (budget_share < 1)


def _gather(rank: int, size: int, world: World, request: Request) -> Facts:
    return gather_facts(PlainState(rank, size), world, request, ep_sizes=(), host=SystemHost())


def test_one_node_looks_up_no_address(tmp_path: Path) -> None:
    world = SocketWorld(0, 1, tmp_path / "world")
    facts = _gather(0, 1, world, _request(tmp_path, node="node", address="127.0.0.1"))
    assert facts.topology.node_count == 1
    assert facts.addresses == ()


def test_the_agents_of_several_nodes_are_told_the_same_versions_and_each_its_own_address(tmp_path: Path) -> None:
    """Versions go into manifests, which any of them may put."""

    def describe(rank: int) -> Mapping[str, Any]:
        with closing(SocketWorld(rank, 2, tmp_path / "world")) as world:
            request = _request(tmp_path, node=f"node-{rank}", address=f"127.0.0.{1 + rank}")
            beginning = Beginning(
                tmp_path,
                request,
                _gather(rank, 2, world, request),
                world,
                (),
                layers=(),
                base=None,
                software={"torch": f"2.{rank}"},
                host=SystemHost(),
            )
            return beginning._describe(LIFE)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(describe, range(2))
    assert first["software"] == second["software"] == {"torch": "2.0"}
    assert first["fellows"]["secret"] == second["fellows"]["secret"]
    assert [told["fellows"]["address"] for told in (first, second)] == ["127.0.0.1", "127.0.0.2"]


@pytest.mark.parametrize(
    ("address", "is_refused"), [("127.0.1.1", True), ("::1", True), ("localhost", True), ("10.0.0.8", False)]
)
def test_a_node_that_others_would_look_for_on_themselves_is_refused_on_all_ranks(
    tmp_path: Path, address: str, is_refused: bool
) -> None:
    def ask(rank: int) -> str:
        with closing(SocketWorld(rank, 2, tmp_path / "world")) as world:
            request = _request(tmp_path, node=f"node-{rank}", address=("10.0.0.7", address)[rank])
            try:
                return " ".join(_gather(rank, 2, world, request).addresses)
            except TopologyError as error:
                return str(error)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first == second
    if is_refused:
        assert f"node=1 address={address}, node 0 has 10.0.0.7" in first
        assert "node_address" in first
    else:
        assert first == "10.0.0.7 10.0.0.8"


@pytest.mark.parametrize("name", ["two..dots", "x" * 64])
def test_a_launcher_whose_name_means_nothing_is_no_way_to_an_address(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", name)
    assert own_address() is None


def test_ranks_that_would_not_choose_alike_are_refused_with_the_setting_and_both_values(tmp_path: Path) -> None:
    def gather(rank: int) -> str:
        config = Config(mode="partial", k_persist=1 + rank // 2)
        request = replace(_request(tmp_path, node=f"node-{rank}", address="127.0.0.1"), config=config)
        with closing(SocketWorld(rank, 3, tmp_path / "world")) as world, pytest.raises(UsageError) as refusal:
            _gather(rank, 3, world, request)
        return str(refusal.value)

    with ThreadPoolExecutor(3) as pool:
        words = set(pool.map(gather, range(3)))
    assert words == {
        "ranks run with different settings: k_persist=1 on rank 0, 2 on rank 2 allowed=one value on all ranks"
    }
