"""Wherever a snapshot's way to another node breaks: nothing half is held, and what was acknowledged is there."""

from __future__ import annotations

import pytest

from tests.enumeration.replication import DELIVERIES, Way, deliver_everywhere
from tests.enumeration.tally import Tally

by_way = pytest.mark.parametrize("way", DELIVERIES, ids=lambda way: way.name.replace(" ", "-"))
FEWEST_CASES = 100
STRIDE = 13  # of the cases; prime, so that no kind of operation is always left out


@pytest.mark.parametrize("way", DELIVERIES[1::2], ids=lambda way: way.name.replace(" ", "-"))
def test_nothing_acknowledged_is_lost_and_nothing_half_is_held(way: Way) -> None:
    tally = Tally()

    deliver_everywhere(way, tally, stride=STRIDE)

    assert tally.total >= FEWEST_CASES // STRIDE


@pytest.mark.slow
@by_way
def test_nothing_acknowledged_is_lost_and_nothing_half_is_held_in_every_case(way: Way) -> None:
    tally = Tally()

    deliver_everywhere(way, tally)

    print(tally.table())
    assert tally.total > FEWEST_CASES
