"""What is enumerated by default, and what when time is no object.

The default run has every crash and a power loss at every operation of every workflow; of what may survive that, every
other choice: nothing, all names without their bytes, what came last, and two at random. Of the errors, each of which
needs a run of its own, it takes one operation in `FILE_STRIDE` and one request in `STORE_STRIDE`, others for each kind
and workflow; of two disasters in a row those that begin where a dead process leaves most to its successor. The whole
run leaves nothing out.
"""

from __future__ import annotations

import errno
from typing import Protocol

from tests.enumeration.local import Instant, LocalRuns
from tests.enumeration.remote import RemoteRuns
from tests.enumeration.tally import Tally
from tests.enumeration.workflows import WORKFLOWS, Workflow
from tests.support.faulty_files import FaultKind
from tests.support.faulty_store import StoreFaultKind
from tests.support.model_disk import SURVIVALS

__all__ = ["FAMILIES", "run_all"]

FILE_STRIDE = 36
STORE_STRIDE = 6
LAYOUT_DEPTH = 3  # slashes in the path of a folder right below the repository
NAMING = frozenset({"rename", "link", "unlink"})
FILE_ERRORS: tuple[tuple[FaultKind, int, bool], ...] = (
    ("error", errno.EIO, False),
    ("error", errno.ENOSPC, True),
    ("error", errno.EINTR, True),
    ("applied", errno.EIO, False),
    ("dead", errno.EIO, False),
    ("stale", errno.EIO, False),
    ("short", errno.EIO, False),
)
"""Kind, errno, and whether only operations that change something fail in this way."""
STORE_ERRORS: tuple[tuple[StoreFaultKind, bool], ...] = (
    ("error", False),
    ("applied", False),
    ("dead", False),
    ("stale", False),
    ("late", False),
    ("error", True),
    ("applied", True),
    ("late", True),
)
"""Kind, and whether the store repeats what fails, as production does."""


class Family(Protocol):
    """One kind of disaster, enumerated over one workflow."""

    __name__: str

    def __call__(self, workflow: Workflow, tally: Tally, *, is_whole: bool) -> None: ...


def crashes(workflow: Workflow, tally: Tally, *, is_whole: bool) -> None:
    """Let the process die, or the power go, at every operation."""
    local = LocalRuns(tally)
    local.crash_everywhere(workflow, SURVIVALS if is_whole else SURVIVALS[::2])
    local.lose_every_subset(workflow, limit=8 if is_whole else 3)
    local.read_everywhere(workflow)


def double_crashes(workflow: Workflow, tally: Tally, *, is_whole: bool) -> None:
    """Let the process die, another go on, and the power go at every operation of the other."""
    LocalRuns(tally).crash_then_lose_power(workflow, is_chosen=(lambda _: True) if is_whole else _is_telling)


def errors(workflow: Workflow, tally: Tally, *, is_whole: bool) -> None:
    """Let operations of a filesystem fail."""
    for number, (kind, code, changes_only) in enumerate(FILE_ERRORS):
        chosen = _every(1 if is_whole else FILE_STRIDE, WORKFLOWS.index(workflow) + 3 * number)
        LocalRuns(tally).fail_everywhere(workflow, kind, code, changes_only=changes_only, chosen=chosen)


def object_store(workflow: Workflow, tally: Tally, *, is_whole: bool) -> None:
    """Let the process die at every request to an object store, and requests fail."""
    remote = RemoteRuns(tally)
    remote.crash_everywhere(workflow)
    for number, (kind, retries) in enumerate(STORE_ERRORS):
        chosen = _every(1 if is_whole else STORE_STRIDE, WORKFLOWS.index(workflow) + number)
        remote.fail_everywhere(workflow, kind, retries=retries, chosen=chosen)


FAMILIES: tuple[Family, ...] = (crashes, double_crashes, errors, object_store)


def run_all(tally: Tally, *, is_whole: bool) -> None:
    for family in FAMILIES:
        for workflow in WORKFLOWS:
            family(workflow, tally, is_whole=is_whole)


def _every(stride: int, first: int) -> slice:
    return slice(first % stride, None, stride)


def _is_telling(instant: Instant) -> bool:
    """Return whether a dead process leaves names of records or manifests, or a folder of the layout, unsynced here."""
    is_name = instant.name in NAMING and "/objects/" not in instant.where
    is_folder = instant.name == "make_directory" and instant.where.count("/") <= LAYOUT_DEPTH
    return instant.phase == "after" and (is_name or is_folder)
