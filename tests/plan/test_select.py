"""Which experts a checkpoint includes: the paper's figure, evenness, and that no expert is forgotten."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import UsageError
from moc.plan.balance import windows
from moc.plan.rotation import Rotation, even_rotation
from moc.plan.select import (
    Budget,
    DynamicK,
    History,
    LoadAware,
    Policy,
    SelectAll,
    Selection,
    Sequential,
    choose_k,
    commit_selection,
    fresh_history,
    select,
)
from moc.state import Expert


def chosen(selection: Selection, layers: int) -> list[tuple[int, ...]]:
    """Return the indices of each layer's experts."""
    return [tuple(e.index for e in selection.experts if e.layer == layer) for layer in range(layers)]


def orders(layers: int, experts: int) -> st.SearchStrategy[Rotation]:
    order = st.permutations(range(experts)).map(tuple)
    return st.tuples(*[order] * layers).map(lambda rows: Rotation(orders=rows))


def test_the_papers_figure_4_is_reproduced() -> None:
    rotation, history = even_rotation(4, 3, 3), fresh_history(4, 3)

    first = select(Sequential(1), history, rotation)
    second = select(Sequential(1), commit_selection(history, first), rotation)

    assert chosen(first, 4) == [(0,), (1,), (2,), (0,)]
    assert chosen(second, 4) == [(1,), (2,), (0,), (1,)]


def test_select_all_selects_all() -> None:
    selection = select(SelectAll(), fresh_history(2, 3), even_rotation(2, 3, 1))

    assert selection.experts == tuple(Expert(layer=layer, index=i) for layer in range(2) for i in range(3))
    assert selection.k == 3


