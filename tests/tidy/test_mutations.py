"""Planted defects can still be planted: most of the tests that plant them are slow, and would be the last to notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.enumeration.mutations import MUTATIONS as OF_THE_ENUMERATION
from tests.mutation.mutations import MUTATIONS as OF_SINGLE_TESTS
from tests.sim.test_nodes import PLANTED as OF_SEVERAL_NODES
from tests.sim.test_simulation import PLANTED as OF_THE_SIMULATION
from tests.sim.test_simulation import PLANTED_PARTIAL as OF_PARTIAL_CHECKPOINTS
from tests.support.mutant import Mutation

ROOT = Path(__file__).resolve().parents[2]


OF_SEEDS = (*OF_THE_SIMULATION, *OF_PARTIAL_CHECKPOINTS, *OF_SEVERAL_NODES)


@pytest.mark.parametrize(
    "mutation", [*OF_THE_ENUMERATION, *OF_SINGLE_TESTS, *OF_SEEDS], ids=lambda mutation: mutation.name
)
def test_what_a_defect_replaces_stands_exactly_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
