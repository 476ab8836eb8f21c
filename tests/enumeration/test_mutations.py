"""An enumeration that cannot fail proves nothing: it finds every planted defect, and names the case."""

from __future__ import annotations

import pytest

from tests.enumeration.mutations import MUTATIONS
from tests.support.mutant import Copy, Mutation

IN_THE_DEFAULT_SUITE = ("a file is not synced", "a delete is not synced")


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(
            mutation, id=mutation.name, marks=() if mutation.name in IN_THE_DEFAULT_SUITE else pytest.mark.slow
        )
        for mutation in MUTATIONS
    ],
)
def test_the_enumeration_finds_a_planted_defect(mutation: Mutation) -> None:
    with Copy() as copy:
        copy.apply(mutation)

        ended = copy.pytest(mutation.tests)

        assert ended.returncode == 1, ended.stdout[-4000:] + ended.stderr[-2000:]
        lines = [line.removeprefix("E").strip() for line in ended.stdout.splitlines() if line.startswith("E  ")]
        named = [line for line in lines if "CaseError" in line] or lines  # what reads only has no cases to name
        assert named, f"nothing says what went wrong:\n{ended.stdout[-4000:]}"
        print(f"{mutation.name}: {named[0][:400]}")
