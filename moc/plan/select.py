"""Which experts a checkpoint includes: policies, what was committed so far, and the decision.

What was committed is a `History`: for each expert the number of the commit that last held it. Nothing else counts, so a
failed save changes nothing, a restart goes on where the last commit was, and K may change at any time: a sequential
selection takes, in each layer, the K experts whose last commit is oldest. Any commits whose K add up to the number of
experts hold every expert, whatever happened between them. Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from moc.errors import UsageError
from moc.plan.rotation import Rotation
from moc.state import Expert

__all__ = [
    "Budget",
    "DynamicK",
    "History",
    "LoadAware",
    "Policy",
    "SelectAll",
    "Selection",
    "Sequential",
    "choose_k",
    "commit_selection",
    "fresh_history",
    "select",
]


@dataclass(frozen=True, slots=True)
class SelectAll:
    """Every expert, every time."""


@dataclass(frozen=True, slots=True)
class Sequential:
    """K experts per layer in the order of the rotation."""

    k: int


@dataclass(frozen=True, slots=True)
class LoadAware:
    """The K experts per layer with the most tokens since their last commit.

    None waits longer than `turns` * ceil(experts / K) commits while K stays: deadlines are met with the K in force, and
    one that falls later may come too late for a few.
    """

    k: int
    turns: int = 2


@dataclass(frozen=True, slots=True)
class DynamicK:
    """Sequential, with the smallest of `k`, 2 `k`, 4 `k`, ... that is expected to keep the share of lost tokens within
    `plt_limit`.
    """

    k: int
    plt_limit: float


Policy = SelectAll | Sequential | LoadAware | DynamicK


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """`last[layer][expert]` is the number of the commit that last held the expert, from 1; 0 if none did."""

    commits: int
    last: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, row in enumerate(self.last):
            if not row or min(row) < 0 or max(row) > self.commits:
                raise UsageError(f"history of a layer is wrong: layer={layer} last={row} allowed=0..{self.commits}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The experts of one checkpoint, sorted; `k` is their number per layer, where so many could be taken."""

    experts: tuple[Expert, ...]
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the run has lost, and what tells how much it will lose.

    `plt` is the share of tokens lost by `step`, `faults` how often the run has gone on from storage by then, `interval`
    the number of steps between two commits.
    """

    plt: float
    faults: int
    step: int
    interval: int


def fresh_history(layers: int, experts: int) -> History:
    """Return the history of a run without commits."""
    return History(commits=0, last=((0,) * experts,) * layers)


def commit_selection(history: History, selection: Selection) -> History:
    """Return the history after the selection was committed."""
    rows = [list(row) for row in history.last]
    for expert in selection.experts:
        rows[expert.layer][expert.index] = history.commits + 1
    return replace(history, commits=history.commits + 1, last=tuple(tuple(row) for row in rows))


def select(
    policy: Policy,
    history: History,
    rotation: Rotation,
    *,
    loads: Sequence[Sequence[int]] | None = None,
    budget: Budget | None = None,
    among: Collection[Expert] | None = None,
) -> Selection:
    """Return what the next checkpoint includes.

    `loads` counts each expert's tokens since its last commit, equal on all ranks (LoadAware); `budget` is for DynamicK.
    Only experts `among` these are taken (None: of all). Raises UsageError for a K outside 1..experts and for a missing
    or ill-shaped argument.
    """
    experts = len(history.last[0]) if history.last else 0
    if [len(row) for row in history.last] != [len(order) for order in rotation.orders]:
        raise UsageError("history and rotation belong to different models")
    queues = [
        [index for index in _oldest_first(last, order) if among is None or Expert(layer=layer, index=index) in among]
        for layer, (last, order) in enumerate(zip(history.last, rotation.orders, strict=True))
    ]
    match policy:
        case SelectAll():
            return _selection(queues, experts)
        case Sequential():
            return _sequential(history, queues, policy.k)
        case DynamicK():
            if budget is None:
                raise UsageError("DynamicK needs a budget")
            return _sequential(history, queues, choose_k(policy, budget, experts))
        case LoadAware():
            if loads is None or [len(row) for row in loads] != [len(row) for row in history.last]:
                raise UsageError("LoadAware needs one load per expert of every layer")
            return _load_aware(policy, history, queues, loads)


def choose_k(policy: DynamicK, budget: Budget, experts: int) -> int:
    """Return the K that DynamicK uses now.

    K rises with what faults have lost and with their rate, and falls while the run goes on without any. If nothing
    suffices, all experts are saved.
    """
    _check_k(policy.k, experts)
    if not 0 < policy.plt_limit <= 1:
        raise UsageError(f"limit of lost tokens is out of range: plt_limit={policy.plt_limit} allowed=0 < x <= 1")
    k = policy.k
    while k < experts:
        lost_steps = (
            (experts / k - 1) / 2 * budget.interval
        )  # by one fault, of the mean expert: equation 7, closed form
        if _worst_share(budget, lost_steps) <= policy.plt_limit:
            return k
        k = min(2 * k, experts)
    return experts


def _worst_share(budget: Budget, lost_steps: float) -> float:
    """Return the largest share of tokens that is expected to be lost, now or later, if a fault loses so many steps.

    Faults are assumed to go on at their rate so far, and one to come now. How long the run will be is not known, and
    need not be: what is expected at any later step lies between the share lost so far and the one that each further
    step loses, so both must be within the limit, and the first with one more fault. As long as nothing was lost nothing
    is expected: what goes on from storage may have been ended well.
    """
    if budget.plt == 0 or budget.faults == 0:
        return budget.plt
    done = max(1, budget.step)
    return max(budget.plt + lost_steps / done, budget.faults * lost_steps / done)


def _sequential(history: History, queues: Sequence[Sequence[int]], k: int) -> Selection:
    for last in history.last:
        _check_k(k, len(last))
    return _selection([queue[:k] for queue in queues], k)


def _oldest_first(last: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return the experts of a layer, those with the oldest commit first.

    Experts of one commit follow the rotation, from the first of the oldest on: so a K that does not divide the number
    of experts goes round the circle as one that does.
    """
    count = len(order)
    oldest = min(last)
    is_oldest = [last[expert] == oldest for expert in order]
    start = next((p for p in range(count) if is_oldest[p] and not is_oldest[p - 1]), 0)
    turned = [order[(start + step) % count] for step in range(count)]
    return sorted(turned, key=lambda expert: last[expert])


