"""A state put together from several layers: exact versions bit by bit, exact losses, for every rank alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.assembly import Assembled, Terms, TooStale, assemble
from moc.errors import IntegrityError, MocError, ShardCorruptError, StoreUnavailableError
from moc.held import MemorySource, held_parts
from moc.host import SystemHost
from moc.layers import Layers, Open, WithheldError
from moc.plan.lineage import MEMORY, Candidate
from moc.plan.versions import expert_sizes
from moc.recover import Source
from moc.state import Expert
from moc.trace import Trace
from tests.support.history import EXPERTS, LAYERS, History, Undisturbed, every_rank, plain, routes
from tests.support.plain import PlainState

GRID = [Expert(layer=layer, index=index) for layer in range(LAYERS) for index in range(EXPERTS)]
A, B, C = Expert(layer=0, index=0), Expert(layer=0, index=2), Expert(layer=1, index=1)
PARTIAL = Terms(parts=None, has_layers=True, is_whole=False, plt_limit=None, answers=None)
FULL = Terms(parts=None, has_layers=False, is_whole=False, plt_limit=None, answers=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an assembly came to on every rank, and the states it filled."""

    assembled: list[Assembled]
    states: list[PlainState]


@pytest.fixture
def history() -> Iterator[History]:
    made = History(2)
    yield made
    made.close()


def run(
    history: History,
    layers: Sequence[Candidate],
    terms: Terms = PARTIAL,
    *,
    size: int | None = None,
    opener: Callable[[int], Open] | None = None,
    is_storage_away: bool = False,
) -> list[tuple[Assembled | TooStale, PlainState] | BaseException]:
    """Assemble the first of these layers on every rank of a new life."""
    size = size or history.size
    sizes = expert_sizes(plain(rank, size).catalog for rank in range(size)) if terms.has_layers else None

    def act(world) -> tuple[Assembled | TooStale, PlainState]:  # type: ignore[no-untyped-def]
        state = plain(world.rank, size)
        open_layer = (opener or history.opener)(world.rank)
        with Layers(layers[0], layers[1:], open_layer, world, sizes=sizes, is_storage_away=is_storage_away) as opened:
            return assemble(opened, state, world, terms, host=SystemHost(), trace=Trace()), state

    return every_rank(size, act)


def good(
    history: History,
    layers: Sequence[Candidate],
    terms: Terms = PARTIAL,
    *,
    size: int | None = None,
    opener: Callable[[int], Open] | None = None,
) -> Outcome:
    """Assemble; fail unless every rank has succeeded, and all say the same."""
    assembled, states = [], []
    for outcome in run(history, layers, terms, size=size, opener=opener):
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome[0], Assembled), outcome[0]
        assembled.append(outcome[0])
        states.append(outcome[1])
    facts = [(one.experts, one.stale, one.layers, one.lost, one.routing, one.notes) for one in assembled]
    assert all(fact == facts[0] for fact in facts)
    return Outcome(assembled, states)


def failed(outcomes: Sequence[object]) -> MocError:
    """Return the error that every rank raised; fails unless they are the same."""
    assert all(isinstance(outcome, MocError) for outcome in outcomes), outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1, outcomes
    (first, *_) = outcomes
    assert isinstance(first, MocError)
    return first


def holds(outcome: Outcome, step: int, versions: Mapping[Expert, int]) -> None:
    """Fail unless every byte is of `step`, of these experts of their own, and the losses are those of the formula."""
    size = len(outcome.states)
    undisturbed = Undisturbed(size)
    for rank, state in enumerate(outcome.states):
        for shard, value in zip(state.needed, state.values, strict=True):
            wanted = step if shard.expert is None else versions.get(shard.expert, step)
            index = state.needed.index(shard)
            assert value.tobytes() == undisturbed.at(wanted, rank)[index].tobytes(), (rank, shard.name, wanted)
    first = outcome.assembled[0]
    assert {row.expert: row.step for row in first.stale} == {e: s for e, s in versions.items() if s < step}
    if first.routing is not None:
        lost = [0] * LAYERS
        for expert, version in versions.items():
            lost[expert.layer] += routes(expert, step) - routes(expert, version)
        assert first.lost == tuple(lost)
        totals = [sum(routes(e, step) for e in GRID if e.layer == layer) for layer in range(LAYERS)]
        assert first.routing.plt == pytest.approx(sum(n / t for n, t in zip(lost, totals, strict=True)) / LAYERS)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_whole_snapshot_is_taken_as_it_is(history: History, size: int) -> None:
    newest = history.seal(9)
    older = history.seal(8)

    outcome = good(history, [newest, older], size=size)

    holds(outcome, 9, {})
    assert outcome.assembled[0].notes == ()