@pytest.mark.parametrize(
    ("layers", "experts", "ep"), [(4, 3, 3), (12, 16, 8), (24, 64, 16), (5, 12, 4), (3, 8, 8), (7, 6, 1)]
)
def test_ranks_differ_by_at_most_one_expert_for_every_k_and_after_every_commit(
    layers: int, experts: int, ep: int
) -> None:
    rotation = even_rotation(layers, experts, ep)

    for k in range(1, experts + 1):
        for selected in windows(rotation, k):
            counts = selected.reshape(layers, ep, experts // ep).sum(axis=(0, 2))
            assert counts.max() - counts.min() <= 1
            assert (selected.sum(axis=1) == k).all()


@settings(max_examples=35, deadline=None)
@given(st.data())
def test_a_constant_k_goes_round_the_rotation(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    rotation, k = data.draw(orders(layers, experts)), data.draw(st.integers(1, experts))

    history = fresh_history(layers, experts)
    for expected in windows(rotation, k) * 2:
        selection = select(Sequential(k), history, rotation)
        history = commit_selection(history, selection)
        rows = [tuple(int(i) for i in row.nonzero()[0]) for row in expected]
        assert chosen(selection, layers) == rows


@settings(max_examples=35, deadline=None)
@given(st.data())
def test_every_expert_is_committed_within_n_over_k_commits_whatever_fails_and_however_k_changes(
    data: st.DataObject,
) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    history = fresh_history(layers, experts)
    commits: list[tuple[int, set[Expert]]] = []
    for _ in range(data.draw(st.integers(0, 30))):
        # A restart may bring another rotation, as on another number of ranks.
        rotation = (
            data.draw(orders(layers, experts))
            if data.draw(st.integers(0, 9)) == 0
            else even_rotation(layers, experts, 1)
        )
        k = data.draw(st.integers(1, experts))
        selection = select(Sequential(k), history, rotation)
        assert all(len(row) == k for row in chosen(selection, layers))
        if data.draw(st.booleans()):  # else the save fails, and the history stays
            history = commit_selection(history, selection)
            commits.append((k, set(selection.experts)))

    everything = {Expert(layer=layer, index=i) for layer in range(layers) for i in range(experts)}
    for begin in range(len(commits)):
        budgets = itertools.accumulate(k for k, _ in commits[begin:])
        length = next((n for n, total in enumerate(budgets, start=1) if total >= experts), None)
        if length is not None:
            assert set().union(*(held for _, held in commits[begin : begin + length])) == everything


@settings(max_examples=35, deadline=None)
@given(st.data())
def test_load_aware_takes_the_busiest_and_starves_nobody(data: st.DataObject) -> None:
    experts, turns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    k = data.draw(st.integers(1, experts))
    policy, rotation = LoadAware(k, turns=turns), even_rotation(1, experts, 1)
    patience = turns * -(-experts // k)

    history = fresh_history(1, experts)
    for _ in range(3 * patience):
        loads = [data.draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))]
        selection = select(policy, history, rotation, loads=loads)
        assert len(selection.experts) == k
        history = commit_selection(history, selection)
        assert all(history.commits - last < patience for last in history.last[0])


@pytest.mark.parametrize(
    ("experts", "k", "turns", "expected"),
    [
        (2, 1, 2, "0 0 0 1 0 0 0 1"),
        (3, 1, 2, "0 0 0 0 1 2 0 0 0 0 1 2"),
        (6, 2, 1, "01 23 45 01 23 45"),
        (6, 2, 3, "01 01 01 01 01 01 01 23 45 01"),
    ],
)
def test_load_aware_takes_those_without_tokens_when_their_deadline_needs_it_and_not_before(
    experts: int, k: int, turns: int, expected: str
) -> None:
    """The first K have all tokens: whenever nobody else must be taken, they are worth more."""
    rotation, history, taken = even_rotation(1, experts, 1), fresh_history(1, experts), []
    loads = [[9 if index < k else 0 for index in range(experts)]]
    for _ in expected.split():
        selection = select(LoadAware(k, turns=turns), history, rotation, loads=loads)
        taken.append("".join(str(expert.index) for expert in selection.experts))
        history = commit_selection(history, selection)

    assert " ".join(taken) == expected


def test_load_aware_without_need_takes_the_highest_loads() -> None:
    selection = select(LoadAware(2), fresh_history(1, 6), even_rotation(1, 6, 1), loads=[[5, 1, 9, 9, 0, 7]])

    assert chosen(selection, 1) == [(2, 3)]


def budget(*, plt: float = 0.0, faults: int = 0, step: int = 100) -> Budget:
    return Budget(plt=plt, faults=faults, step=step, interval=20)


def test_dynamic_k_is_the_smallest_that_the_budget_allows() -> None:
    """With 16 experts and commits every 20 steps a fault at K = 1, 2, 4, 8 loses 150, 70, 30, 10 steps."""
    policy = DynamicK(1, plt_limit=0.0375)

    assert choose_k(policy, budget(step=100), 16) == 1, "nothing was lost"
    assert choose_k(policy, budget(step=100, faults=3), 16) == 1, "nor by the faults"
    assert choose_k(policy, budget(step=8000, faults=1, plt=0.0187), 16) == 1, "and 150 steps / 8000 = 0.01875"
    assert choose_k(policy, budget(step=8000, faults=1, plt=0.0188), 16) == 2, "one more would be too much"
    assert choose_k(policy, budget(step=4000, faults=2, plt=0.0001), 16) == 2, "70 steps x 2 / 4000 = 0.035"
    assert choose_k(policy, budget(step=4000, faults=3, plt=0.0001), 16) == 4
    assert choose_k(policy, budget(step=4000, faults=6, plt=0.0001), 16) == 8
    assert choose_k(policy, budget(step=4000, faults=16, plt=0.0001), 16) == 16
    assert choose_k(policy, budget(step=10**6, faults=1, plt=0.0376), 16) == 16, "spent"


@given(
    st.integers(1, 64),
    st.integers(2, 64),
    st.floats(0, 0.2),
    st.integers(1, 200),
    st.integers(1, 100_000),
    st.integers(1, 200),
)
def test_dynamic_k_keeps_what_is_expected_within_the_limit_at_every_later_step(
    k: int, experts: int, plt: float, faults: int, step: int, interval: int
) -> None:
    """If faults go on at their rate so far, and each loses what the closed form says."""
    policy = DynamicK(min(k, experts), plt_limit=0.0375)

    chosen_k = choose_k(policy, Budget(plt=plt, faults=faults, step=step, interval=interval), experts)

    lost_steps = (experts / chosen_k - 1) / 2 * interval if plt else 0.0
    for later in (0, 1, interval, step, 10 * step, 1000 * step):
        expected = (plt * step + faults / step * later * lost_steps) / (step + later)
        assert expected <= max(plt, policy.plt_limit) * (1 + 1e-9), "no share above the limit, and none that grows"
    if plt <= policy.plt_limit:
        assert plt + lost_steps / step <= policy.plt_limit * (1 + 1e-9), "nor with a fault right now"
    else:
        assert chosen_k == experts


@given(
    st.integers(1, 64),
    st.integers(2, 64),
    st.floats(0, 0.2),
    st.integers(0, 50),
    st.integers(1, 100_000),
    st.integers(1, 200),
)
def test_dynamic_k_without_a_known_end_rises_with_losses_and_faults_and_falls_with_time(
    k: int, experts: int, plt: float, faults: int, step: int, interval: int
) -> None:
    policy = DynamicK(min(k, experts), plt_limit=0.0375)

    def at(*, plt: float = plt, faults: int = faults, step: int = step) -> int:
        return choose_k(policy, Budget(plt=plt, faults=faults, step=step, interval=interval), experts)

    assert at(plt=plt + 0.001) >= at()
    assert at(faults=faults + 1) >= at()
    if plt <= policy.plt_limit:
        lost = plt * step
        falling = [at(plt=lost / later, step=later) for later in (step, 2 * step, 8 * step, 4096 * step)]
        assert falling == sorted(falling, reverse=True)
        assert at(plt=lost / (step << 40), step=step << 40) == policy.k, (
            "a run that goes on without faults forgets them"
        )


def test_dynamic_k_goes_up_after_faults_and_down_in_between_and_no_fault_passes_the_limit() -> None:
    """A run of 64 experts that commits 4 of them every 10 steps, and loses at each fault what the closed form says."""
    policy, interval, experts = DynamicK(4, plt_limit=0.0375), 10, 64
    faulty, lost, faults = {3_000, 5_000, 5_500, 6_000, 30_000}, 0.0, 0
    history: dict[int, int] = {}
    for step in range(interval, 60_000, interval):
        budget = Budget(plt=lost / step, faults=faults, step=step, interval=interval)
        history[step] = choose_k(policy, budget, experts)
        if step in faulty:
            faults += 1
            lost += (experts / history[step] - 1) / 2 * interval
            assert lost / step <= policy.plt_limit
            assert history[step] < experts

    assert history[3_000] == 4, "before the first fault nothing is expected"
    assert history[6_010] > 4, "after some of them more is saved"
    assert history[29_990] == 4, "and less again once the run has gone on without"
    assert history[30_010] == history[59_990] == 4


def test_dynamic_k_selects_sequentially() -> None:
    rotation, history = even_rotation(1, 4, 1), fresh_history(1, 4)

    selection = select(DynamicK(1, plt_limit=0.0375), history, rotation, budget=budget(plt=1.0))

    assert selection == select(Sequential(4), history, rotation)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Sequential(0), "k=0 allowed=1..4"),
        (Sequential(5), "k=5 allowed=1..4"),
        (LoadAware(5), "k=5 allowed=1..4"),
        (LoadAware(1, turns=0), "turns=0"),
        (DynamicK(9, plt_limit=0.1), "k=9 allowed=1..4"),
        (DynamicK(1, plt_limit=0.0), "plt_limit=0.0"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(policy: Policy, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        select(policy, fresh_history(1, 4), even_rotation(1, 4, 1), loads=[[0] * 4], budget=budget())


def test_what_a_policy_needs_must_be_given() -> None:
    history, rotation = fresh_history(1, 4), even_rotation(1, 4, 1)

    with pytest.raises(UsageError, match="budget"):
        select(DynamicK(1, plt_limit=0.1), history, rotation)
    with pytest.raises(UsageError, match="one load per expert"):
        select(LoadAware(1), history, rotation, loads=[[1, 2]])
    with pytest.raises(UsageError, match="different models"):
        select(Sequential(1), history, even_rotation(2, 4, 1))
    with pytest.raises(UsageError, match="history of a layer is wrong"):
        History(commits=1, last=((0, 2),))
