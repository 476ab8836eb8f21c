"""An agent that cannot listen where it is told to: what is left of the attempt, and what the next attach finds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from moc.agent.company import Company
from moc.agent.custody import Custody
from moc.errors import UsageError
from moc.host import SystemHost
from moc.trace import Trace
from tests.peers.nodes import whole_descriptor

NOT_OURS = "192.0.2.1"
OURS = "127.0.0.1"


@pytest.fixture
def company() -> Iterator[Company]:
    company = Company(host=SystemHost(), trace=Trace(), wake=lambda: None)
    yield company
    company.leave()


@pytest.fixture
def custody() -> Iterator[Custody]:
    with closing(Custody.create(whole_descriptor(0), earlier=None)) as custody:
        yield custody


def test_memory_can_be_lent_after_an_address_that_was_wrong(company: Company, custody: Custody) -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        company.lend(custody, NOT_OURS)
    assert company.replicas_held() == {}

    company.lend(custody, OURS)

    assert _url(company).startswith(f"http://{OURS}:")


@pytest.mark.parametrize("has_met", [False, True])
def test_a_life_that_could_not_listen_leaves_memory_that_the_next_attach_can_read(
    company: Company, custody: Custody, has_met: bool
) -> None:
    if has_met:
        company.begin(custody.life)
    wrong: dict[str, Any] = whole_descriptor(0)
    wrong["fellows"] |= {"address": NOT_OURS}
    with closing(Custody.create(wrong, earlier=None)) as other, pytest.raises(UsageError, match="cannot be reached"):
        company.begin(other.life)
    assert company.replicas_held() == {}

    company.lend(custody, OURS)
    assert _url(company).startswith(f"http://{OURS}:")
    assert company.begin(custody.life) == _url(company)


def _url(company: Company) -> str:
    peer = company.replicas_held()["peer"]
    assert isinstance(peer, dict)
    return str(peer["url"])