def test_an_expert_whose_ranks_differ_comes_from_the_snapshot_before() -> None:
    history = History(4)  # experts with an even index are on ranks 0 and 2
    older = history.seal(8, {(rank, C): 6 for rank in range(4)})
    newest = history.seal(9, {(2, A): 7, **{(rank, C): 6 for rank in range(4)}})

    outcome = good(history, [newest, older])

    holds(outcome, 9, {A: 8, C: 6})
    assert outcome.assembled[0].layers == (older,)
    history.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_expert_that_memory_has_in_no_version_comes_from_storage_whatever_the_number_of_ranks(size: int) -> None:
    history = History(4)
    history.seal(4)
    stored = history.store_checkpoint(4)
    newest = history.seal(9, {(0, A): 7, (1, C): 8, (3, C): 8})

    outcome = good(history, [newest, stored], size=size)

    holds(outcome, 9, {A: 4, C: 8})
    assert outcome.assembled[0].layers == ()
    assert (
        "checkpoint" in str(outcome.assembled[0].stale[0].source) or "storage" in outcome.assembled[0].stale[0].source
    )
    history.close()


def test_a_flipped_bit_costs_its_expert_and_nothing_else_on_all_ranks() -> None:
    history = History(4)
    older = history.seal(8)
    newest = history.seal(9)
    history.flip(9, 2, B)  # rank 0 has read its own half by then

    outcome = good(history, [newest, older])

    holds(outcome, 9, {B: 8})
    assert any("checksum" in note for note in outcome.assembled[0].notes)
    history.close()


def test_flipped_bits_in_layer_after_layer_are_met_one_after_the_other(history: History) -> None:
    history.seal(3)
    oldest = history.store_checkpoint(3)
    history.seal(6)
    stored = history.store_checkpoint(6)
    older, newest = history.seal(8), history.seal(9)
    for step, rank, expert in ((9, 0, A), (8, 0, A), (9, 1, C)):
        history.flip(step, rank, expert)
    history.flip_object(6, 0, A)

    outcome = good(history, [newest, older, stored, oldest])

    holds(outcome, 9, {A: 3, C: 8})


def test_a_checkpoint_with_shared_objects_is_restored_with_its_stale_experts(history: History) -> None:
    history.seal(2)
    history.store_checkpoint(2)
    history.seal(6, {(0, B): 5})
    history.store_checkpoint(6, base=2, written=[A, B])
    history.seal(9)
    stored = history.store_checkpoint(9, base=6, written=[C])

    outcome = good(history, [stored], FULL)

    holds(outcome, 9, {A: 6, B: 5, **{e: 2 for e in GRID if e not in (A, B, C)}})


def test_of_a_checkpoint_with_stale_experts_those_before_it_are_not_opened(history: History) -> None:
    """They have no expert any newer: each would cost every rank a manifest and its headers."""
    history.seal(2)
    base = history.store_checkpoint(2)
    history.seal(5)
    stored = history.store_checkpoint(5, base=2, written=[history.grid[0]])
    opened: list[Candidate] = []

    def opener(rank: int) -> Open:
        def open_layer(candidate: Candidate) -> tuple[Source, Callable[[], None]]:
            opened.append(candidate)
            return history.opener(rank)(candidate)

        return open_layer

    outcome = good(history, [stored, base], opener=opener)

    holds(outcome, 5, dict.fromkeys(history.grid[1:], 2))
    assert set(opened) == {stored}


def test_what_memory_has_newer_than_a_checkpoint_is_taken_from_memory(history: History) -> None:
    history.seal(2)
    base = history.store_checkpoint(2)
    snapshot = history.seal(8, {(0, A): 1})
    history.seal(9)
    stored = history.store_checkpoint(9, base=2, written=[C])

    outcome = good(history, [stored, snapshot, base])

    holds(outcome, 9, {**{e: 8 for e in GRID if e != C}, A: 2})
    assert outcome.assembled[0].layers == (snapshot,)