def _load_aware(
    policy: LoadAware, history: History, queues: Sequence[Sequence[int]], loads: Sequence[Sequence[int]]
) -> Selection:
    if policy.turns < 1:
        raise UsageError(f"bound of starvation is out of range: turns={policy.turns} allowed=at least 1")
    rows = []
    for last, queue, load in zip(history.last, queues, loads, strict=True):
        _check_k(policy.k, len(last))
        patience = policy.turns * -(-len(last) // policy.k)
        left = [last[expert] + patience - history.commits for expert in queue]
        due = _due_now(left, policy.k)
        place = {expert: position for position, expert in enumerate(queue)}
        busiest = sorted(queue[due:], key=lambda expert: (-load[expert], place[expert]))
        rows.append([*queue[:due], *busiest[: policy.k - due]])
    return _selection(rows, policy.k)


def _due_now(left: Sequence[int], k: int) -> int:
    """Return how many of the oldest experts must be taken now so that all can still meet their deadlines.

    `left` are the commits each may still wait, ascending, the present one included: the first n + 1 experts need
    `left[n] - 1` later commits of K to hold all but those taken now.
    """
    return min(k, max([0, *(n + 1 - k * (max(1, wait) - 1) for n, wait in enumerate(left))]))


def _selection(rows: Sequence[Sequence[int]], k: int) -> Selection:
    experts = tuple(Expert(layer=layer, index=index) for layer, row in enumerate(rows) for index in sorted(row))
    return Selection(experts=experts, k=k)


def _check_k(k: int, experts: int) -> None:
    if not 1 <= k <= experts:
        raise UsageError(f"number of experts to save is out of range: k={k} allowed=1..{experts}")
