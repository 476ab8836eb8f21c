"""Which candidate is restored where experts are stale: the limit of lost tokens, what was asked for, and mode full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest

from moc.config import Config
from moc.errors import NoCheckpointError
from moc.format.keys import manifest_key
from moc.format.manifest import Incarnation, Parent
from moc.host import SystemHost
from moc.plan.lineage import PEERS, Candidate, Link
from moc.plan.versions import expert_sizes
from moc.restoration import Restored, restore_best
from moc.state import Expert
from moc.store.port import Store
from moc.survey import Origin, Request
from moc.trace import Trace
from tests.support.forge import forge_record
from tests.support.history import RUN, History, every_rank, plain
from tests.support.plain import PlainState

A = Expert(layer=0, index=0)
LENDERS = {  # of a run whose agent is not there
    "members": [{"run": RUN, "incarnation": 1, "node": 0, "nodes": 2, "secret": "", "url": "http://127.0.0.1:1"}],
    "places": [[1, 4, "00000002", rank, 0, True] for rank in (0, 1)],
}
START = Incarnation(run=RUN, number=1, token="0" * 8, parent=None, reason="start")


class StoredHost(SystemHost):
    """A host whose only storage is that of a history."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def open_store(self, url: str, *, trace: Trace | None = None) -> Store:
        return _Shared(self._store)  # type: ignore[return-value]