def test_a_checkpoint_of_a_later_snapshot_of_the_step_outlives_its_memory_and_has_what_the_earlier_one_left_behind(
    history: History,
) -> None:
    earlier = History(2)
    snapshot = replace(earlier.seal(9, {(rank, A): 6 for rank in range(2)}), attempt="00000001")
    before = earlier.seal(8)
    history.seal(9)
    again = history.store_checkpoint(9)

    def opener(rank: int) -> Open:
        memory, storage = earlier.opener(rank), history.opener(rank)
        return lambda candidate: (memory if candidate.source == MEMORY else storage)(candidate)

    outcome = good(history, [snapshot, before, again], opener=opener)

    holds(outcome, 9, {})
    assert outcome.assembled[0].stale == ()
    earlier.close()


@pytest.mark.parametrize("damage", ["flipped", "dropped"])
def test_a_bad_or_missing_object_costs_the_experts_in_it(history: History, damage: str) -> None:
    history.seal(2)
    base = history.store_checkpoint(2)
    history.seal(6)
    middle = history.store_checkpoint(6, base=2, written=[A, C])
    history.seal(9)
    stored = history.store_checkpoint(9, base=6, written=[B])
    if damage == "flipped":
        history.flip_object(6, 0, A)
    else:
        history.store.delete(history.object_row(6, 0).key)

    outcome = good(history, [stored, middle, base])

    # Expert A was rank 0's in step 6, C rank 1's.
    holds(outcome, 9, {A: 2, C: 6, **{e: 2 for e in GRID if e not in (A, B, C)}})


def test_a_bad_version_is_not_read_again_from_every_checkpoint_that_shares_it(history: History) -> None:
    history.seal(1)
    stored = [history.store_checkpoint(1)]
    history.seal(2)
    stored.append(history.store_checkpoint(2, base=1, written=[A]))
    history.seal(3)
    stored.append(history.store_checkpoint(3, base=2, written=[B]))
    history.seal(4)
    stored.append(history.store_checkpoint(4, base=3, written=[C]))
    history.flip_object(2, 0, A)
    reads: list[Candidate] = []

    def opener(rank: int) -> Open:
        def open_source(candidate: Candidate) -> tuple[Source, Callable[[], None]]:
            reads.append(candidate)
            return history.opener(rank)(candidate)

        return open_source

    outcomes = run(history, stored[::-1], opener=opener)

    assert all(not isinstance(outcome, BaseException) for outcome in outcomes), outcomes
    (first, _) = outcomes[0]  # type: ignore[misc]
    assert isinstance(first, Assembled)
    assert {row.expert: row.step for row in first.stale}[A] == 1
    assert len([note for note in first.notes if "not usable" in note]) == 1


def test_mode_full_takes_no_older_version(history: History) -> None:
    older, newest = history.seal(8), history.seal(9)
    history.flip(9, 1, C)

    error = failed(run(history, [newest], FULL))

    assert isinstance(error, ShardCorruptError)
    assert "candidate=memory step=9" in str(error)
    holds(good(history, [older], FULL), 8, {})


def test_a_bad_dense_piece_rejects_the_candidate_in_every_mode(history: History) -> None:
    older, newest = history.seal(8), history.seal(9)
    history.flip(9, 1, None)

    assert isinstance(failed(run(history, [newest, older])), ShardCorruptError)


def test_an_expert_without_any_whole_version_rejects_the_candidate_and_names_it() -> None:
    history = History(4)
    newest = history.seal(9, {(0, B): 7})

    error = failed(run(history, [newest]))

    assert isinstance(error, ShardCorruptError)
    assert "layer=0 expert=2" in str(error)
    assert isinstance(failed(run(history, [newest], is_storage_away=True)), WithheldError)
    history.close()


class _Withheld:
    """A source whose objects storage does not give."""

    def __init__(self, source: Source, is_held: Callable[[str], bool]) -> None:
        self._source, self._is_held = source, is_held

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def read(self, row):  # type: ignore[no-untyped-def]
        if self._is_held(row.holder):
            raise StoreUnavailableError(f"no answer: key={row.holder}")
        return self._source.read(row)


