"""What ranks tell each other before a life begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from moc.agent.runtime import own_address
from moc.config import Config
from moc.facts import gather_facts
from moc.host import SystemHost
from moc.survey import Request
from tests.support.plain import PlainState, SocketWorld


def test_one_node_looks_up_no_address(tmp_path: Path) -> None:
    request = Request(
        storage=str(tmp_path / "storage"),
        config=Config(),
        restore="auto",
        run_id=None,
        take_over=False,
        on_mismatch=(),
        runtime_root=tmp_path / "node",
        agent_idle_s=1.0,
        fingerprint={},
        node_address="127.0.0.1",
    )
    facts = gather_facts(
        PlainState(0, 1), SocketWorld(0, 1, tmp_path / "world"), request, ep_sizes=(), host=SystemHost()
    )
    assert facts.topology.node_count == 1
    assert facts.addresses == ()


@pytest.mark.parametrize("name", ["two..dots", "x" * 64])
def test_a_launcher_whose_name_means_nothing_is_no_way_to_an_address(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", name)
    assert own_address() is None
