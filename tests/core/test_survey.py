"""What a survey finds: also what an agent of several nodes has stored since the first look."""

from __future__ import annotations

from pathlib import Path

import pytest

from moc.config import Config
from moc.host import SystemHost
from moc.plan.lineage import MEMORY, STORAGE, Candidate
from moc.survey import Holdings, Request, survey, survey_storage
from moc.trace import Trace
from tests.support.repository import RepositoryBuilder

TRACE = Trace()


@pytest.mark.parametrize("is_alone", [True, False])
def test_what_agents_of_several_nodes_commit_while_a_launch_looks_is_found(tmp_path: Path, is_alone: bool) -> None:
    host = SystemHost()
    url = f"file://{tmp_path / 'repository'}"
    builder = RepositoryBuilder(host.open_store(url, trace=TRACE))
    first = builder.begin(1)
    builder.commit(1, 4)
    request = Request(
        storage=url,
        config=Config(),
        restore="auto",
        run_id=None,
        take_over=False,
        on_mismatch=(),
        runtime_root=tmp_path / "node",
        agent_idle_s=1.0,
        fingerprint=builder.fingerprint,
    )
    stored = survey_storage(request, host=host, trace=TRACE)
    builder.commit(1, 8)
    old = Candidate(source=MEMORY, run=first.run, incarnation=1, step=2, attempt="00000000")
    held = Holdings(lives=(first,), snapshots=(old,), notes=(), lenders={} if is_alone else {"members": []})

    origin = survey(request, stored, held, host=host, trace=TRACE)

    # One node's agent holds in memory whatever it commits: there the first look is enough.
    found = [candidate.step for candidate in origin.candidates if candidate.source == STORAGE]
    assert max(found) == (4 if is_alone else 8)
