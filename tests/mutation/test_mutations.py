"""Tests that cannot fail prove nothing: every planted defect is found, and the same tests pass without it."""

from __future__ import annotations

import pytest

from tests.mutation.mutations import MUTATIONS
from tests.support.mutant import Copy, Mutation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TESTS_FAILED = 1  # pytest's exit code; another one would mean that nothing was tested


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_defect_is_found(mutation: Mutation) -> None:
    with Copy() as copy:
        copy.apply(mutation)

        ended = copy.pytest(mutation.tests)

        assert ended.returncode == TESTS_FAILED, ended.stdout[-4000:] + ended.stderr[-2000:]
        found = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(f"{mutation.name}: {found[0] if found else ended.stdout[-300:]}")


def test_nothing_is_found_where_nothing_was_planted() -> None:
    with Copy() as copy:
        ended = copy.pytest(tuple(dict.fromkeys(test for mutation in MUTATIONS for test in mutation.tests)))

        assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
