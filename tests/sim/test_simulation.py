"""The whole system under seeds: every promise holds, every seed repeats itself, and planted defects are found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sim.seeds import find, keep_promises
from tests.sim.simulation import simulate
from tests.support.mutant import ROOT, Mutation

SEEDS, CHUNK = 125, 25
PARTIAL_SEEDS = 50
SEARCHED = "0..399"  # where a planted defect must show


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_promise_holds_whatever_fails(first: int) -> None:
    keep_promises(range(first, first + CHUNK))


@pytest.mark.parametrize("first", range(0, PARTIAL_SEEDS, CHUNK))
def test_every_promise_of_partial_checkpoints_holds_whatever_fails(first: int) -> None:
    keep_promises(range(first, first + CHUNK), is_partial=True)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(PARTIAL_SEEDS, 2050, 400))
def test_every_promise_of_partial_checkpoints_holds_whatever_fails_on_more_seeds(first: int) -> None:
    keep_promises(range(first, first + 400), is_partial=True)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SEEDS, 3000, 400))
def test_every_promise_holds_whatever_fails_on_more_seeds(first: int) -> None:
    keep_promises(range(first, first + 400))


def test_a_seed_repeats_itself() -> None:
    for seed in (2, 11, 23):
        first, second = simulate(seed), simulate(seed)
        assert first.digest == second.digest
        assert first.turns == second.turns


def test_a_seed_is_the_same_in_another_process_whatever_the_hash_seed() -> None:
    expected = simulate(7)
    for hash_seed in ("1", "2"):
        ended = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "7"],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"digest={expected.digest[:16]} turns={expected.turns} " in ended.stdout, ended.stdout[-2000:]


PLANTED = (
    Mutation(
        name="free-what-one-rank-has-passed",
        file="moc/plan/freeing.py",
        old="seal.moment in lost or (bool(complete) and seal.moment < complete[-1])",
        new="seal.moment in lost or seal.moment < newest_moments(seals, incarnation).get(seal.rank, seal.moment)",
        tests=("global",),
    ),
    Mutation(
        name="recover-by-the-highest-number",
        file="moc/plan/lineage.py",
        old="    admitted = [c for c in known if is_on_chain(links, c.incarnation, c.step, c.attempt)]\n",
        new="    return tuple(sorted(known, key=lambda c: (c.incarnation, c.step), reverse=True))\n",
        tests=("lineage", "recovery"),
    ),
    Mutation(
        name="delete-objects-before-their-manifest",
        file="moc/gc.py",
        old='        with self._trace.span("retention.condemn", objects=len(condemned - kept)):\n',
        new="        self._delete(sorted(condemned - kept))\n"
        '        with self._trace.span("retention.condemn", objects=len(condemned - kept)):\n',
        tests=("I2",),
    ),
    Mutation(
        name="manifest-before-the-objects",
        file="moc/agent/persister.py",
        old="        commit(repository, manifest, trace=self._trace)\n",
        new="        for row in manifest.objects:\n            repository.store.delete(row.key)\n"
        "        commit(repository, manifest, trace=self._trace)\n",
        tests=("I2", "I5"),
    ),
    Mutation(
        name="no-fence",
        file="moc/commit.py",
        old="    if newer:\n",
        new="    if False:\n",
        tests=("I5", "fence"),
    ),
    Mutation(
        name="source-not-kept-for-the-next-life",
        file="moc/agent/custody.py",
        old="            if key != source and key not in pinned:\n",
        new="            if key not in pinned:\n",
        tests=("recovery",),
    ),
    Mutation(
        name="a-life-without-a-heartbeat-is-hung",
        file="moc/holdings.py",
        old=" * 1e-9 or first_s\n",
        new=" * 1e-9\n",
        tests=("second job",),
    ),
    Mutation(
        name="dead-ranks-of-a-larger-life-count",
        file="moc/agent/server.py",
        old='        self._trainers.begin_life(message["incarnation"])\n',
        new="",
        tests=("second job",),
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", PLANTED, ids=lambda mutation: mutation.name)
def test_a_planted_defect_is_found_and_named(mutation: Mutation) -> None:
    find(mutation, SEARCHED)


def test_a_planted_defect_is_found_in_the_first_seeds() -> None:
    find(PLANTED[1], "0..60")


PLANTED_PARTIAL = (
    Mutation(
        name="the-newest-first",
        file="moc/plan/select.py",
        old="    return sorted(turned, key=lambda expert: last[expert])\n",
        new="    return sorted(turned, key=lambda expert: -last[expert])\n",
        tests=("turn",),
    ),
    Mutation(
        name="what-a-stale-expert-has-not-learned-is-forgotten",
        file="moc/routing.py",
        old="            rows[expert.layer][expert.index] = learned if is_possible else 0\n",
        new="            pass\n",
        tests=("PLT",),
    ),
    Mutation(
        name="a-kept-slot-gets-the-snapshots-step",
        file="moc/snapshot/snapshotter.py",
        old="            steps[~copied] = base.steps[~copied]\n",
        new="            steps[~copied] = step\n",
        tests=("content",),
    ),
    Mutation(
        name="experts-of-the-newest-life-alone",
        file="moc/plan/composition.py",
        old='        if piece != "d" and owner in sources:\n',
        new='        if piece != "d" and owner in sources and owner == max(sources):\n',
        tests=("I3",),
    ),
    Mutation(
        name="the-oldest-version-of-an-expert-is-chosen",
        file="moc/plan/versions.py",
        old="            (-layer[expert].step, number)\n",
        new="            (layer[expert].step, number)\n",
        tests=("age",),
    ),
    Mutation(
        name="experts-come-from-the-last-layer-of-all",
        file="moc/plan/versions.py",
        old="            chosen[expert] = min(usable)[1]\n",
        new="            chosen[expert] = max(number for _, number in usable)\n",
        tests=("age",),
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", PLANTED_PARTIAL, ids=lambda mutation: mutation.name)
def test_a_planted_defect_of_partial_checkpoints_is_found_and_named(mutation: Mutation) -> None:
    find(mutation, SEARCHED, "--partial")
