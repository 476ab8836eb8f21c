"""Running seeds as a test: every promise holds on them, or one that a planted defect breaks is named."""

from __future__ import annotations

from tests.sim.simulation import simulate
from tests.support.mutant import Copy, Mutation

__all__ = ["find", "keep_promises"]


def keep_promises(seeds: range, *, is_partial: bool = False, has_nodes: bool = False) -> None:
    for seed in seeds:
        report = simulate(seed, is_partial=is_partial, has_nodes=has_nodes)
        options = " --partial" * is_partial + " --nodes" * has_nodes
        words = f"replay: python -m tests.sim --seed {seed} --trace{options}"
        assert not report.violations, "\n".join((words, *report.log, *report.violations))


def find(mutation: Mutation, seeds: str, *options: str) -> None:
    """Run seeds of a mutated copy until one fails; `mutation.tests` are the promises that may be named."""
    with Copy() as copy:
        copy.apply(mutation)

        ended = copy.python("-m", "tests.sim", "--seeds", seeds, "--first", *options)

        assert ended.returncode == 1, ended.stdout[-3000:] + ended.stderr[-3000:]
        assert any(f"{promise}: " in ended.stdout for promise in mutation.tests), ended.stdout[-3000:]
