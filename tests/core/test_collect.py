"""What a collection takes for left over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moc.collect import collect
from moc.format.manifest import Incarnation, Parent
from moc.host import SystemHost
from moc.repository import Repository
from moc.store.memory import MemoryStore
from moc.trace import Trace

HOUR_S, DAY_S = 3600.0, 86400.0
LIFE = Incarnation(run="run-7", number=1, token="0" * 8, parent=None, reason="start", fingerprint={})
REWIND = replace(LIFE, number=2, reason="rewind", parent=Parent(incarnation=1, step=5, attempt="00abcdef"))


class UploadingStore(MemoryStore):
    """A remote store with an upload under way that began so long ago."""

    def __init__(self, age_s: float) -> None:
        super().__init__()
        self._age_s = age_s

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        return int(self._age_s > older_than_s)


@pytest.mark.parametrize(
    ("lives", "age_s", "swept"),
    [((LIFE,), 2 * HOUR_S, 0), ((LIFE,), 2 * DAY_S, 1), ((LIFE, REWIND), 2 * HOUR_S, 1)],
    ids=["a slow upload of a living life", "an old one", "of a fenced life"],
)
def test_an_upload_under_way_is_not_swept(lives: tuple[Incarnation, ...], age_s: float, swept: int) -> None:
    repository = Repository(UploadingStore(age_s))
    repository.create()
    for life in lives:
        repository.put_incarnation(life)

    report = collect(
        repository,
        with_off_lineage=False,
        settle_s=0.0,
        host=SystemHost(),
        trace=Trace(),
        on_wait=lambda _seconds: None,
    )
    assert report.temporary_files == swept
    repository.close()