class _Shared:
    """A store that others use too, so closing it closes nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def close(self) -> None:
        """The history closes it."""


@pytest.fixture
def history() -> Iterator[History]:
    made = History(2)
    yield made
    made.close()


def recover(
    history: History,
    candidates: Sequence[Candidate],
    *,
    mode: str = "partial",
    plt_limit: float = 0.0375,
    restore: str | int = "auto",
    lineage: Sequence[Incarnation] = (START,),
    lenders: Mapping[str, object] | None = None,
) -> Restored | None:
    """Restore on all ranks; fails unless all restored the same, and the dense masters are of its step."""
    request = Request(
        storage="unused",
        config=Config(mode=mode, plt_limit=plt_limit),
        restore=restore,
        run_id=None,
        take_over=False,
        on_mismatch=(),
        runtime_root=None,
        agent_idle_s=1.0,
        fingerprint={"model": "plain"},
    )
    origin = Origin(
        run=RUN,
        number=2,
        token="1" * 8,
        lineage=tuple(lineage),
        links=(Link(incarnation=1, last_step=None),),
        candidates=tuple(candidates),
        layers=tuple(candidates),
        notes=(),
        is_stored=True,
        lenders=lenders or {},
    )
    wanted = [c for c in candidates if not isinstance(restore, int) or c.step == restore]

    def act(world) -> tuple[Restored | None, PlainState]:  # type: ignore[no-untyped-def]
        state = plain(world.rank, 2)
        host = StoredHost(history.store)
        terms = {"sizes": expert_sizes(history.arena.catalogs), "software": {"worker": "1"}}
        return restore_best(request, origin, wanted, state, world, **terms, host=host, trace=Trace()), state

    outcomes = every_rank(2, act)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    (first, _), (second, _) = outcomes  # type: ignore[misc]
    assert first == second
    for rank, (restored, state) in enumerate(outcomes):  # type: ignore[misc]
        if restored is not None:
            dense = next(i for i, s in enumerate(state.needed) if s.expert is None and s.part == "master")
            expected = history.undisturbed.at(restored.candidate.step, rank)[dense]
            assert state.values[dense].tobytes() == expected.tobytes()
    return first


def stored(history: History) -> list[Candidate]:
    """Return a whole checkpoint of step 2 and two that write one expert each, of steps 6 and 9, newest first."""
    history.seal(2)
    whole = history.store_checkpoint(2)
    history.seal(6)
    middle = history.store_checkpoint(6, base=2, written=[A])
    history.seal(9)
    return [history.store_checkpoint(9, base=6, written=[]), middle, whole]


def test_a_stale_checkpoint_below_the_limit_is_restored_and_its_losses_are_counted(history: History) -> None:
    restored = recover(history, stored(history), plt_limit=1.0)

    assert restored is not None
    assert restored.candidate.step == 9
    assert {row.expert: row.step for row in restored.stale}[A] == 6
    assert restored.routing is not None
    assert 0 < restored.routing.plt < 1
    assert restored.notes == ()


def test_above_the_limit_the_newest_checkpoint_without_stale_experts_is_preferred_and_it_says_so(
    history: History,
) -> None:
    restored = recover(history, stored(history))

    assert restored is not None
    assert restored.candidate.step == 2
    assert restored.stale == ()
    assert restored.routing is not None
    assert restored.routing.plt == 0
    assert [r.candidate.split()[1] for r in restored.rejected] == ["step=9", "step=6"]
    assert "plt_limit=0.0375" in restored.rejected[0].reason
    assert any("plt_limit" in note and "step=9" in note for note in restored.notes)


def test_replicas_that_the_agent_does_not_fetch_are_passed_over_for_storage(history: History) -> None:
    """Whatever its reason is: it refuses for as long as a trainer lives that cannot be killed."""
    history.seal(2)
    stored_one = history.store_checkpoint(2)
    replicated = replace(stored_one, source=PEERS, step=4)

    restored = recover(history, [replicated, stored_one], mode="full", lenders=LENDERS)

    assert restored is not None
    assert restored.candidate == stored_one
    assert "replicas cannot be had" in restored.rejected[0].reason


def test_above_the_limit_the_newest_is_restored_where_nothing_whole_can_be(history: History) -> None:
    candidates = stored(history)
    history.store.delete(next(row.key for row in history.manifests[2].objects if row.key.endswith("-d.safetensors")))

    restored = recover(history, candidates)

    assert restored is not None
    assert restored.candidate.step == 9
    assert restored.stale
    assert any("nothing without stale experts" in note for note in restored.notes)


def test_above_the_limit_nothing_older_than_the_oldest_stale_expert_is_gone_back_to(history: History) -> None:
    """Every part of the state would lose more than the expert that loses most."""
    history.seal(2)
    whole = history.store_checkpoint(2)
    others = [expert for expert in history.grid if expert != A]
    history.seal(5)
    history.store_checkpoint(5, base=2, written=[A])
    history.seal(6)
    history.store_checkpoint(6, base=5, written=others)
    history.seal(9)
    newest = history.store_checkpoint(9, base=6, written=[])

    restored = recover(history, [newest, whole])

    assert restored is not None
    assert restored.candidate == newest
    assert {row.step for row in restored.stale} == {5, 6}
    assert any("nothing without stale experts" in note and "step=5" in note for note in restored.notes)


def test_a_step_that_was_asked_for_is_restored_whatever_is_lost(history: History) -> None:
    candidates = stored(history)

    restored = recover(history, candidates, restore=9)
    assert restored is not None
    assert restored.candidate.step == 9

    target = candidates[0]
    parent = Parent(incarnation=1, step=target.step, attempt=target.attempt)
    rewind = replace(START, number=2, parent=parent, reason="rewind")
    restored = recover(history, candidates, lineage=(START, rewind))
    assert restored is not None
    assert restored.candidate.step == 9


def test_weights_of_a_stale_checkpoint_are_restored_with_a_list_of_stale_experts(history: History) -> None:
    restored = recover(history, stored(history), restore="weights")

    assert restored is not None
    assert restored.candidate.step == 9
    assert restored.stale
    assert restored.routing is None


def test_mode_full_passes_over_a_checkpoint_with_a_bad_expert_and_takes_a_stale_one_as_it_is(history: History) -> None:
    candidates = stored(history)
    restored = recover(history, candidates, mode="full")
    assert restored is not None
    assert restored.candidate.step == 9
    assert restored.stale
    history.flip_object(6, 0, A)  # both newer checkpoints have it from there

    restored = recover(history, candidates, mode="full")

    assert restored is not None
    assert restored.candidate.step == 2
    assert len(restored.rejected) == 2
    history.flip_object(2, 0, A)
    with pytest.raises(NoCheckpointError):
        recover(history, candidates, mode="full")


def test_a_partial_mode_takes_a_bad_expert_from_the_checkpoint_before(history: History) -> None:
    candidates = stored(history)
    history.flip_object(6, 0, A)

    restored = recover(history, candidates, plt_limit=1.0)

    assert restored is not None
    assert restored.candidate.step == 9
    assert {row.step for row in restored.stale} == {2}
    assert restored.rejected == ()


def test_a_checkpoint_of_another_experiment_lends_no_expert(history: History) -> None:
    candidates = stored(history)
    history.flip_object(6, 0, A)
    forge_record(history.store, manifest_key(history.manifests[2].name), _change_model)

    with pytest.raises(NoCheckpointError, match="no whole version"):
        recover(history, candidates, plt_limit=1.0, restore=9)


def _change_model(body: dict[str, object]) -> None:
    body["fingerprint"] = {"model": "another"}
