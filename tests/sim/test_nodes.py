"""Several nodes under seeds: machines, processes, storage and the network fail, and every promise holds."""

from __future__ import annotations

import pytest

from tests.sim.seeds import find, keep_promises
from tests.sim.simulation import simulate
from tests.support.mutant import Mutation

SEEDS = 4
MORE_SEEDS = 504
SEARCHED = "0..399"


@pytest.mark.parametrize("is_partial", [False, True])
def test_every_promise_of_several_nodes_holds_whatever_fails(is_partial: bool) -> None:
    keep_promises(range(SEEDS), is_partial=is_partial, has_nodes=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_partial", [False, True])
@pytest.mark.parametrize("first", range(SEEDS, MORE_SEEDS, 100))
def test_every_promise_of_several_nodes_holds_whatever_fails_on_more_seeds(first: int, is_partial: bool) -> None:
    keep_promises(range(first, first + 100), is_partial=is_partial, has_nodes=True)


def test_a_seed_of_several_nodes_repeats_itself() -> None:
    first, second = simulate(3, has_nodes=True), simulate(3, has_nodes=True)
    assert first.digest == second.digest
    assert first.turns == second.turns


PLANTED = (
    Mutation(
        name="acknowledged-before-it-is-checked",
        file="moc/agent/guests.py",
        old="            try:\n                intake.check()\n",
        new="            try:\n                pass\n",
        tests=("replicas", "recovery"),
    ),
    Mutation(
        name="global-without-replicas",
        file="moc/agent/custody.py",
        old="        if self.life.hosts:\n            done",
        new="        if False:\n            done",
        tests=("replicas",),
    ),
    Mutation(
        name="the-only-replica-makes-room",
        file="moc/agent/guests.py",
        old="                if (held.step, held.attempt) != self._global:\n",
        new="                if True:\n",
        tests=("replicas",),
    ),
    Mutation(
        name="global-where-this-node-holds-it",
        file="moc/agent/custody.py",
        old="        seals = [*own, *others.seals]\n",
        new="        ranks, seals = self.life.ranks, [*own, *others.seals]\n",
        tests=("global",),
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mutation", PLANTED, ids=lambda mutation: mutation.name)
def test_a_planted_defect_of_several_nodes_is_found_and_named(mutation: Mutation) -> None:
    find(mutation, SEARCHED, "--nodes")


def test_a_planted_defect_of_several_nodes_is_found_in_the_first_seeds() -> None:
    find(PLANTED[1], "0..20", "--nodes")
