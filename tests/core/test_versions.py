"""From which layer each expert comes: every small case against its definition, and properties of the choice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.plan.lineage import MEMORY, PEERS, STORAGE, Candidate
from moc.plan.versions import (
    STORED_LAYERS,
    Choice,
    Inventory,
    Version,
    choose,
    consistent,
    expert_sizes,
    older_layers,
)
from moc.state import Expert
from tests.support.plain import PlainState

EXPERTS = tuple(Expert(layer=0, index=index) for index in range(3))
HOLDERS = ("newer", "older")
Steps = tuple[tuple[int, ...], tuple[int, ...]]
"""Of one expert, the steps of its slices: by layer (the newer snapshot, the older one) and rank."""


def _version(step: int, holder: str = "newer") -> Version:
    return Version(step=step, learned=10 * step, holder=holder)


def _cases(ranks: int) -> Iterator[tuple[Steps, tuple[bool, bool]]]:
    """Yield every state of one expert whose slices lie on all of `ranks`, and which of its two versions are bad."""
    newer = itertools.product(range(3), repeat=ranks)
    older = itertools.product(range(2), repeat=ranks)
    bad = itertools.product((False, True), repeat=2)
    yield from (((new, old), rotten) for new, old, rotten in itertools.product(newer, older, bad))


def _expected(steps: Steps, bad: Sequence[bool]) -> tuple[int, int] | None:
    """Return step and layer by the definition: all slices at one step, not bad, the newest, of these the first."""
    found = [(-slices[0], layer) for layer, slices in enumerate(steps) if len(set(slices)) == 1 and not bad[layer]]
    return (-min(found)[0], min(found)[1]) if found else None


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_expert_comes_from_its_newest_whole_version_that_is_not_bad(ranks: int) -> None:
    cases = list(_cases(ranks))
    # Every case once for each of three experts, beside other cases of the others.
    shuffled = [random.Random(seed).sample(cases, len(cases)) for seed in range(len(EXPERTS))]
    for states in zip(*shuffled, strict=True):
        layers = [
            consistent(
                {
                    expert: _version(steps[layer][rank], HOLDERS[layer])
                    for expert, (steps, _) in zip(EXPERTS, states, strict=True)
                }
                for rank in range(ranks)
            )
            for layer in range(2)
        ]
        bad = {
            (expert, HOLDERS[layer])
            for expert, (_, rotten) in zip(EXPERTS, states, strict=True)
            for layer in range(2)
            if rotten[layer]
        }

        choice = choose(EXPERTS, layers, bad)

        for expert, (steps, rotten) in zip(EXPERTS, states, strict=True):
            expected = _expected(steps, rotten)
            if expected is None:
                assert expert in choice.missing
                continue
            layer = choice.layers[expert]
            assert (layers[layer][expert].step, layer) == expected, (states, expert)
            assert layers[layer][expert].learned == 10 * expected[0]


def test_an_expert_of_which_one_rank_holds_nothing_is_whole_if_the_others_agree() -> None:
    first, second, _ = EXPERTS

    whole = consistent([{first: _version(3)}, {second: _version(2), first: _version(3)}, {second: _version(4)}, {}])

    assert whole == {first: _version(3)}


Slices = list[tuple[int, int, int]]
"""Of one expert in a snapshot, by rank that holds some of it: its elements, their step, whether the rank tells."""
slices = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=4)


def _told(snapshot: Sequence[Slices], holder: str) -> list[Inventory]:
    """Return what each rank tells of a snapshot: its slices, where its part is there."""
    return [
        {
            expert: Version(step=ranks[rank][1], learned=ranks[rank][1], holder=holder, elements=ranks[rank][0])
            for expert, ranks in zip(EXPERTS, snapshot, strict=True)
            if rank < len(ranks) and ranks[rank][2]
        }
        for rank in range(4)
    ]


@given(st.lists(st.tuples(slices, slices, slices), min_size=1, max_size=3), st.lists(st.integers(1, 3), min_size=3))
def test_with_parts_of_snapshots_lost_an_expert_is_only_taken_where_every_slice_of_it_is_there(
    snapshots: list[Sequence[Slices]], stored: list[int]
) -> None:
    checkpoint = {
        e: Version(step=step, learned=step, holder="storage") for e, step in zip(EXPERTS, stored, strict=False)
    }
    layers = [consistent([checkpoint], {})]
    for number, snapshot in enumerate(snapshots):
        sizes = {e: sum(row[0] for row in ranks) for e, ranks in zip(EXPERTS, snapshot, strict=True)}
        layers.append(consistent(_told(snapshot, str(number)), sizes))

    choice = choose(EXPERTS, layers, ())

    assert not choice.missing
    for place, expert in enumerate(EXPERTS):
        known = [(-stored[place], 0)]
        for number, snapshot in enumerate(snapshots, start=1):
            ranks = snapshot[place]
            if all(is_there for _, _, is_there in ranks) and len({step for _, step, _ in ranks}) == 1:
                known.append((-ranks[0][1], number))
        assert (-layers[choice.layers[expert]][expert].step, choice.layers[expert]) == min(known)


def test_slices_that_come_to_less_or_more_than_the_expert_are_not_the_expert() -> None:
    expert = EXPERTS[0]
    halves = [{expert: Version(step=3, learned=0, holder="a", elements=n)} for n in (4, 6)]

    assert list(consistent(halves, {expert: 10})) == [expert]
    assert consistent(halves, {expert: 11}) == {}
    assert consistent(halves, {expert: 9}) == {}
    assert consistent(halves, {}) == {}, "an expert that the model has not"
    assert consistent(halves[:1], {expert: 10}) == {}


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_an_expert_is_as_large_as_all_its_slices_on_whatever_number_of_ranks(size: int) -> None:
    sizes = expert_sizes(PlainState(rank, size, experts=3, expert_elements=61).catalog for rank in range(size))

    assert sizes == {Expert(layer=layer, index=index): 3 * 61 for layer in range(2) for index in range(3)}


def test_no_layer_is_of_a_life_that_grew_from_the_candidate() -> None:
    later = Candidate(source=MEMORY, run="run-7", incarnation=2, step=8, attempt="00abcdef")
    known = [later, _candidate(STORAGE, 8), _candidate(MEMORY, 7)]

    assert older_layers(known[1], known, snapshots=3) == (known[2],)


inventories: st.SearchStrategy[Inventory] = st.dictionaries(
    st.sampled_from(EXPERTS),
    st.builds(Version, step=st.integers(0, 4), learned=st.integers(0, 9), holder=st.sampled_from("abcd")),
)


@given(st.lists(inventories, max_size=5), st.sets(st.tuples(st.sampled_from(EXPERTS), st.sampled_from("abcd"))))
def test_a_bad_version_is_never_chosen_and_a_good_one_never_missed(
    layers: list[Inventory], bad: set[tuple[Expert, str]]
) -> None:
    choice = choose(EXPERTS, layers, bad)

    assert sorted([*choice.layers, *choice.missing]) == list(EXPERTS)
    for expert, number in choice.layers.items():
        assert (expert, layers[number][expert].holder) not in bad
    for expert in choice.missing:
        assert all((expert, layer[expert].holder) in bad for layer in layers if expert in layer)


@given(st.lists(inventories, min_size=1, max_size=5))
def test_more_layers_never_make_a_choice_older(layers: list[Inventory]) -> None:
    def step(choice: Choice, expert: Expert) -> int:
        return layers[choice.layers[expert]][expert].step if expert in choice.layers else -1

    fewer, more = choose(EXPERTS, layers[:-1], ()), choose(EXPERTS, layers, ())

    assert all(step(fewer, expert) <= step(more, expert) for expert in EXPERTS)


def _candidate(source: str, step: int) -> Candidate:
    return Candidate(source=source, run="run-7", incarnation=1, step=step, attempt="00abcdef")


def test_layers_are_older_and_snapshots_come_first_but_never_all_of_them() -> None:
    known = [
        _candidate(MEMORY, 9),
        _candidate(MEMORY, 8),
        _candidate(STORAGE, 8),
        _candidate(MEMORY, 7),
        _candidate(MEMORY, 6),
        _candidate(STORAGE, 4),
    ]

    assert older_layers(known[1], known, snapshots=1) == (known[3], known[2], known[5])
    assert older_layers(known[2], known, snapshots=2) == (known[1], known[3], known[5])
    assert older_layers(known[5], known, snapshots=2) == ()
    assert older_layers(known[0], known, snapshots=0) == (known[2], known[5])


def test_the_number_of_checkpoints_looked_at_is_bounded() -> None:
    known = [_candidate(STORAGE, step) for step in range(2 * STORED_LAYERS, 0, -1)]

    assert len(older_layers(known[0], known, snapshots=1)) == STORED_LAYERS


def test_of_slices_that_tell_different_counts_the_largest_is_what_the_expert_has_learned() -> None:
    """A rank that missed a snapshot does not know what the version of another one has learned, and tells 0."""
    slices = [{EXPERTS[0]: Version(step=5, learned=learned, holder="newer")} for learned in (0, 50, 0)]

    for told in itertools.permutations(slices):
        assert consistent(told)[EXPERTS[0]].learned == 50


def test_parts_that_peers_would_give_of_a_snapshot_that_is_here_are_no_layer_of_it() -> None:
    """Of one snapshot, what other nodes give is fetched into the memory that the snapshot itself is in."""
    fetched, here, older = _candidate(PEERS, 9), _candidate(MEMORY, 9), _candidate(MEMORY, 8)

    assert older_layers(fetched, [fetched, here, older], snapshots=2) == (older,)
    assert older_layers(_candidate(STORAGE, 9), [here, older], snapshots=2) == (here, older)