def test_what_storage_withholds_is_passed_over_only_where_it_answers_otherwise(history: History) -> None:
    history.seal(2)
    base = history.store_checkpoint(2)
    history.seal(6)
    stored = history.store_checkpoint(6, base=2, written=[A])
    key = history.object_row(6, 0).key

    def opener(rank: int) -> Open:
        def open_source(candidate: Candidate) -> tuple[Source, Callable[[], None]]:
            source, close = history.opener(rank)(candidate)
            return _Withheld(source, key.__eq__), close  # type: ignore[return-value]

        return open_source

    def terms(answers: Callable[[], bool] | None) -> Terms:
        return Terms(parts=None, has_layers=True, is_whole=False, plt_limit=None, answers=answers)

    for refusal in (None, lambda: False):
        assert isinstance(failed(run(history, [stored, base], terms(refusal), opener=opener)), WithheldError)
    (first, _) = run(history, [stored, base], terms(lambda: True), opener=opener)[0]  # type: ignore[misc]
    assert isinstance(first, Assembled)
    assert {row.step for row in first.stale} == {2}
    assert len(first.stale) == len(GRID)


def left_of(history: History, lost: Collection[int]) -> Callable[[int], Open]:
    """Return how ranks open layers when the nodes of some ranks have lost their memory."""

    def opener(rank: int) -> Open:
        def open_source(candidate: Candidate) -> tuple[Source | None, Callable[[], None]]:
            if candidate.source != MEMORY:
                return history.opener(rank)(candidate)
            records = {r: record for r, record in history.records[candidate.step].items() if r not in lost}
            return (None if rank in lost else MemorySource(held_parts(history.arena, records))), lambda: None

        return open_source

    return opener


@pytest.mark.parametrize("lost", [(), (1,), (1, 3), (2,), (0, 1), (0, 1, 2), (0, 1, 2, 3)])
def test_with_a_node_lost_experts_come_from_memory_where_all_their_slices_are_left(lost: tuple[int, ...]) -> None:
    history = History(4)  # experts with an even index are on ranks 0 and 2, the others on 1 and 3
    history.seal(2)
    base = history.store_checkpoint(2)
    older = history.seal(6)
    snapshot = history.seal(9, {(rank, B): 8 for rank in range(4)} | {(0, A): 5})
    stored = history.store_checkpoint(9, base=2, written=[C])

    outcome = good(history, [stored, snapshot, older, base], opener=left_of(history, lost))

    versions = {e: 2 for e in GRID if e != C}
    if not {0, 2} & set(lost):
        versions |= {e: 9 for e in GRID if e.index % 2 == 0} | {B: 8, A: 6}
    if not {1, 3} & set(lost):
        versions |= {e: 9 for e in GRID if e.index % 2}
    holds(outcome, 9, versions)
    for row in outcome.assembled[0].experts:
        step = versions.get(row.expert, 9)
        assert (row.level, row.step) == ("storage" if step == 2 or row.expert == C else "memory", step)
    history.close()


@settings(max_examples=12, deadline=None)
@given(
    st.sets(st.integers(0, 3)),
    st.dictionaries(st.tuples(st.integers(0, 3), st.sampled_from(GRID)), st.sampled_from([5, 7, 8]), max_size=12),
    st.sets(st.sampled_from(GRID)),
)
def test_whatever_is_lost_every_byte_is_of_the_version_that_is_told(
    lost: set[int], torn: dict[tuple[int, Expert], int], written: set[Expert]
) -> None:
    history = History(4)
    history.seal(4)
    base = history.store_checkpoint(4)
    snapshot = history.seal(9, torn)
    fit = {
        e: {torn.get((rank, e), 9) for rank in range(4) if rank % 2 == e.index % 2} for e in GRID
    }  # by expert the steps of its slices
    stored = history.store_checkpoint(9, base=4, written=[e for e in written if fit[e] == {9}])

    outcome = good(history, [stored, snapshot, base], opener=left_of(history, lost))

    versions = {}
    for expert in GRID:
        is_left = not {rank for rank in lost if rank % 2 == expert.index % 2}
        in_storage = 9 if expert in written and fit[expert] == {9} else 4
        versions[expert] = max(in_storage, *fit[expert]) if is_left and len(fit[expert]) == 1 else in_storage
    holds(outcome, 9, versions)
    history.close()


