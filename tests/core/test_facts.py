"""What ranks tell each other before a life begins."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moc.agent.runtime import own_address
from moc.beginning import Beginning
from moc.config import Config
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
        world = SocketWorld(rank, 2, tmp_path / "world")
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


@pytest.mark.parametrize("name", ["two..dots", "x" * 64])
def test_a_launcher_whose_name_means_nothing_is_no_way_to_an_address(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", name)
    assert own_address() is None
