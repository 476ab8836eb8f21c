"""Whatever dies, fails or loses power at whichever operation: nothing announced is lost, nothing half is recovered."""

from __future__ import annotations

import pytest

from tests.enumeration.catalogue import FAMILIES, Family
from tests.enumeration.local import instants, run_into_crash
from tests.enumeration.tally import Tally
from tests.enumeration.workflows import WORKFLOWS, Workflow

by_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name.replace(" ", "-"))
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)

LONG = (("errors", "collection"), ("double_crashes", "sweep"))  # in the whole run only
QUICK = (  # of the jobs whose checkpoints share experts, or on two nodes; the others are in the whole run only
    ("crashes", "partial retention over lives"),
    ("crashes", "partial rewind"),
    ("object_store", "partial retention over lives"),
    ("crashes", "joint first save"),
)
quick = pytest.mark.parametrize(
    ("family", "workflow"),
    [
        pytest.param(family, workflow, id=f"{family.__name__}-{workflow.name.replace(' ', '-')}")
        for family in FAMILIES
        for workflow in WORKFLOWS
        if (family.__name__, workflow.name) not in LONG
        and (not workflow.name.startswith(("partial", "joint")) or (family.__name__, workflow.name) in QUICK)
    ],
)

FEWEST_CASES = 10  # fewer mean that a workflow has not run


@quick
def test_every_promise_is_kept(family: Family, workflow: Workflow) -> None:
    tally = Tally()

    family(workflow, tally, is_whole=False)

    assert tally.total > FEWEST_CASES
    assert tally.judged > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@by_workflow
@by_family
def test_every_promise_is_kept_in_every_case(family: Family, workflow: Workflow) -> None:
    tally = Tally()

    family(workflow, tally, is_whole=True)

    print(tally.table())
    assert tally.total > FEWEST_CASES


@pytest.mark.parametrize(
    "workflow",
    [workflow for workflow in WORKFLOWS if not workflow.name.startswith("joint")],
    ids=lambda workflow: workflow.name.replace(" ", "-"),
)
def test_a_process_that_really_dies_leaves_the_disk_that_was_looked_at(workflow: Workflow) -> None:
    # The crashes above are looks at an undisturbed run: a dead process must not have done anything else.
    looked_at = [instant for instant in instants(workflow) if instant.phase == "before"]

    for instant in looked_at[:: max(1, len(looked_at) // 5)]:
        disk = run_into_crash(workflow, instant.number)

        assert disk.picture(is_durable=True) == instant.disk.picture(is_durable=True), instant.where