def test_a_node_that_has_nothing_and_needs_what_another_one_has_goes_to_storage(history: History) -> None:
    history.seal(2)
    base = history.store_checkpoint(2)
    snapshot = history.seal(9)
    stored = history.store_checkpoint(9, base=2, written=[C])

    def opener(rank: int) -> Open:
        def open_source(candidate: Candidate) -> tuple[Source | None, Callable[[], None]]:
            if candidate.source != MEMORY or rank == 0:  # which has the parts of both ranks
                return history.opener(0)(candidate)
            return None, lambda: None

        return open_source

    outcome = good(history, [stored, snapshot, base], opener=opener)

    # Rank 1's slices are told by nobody: its part is where it cannot be read.
    holds(outcome, 9, {e: 9 if e.index % 2 == 0 or e == C else 2 for e in GRID})


def test_too_many_lost_tokens_are_refused_before_a_byte_is_read(history: History) -> None:
    history.seal(2)
    history.store_checkpoint(2)
    history.seal(9)
    stored = history.store_checkpoint(9, base=2, written=[C])
    plt = good(history, [stored], FULL).assembled[0].routing
    assert plt is not None

    for limit, is_accepted in ((plt.plt * 0.999, False), (plt.plt * 1.001, True)):
        terms = Terms(parts=None, has_layers=True, is_whole=False, plt_limit=limit, answers=None)
        outcomes = run(history, [stored], terms)
        for outcome in outcomes:
            assert not isinstance(outcome, BaseException)
            assert isinstance(outcome[0], Assembled) == is_accepted
    whole = Terms(parts=None, has_layers=False, is_whole=True, plt_limit=None, answers=None)
    assert all(isinstance(outcome[0], TooStale) for outcome in run(history, [stored], whole))  # type: ignore[index]


def test_only_weights_are_restored_where_only_they_are_wanted(history: History) -> None:
    older, newest = history.seal(8), history.seal(9)
    history.flip(9, 0, A)
    terms = Terms(parts=("master",), has_layers=True, is_whole=False, plt_limit=None, answers=None)

    outcomes = run(history, [newest, older], terms)

    for rank, outcome in enumerate(outcomes):
        assert not isinstance(outcome, BaseException), outcome
        assembled, state = outcome
        assert isinstance(assembled, Assembled)
        assert assembled.tree is None
        for index, shard in enumerate(state.needed):
            # The flipped bit is in exp_avg, the first part of the unit: nobody has read it.
            step = 9 if shard.part == "master" else 0
            assert state.values[index].tobytes() == history.undisturbed.at(step, rank)[index].tobytes()


def test_without_counts_nothing_is_said_of_losses() -> None:
    history = History(2, is_counted=False)
    older, newest = history.seal(8), history.seal(9)
    history.flip(9, 0, A)

    outcome = good(history, [newest, older])

    holds(outcome, 9, {A: 8})
    assert outcome.assembled[0].routing is None
    assert outcome.assembled[0].lost == ()
    history.close()


def test_a_checkpoint_is_restored_whatever_it_says_of_what_was_counted_before_counting_began_anew(
    history: History,
) -> None:
    history.seal(6)
    history.store_checkpoint(6)
    history.counted_from = 7
    history.seal(9)
    stored = history.store_checkpoint(9, base=6, written=[C])  # its rows of stale experts have the former counts

    outcome = good(history, [stored], FULL)

    assert {row.expert for row in outcome.assembled[0].stale} == {e for e in GRID if e != C}
    routing = outcome.assembled[0].routing
    assert routing is not None
    assert routing.learned == tuple(
        tuple(2 * 12 if Expert(layer=layer, index=index) == C else 0 for index in range(EXPERTS))
        for layer in range(LAYERS)
    )


def test_a_layer_that_cannot_be_opened_by_one_rank_is_none_for_all(history: History) -> None:
    history.seal(3)
    oldest = history.store_checkpoint(3)
    older, newest = history.seal(8), history.seal(9)
    history.flip(9, 0, A)

    def opener(rank: int) -> Open:
        def open_source(candidate: Candidate) -> tuple[Source, Callable[[], None]]:
            if rank == 1 and candidate == older:
                raise IntegrityError("seal is gone")
            return history.opener(rank)(candidate)

        return open_source

    outcomes = run(history, [newest, older, oldest], opener=opener)

    for outcome in outcomes:
        assert not isinstance(outcome, BaseException), outcome
        assert isinstance(outcome[0], Assembled)
        assert {row.expert: row.step for row in outcome[0].stale} == {A: 3}


