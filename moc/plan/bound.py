"""Lower bounds of what the fullest rank must carry, whatever the selection: proofs to compare plans with.

Ranks of one column are bins; every checkpoint puts the slices of K experts per layer into them. A size T is impossible
if the slices do not fit into bins of size T, which dual feasible functions prove: such a function f maps sizes so that
whatever fits into a bin of T has images that add up to at most 1, so slices whose images add up to more than the
number of bins do not fit. With f(x) = floor((k + 1) x / T) / k this says, for slices of one size, that 24 of them on 16
ranks make one rank carry two. The identity gives the mean. For each layer the K slots with the smallest images are
counted, so the bound holds for every selection.

A turn knows more: if nobody waits longer than ceil(N / K) checkpoints, every rank puts all its slices into so many
bins. One checkpoint alone can be even where a turn cannot: whoever owns 22 whole experts and four quarters carries two
wholes in one of 16 checkpoints, although the mean is 1.4. Integers only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from moc.plan.ownership import Ints, Ownership

__all__ = ["lower_bound", "turn_bound"]

FUNCTIONS = 32  # k of the functions: from here on they improve on the mean by less than 1/32
SEARCH_LIMIT_CELLS = 50_000  # beyond this many slices only the means are used, which is quick and still a bound
IMPOSSIBLE = 1 << 32  # the image of a slice larger than a bin: above the images that all bins together can hold


def lower_bound(ownership: Ownership, k: int, *, base: Ints | None = None) -> int:
    """Return the least size of the fullest rank when K experts of every layer are selected, in elements.

    `base` is what each profile's ranks carry anyway, in elements; for ranks that differ, the least of them.
    """
    slices = ownership.slices
    fixed = np.zeros(len(slices), dtype=np.int64) if base is None else base
    count = np.bincount(ownership.profile, minlength=len(slices))
    bound = _mean_bound(slices, count, fixed, ownership.ep, k)
    if slices.size > SEARCH_LIMIT_CELLS:
        return bound
    for order in range(1, FUNCTIONS + 1):
        bound = _least_possible(partial(_is_impossible, slices, count, fixed, ownership.ep, k, order), bound)
    return bound


def turn_bound(ownership: Ownership, k: int, *, base: Ints | None = None) -> int:
    """Return the least size of the fullest rank of the fullest checkpoint, if any ceil(experts / K) checkpoints in a
    row hold every expert, in elements.
    """
    turn = -(-ownership.experts // k)
    slices = ownership.slices.reshape(len(ownership.slices), -1)
    fixed = np.zeros(len(slices), dtype=np.int64) if base is None else base
    bound = int((-(-slices.sum(axis=1) // turn) + fixed).max())
    if slices.size > SEARCH_LIMIT_CELLS:
        return bound
    for order in range(1, FUNCTIONS + 1):
        bound = _least_possible(partial(_does_turn_overflow, slices, fixed, turn, order), bound)
    return bound


def _least_possible(is_impossible: Callable[[int], bool], start: int) -> int:
    """Return the least size from `start` on that is not proven impossible."""
    below, above, step = start - 1, start, 1
    while is_impossible(above):
        below, above = above, above + step
        step *= 2
    while above - below > 1:
        middle = (below + above) // 2
        if is_impossible(middle):
            below = middle
        else:
            above = middle
    return above


def _does_turn_overflow(slices: Ints, fixed: Ints, turn: int, order: int, size: int) -> bool:
    """Return whether the function of this order proves that some rank's slices do not fit into a turn of such bins."""
    room = size - fixed
    if (room <= 0).any():
        return bool(((room < 0) | ((room == 0) & (slices.sum(axis=1) > 0))).any())
    return bool((_images(slices, room[:, None], order).sum(axis=1) > turn * order * (order + 1)).any())


def _images(slices: Ints, room: Ints, order: int) -> Ints:
    """Return the images of slices in bins of `room`, scaled so that a bin holds order * (order + 1).

    f(x) = x where (order + 1) x / T is an integer.
    """
    whole, rest = np.divmod((order + 1) * slices, room)
    image = np.where(rest == 0, whole * order, whole * (order + 1))
    return np.asarray(np.where(slices > room, IMPOSSIBLE, image), dtype=np.int64)


def _mean_bound(slices: Ints, count: Ints, fixed: Ints, ep: int, k: int) -> int:
    """Return the larger of the mean over all ranks and the largest mean over the ranks of one column, rounded up."""
    total = int(_least((slices * count[:, None, None]).sum(axis=0), ep, k)) + ep * int((fixed * count).sum())
    columns = _least(slices, ep, k) + ep * fixed
    return max(-(-total // (ep * int(count.sum()))), -(-int(columns.max()) // ep))


def _is_impossible(slices: Ints, count: Ints, fixed: Ints, ep: int, k: int, order: int, size: int) -> bool:
    """Return whether the function of this order proves that no selection fits into bins of this size."""
    room = size - fixed
    if (room <= 0).any():
        return bool(((room < 0) | ((room == 0) & (_least(slices, ep, k) > 0))).any())
    image = _images(slices, room[:, None, None], order)
    bin_size = order * (order + 1)
    if (_least(image, ep, k) > ep * bin_size).any():
        return True
    return int(_least((image * count[:, None, None]).sum(axis=0), ep, k)) > ep * int(count.sum()) * bin_size


def _least(values: Ints, ep: int, k: int) -> Ints:
    """Return the least sum of K slots in each layer, where a local expert's value counts once per EP rank.

    The last two axes are layers and local experts; the sum runs over both.
    """
    ascending = np.sort(values, axis=-1)
    whole, rest = divmod(k, ep)
    total: Ints = ascending[..., :whole].sum(axis=-1) * ep
    if rest:
        total = total + ascending[..., whole] * rest
    return np.asarray(total.sum(axis=-1), dtype=np.int64)