def test_storage_that_could_only_improve_on_memory_need_not_answer(history: History) -> None:
    history.seal(9)
    twin = history.store_checkpoint(9)
    older, newest = history.seal(8), Candidate(source="memory", run="run-7", incarnation=1, step=9, attempt="00000009")
    history.flip(9, 0, A)

    def opener(rank: int) -> Open:
        def open_source(candidate: Candidate) -> tuple[Source, Callable[[], None]]:
            if candidate == twin:
                raise StoreUnavailableError("no answer")
            return history.opener(rank)(candidate)

        return open_source

    layers = [newest, older, twin]
    assert isinstance(failed(run(history, layers, opener=opener)), WithheldError), "another try may find it"
    last = Terms(parts=None, has_layers=True, is_whole=False, plt_limit=None, answers=lambda: False)
    for outcome in run(history, layers, last, opener=opener):
        assert not isinstance(outcome, BaseException), outcome
        assert isinstance(outcome[0], Assembled)
        assert {row.expert: row.step for row in outcome[0].stale} == {A: 8}
    holds(good(history, layers), 9, {})  # it answers: the twin has the expert as it was


@dataclass(frozen=True, slots=True)
class Damage:
    """What has happened to one expert: which of its slices are older in the snapshots, which versions are rotten."""

    torn: tuple[int, ...]  # of the newest snapshot's two slices and the older one's two: 0 means the snapshot's step
    rotten: tuple[bool, bool, bool, bool]  # in the newest snapshot, the older one, checkpoint 5, checkpoint 2
    is_written: bool  # by checkpoint 5


damages = st.builds(
    Damage,
    torn=st.tuples(*[st.sampled_from([0, 0, 6, 7])] * 4),
    rotten=st.tuples(*[st.sampled_from([False, False, True])] * 4),
    is_written=st.booleans(),
)


def _expected_step(damage: Damage) -> int | None:
    """Return the newest step at which some layer has the expert whole and right."""
    newest, older = {step or 9 for step in damage.torn[:2]}, {step or 8 for step in damage.torn[2:]}
    versions = [
        (max(newest), len(newest) == 1 and not damage.rotten[0]),
        (max(older), len(older) == 1 and not damage.rotten[1]),
        (5, damage.is_written and not damage.rotten[2]),
        (2, not damage.rotten[3]),
    ]
    return max((step for step, is_good in versions if is_good), default=None)


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[damages] * len(GRID)))
def test_whatever_happens_every_expert_comes_from_its_newest_good_version(all_damages: tuple[Damage, ...]) -> None:
    history = History(4)
    try:
        happened = dict(zip(GRID, all_damages, strict=True))
        owners = {expert: (expert.index % 2, expert.index % 2 + 2) for expert in GRID}
        for step in (2, 5):
            history.seal(step)
        stored = [
            history.store_checkpoint(2),
            history.store_checkpoint(5, base=2, written=[e for e in GRID if happened[e].is_written]),
        ]
        snapshots = []
        for place, step in ((2, 8), (0, 9)):
            versions = {
                (owners[expert][slice_], expert): damage.torn[place + slice_] or step
                for expert, damage in happened.items()
                for slice_ in range(2)
            }
            snapshots.append(history.seal(step, versions))
        for expert, damage in happened.items():
            rank = owners[expert][expert.layer]
            for step, is_rotten in zip((9, 8), damage.rotten[:2], strict=True):
                if is_rotten:
                    history.flip(step, rank, expert)
            if damage.rotten[2] and damage.is_written:
                history.flip_object(5, rank, expert)
            if damage.rotten[3]:
                history.flip_object(2, rank, expert)
        expected = {expert: _expected_step(damage) for expert, damage in happened.items()}

        layers = [*snapshots[::-1], *stored[::-1]]
        if None in expected.values():
            assert isinstance(failed(run(history, layers)), ShardCorruptError)
        else:
            holds(good(history, layers), 9, {expert: step for expert, step in expected.items() if step is not None})
    finally:
        history.close()
