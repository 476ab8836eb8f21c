"""Repairs a division of experts into checkpoints where some rank carries more than the goal.

What ranks carry beyond the goal, squared and summed, is the *excess*. Two kinds of moves lower it: exchanges between
two ranks and two layers, as long as one helps, and swaps of two experts of a layer, which may also make things worse
for a while (a tabu search). Everything is deterministic, and bounded by the number of moves.
"""

from __future__ import annotations

import numpy as np

from moc.plan.ownership import Ints

__all__ = ["repaired"]

MOVE_LIMIT = 300
WORK_LIMIT_CELLS = 20_000_000  # what the moves may look at, about half a second: fewer moves for larger maps
EXCHANGE_LIMIT_TRIES = 60  # partners tried for the most helpful exchanges of a rank
TENURE_SWAPS = 12  # how long a swapped expert stays where it is, so that the search does not undo itself

Place = tuple[int, int, int]


def repaired(units: Ints, phase: Ints, phases: int, target: int) -> Ints:
    """Return the best assignment that was found on the way.

    `units` is by layer, local expert and profile, `phase` by layer, EP rank and local expert.
    """
    search = _Repair(units, phase, phases, target)
    best, lowest = search.phase.copy(), search.worst()
    per_rank = len(phase) * phase.shape[2] // phases + 1
    cells_per_move = per_rank * max(phase[0].size, phase[:, 0].size) * units.shape[2]
    for move in range(1, min(MOVE_LIMIT, WORK_LIMIT_CELLS // cells_per_move) + 1):
        if not (search.exchange_once() or search.swap_once(move)):
            break
        if search.worst() < lowest:
            best, lowest = search.phase.copy(), search.worst()
    return np.asarray(best, dtype=np.int64)


class _Repair:
    """The state of the tabu search: phases of experts, loads of ranks by phase, and what exceeds the target."""

    def __init__(self, units: Ints, phase: Ints, phases: int, target: int) -> None:
        self.phase = phase.copy()
        self._units = units
        self._target = target
        layers, ep, _ = phase.shape
        self._held = np.zeros(phase.shape, dtype=np.int64)
        self._ranks = np.arange(ep)[:, None]
        self._loads = np.zeros((phases, ep, units.shape[2]), dtype=np.int64)
        for layer in range(layers):
            np.add.at(self._loads, (phase[layer], np.broadcast_to(self._ranks, phase[layer].shape)), units[layer][None])
        self._excess = self._over(self._loads)
        self._least = int(self._excess.sum())

    def worst(self) -> int:
        return int(self._loads.max())

    def _over(self, loads: Ints) -> Ints:
        return np.asarray((np.maximum(loads - self._target, 0) ** 2).sum(axis=-1), dtype=np.int64)

    def exchange_once(self) -> bool:
        """Let two experts of the fullest rank change phases, and two of another rank in return.

        Both layers and both ranks keep their numbers in both phases, so this gathers what must be together, such as
        experts that a border cuts, which no single swap can without making a rank worse on the way. Return False if no
        such exchange lowers the excess.
        """
        number, rank = divmod(int(self._excess.argmax()), self._excess.shape[1])
        if self._excess[number, rank] == 0:
            return False
        layer, local = np.nonzero(self.phase[:, rank] == number)
        mine = self._own_changes(number, rank, layer, local)
        for index in np.argsort(mine, axis=None, kind="stable")[:EXCHANGE_LIMIT_TRIES].tolist():
            first, other_layer, other_local = (int(i) for i in np.unravel_index(index, mine.shape))
            gain = int(mine[first, other_layer, other_local])
            if gain >= 0:
                return False
            give = (int(layer[first]), rank, int(local[first]))
            if self._return_exchange(give, (other_layer, rank, other_local), gain):
                return True
        return False

    def _own_changes(self, number: int, rank: int, layer: Ints, local: Ints) -> Ints:
        """Return the change of a rank's excess if an expert of this phase and any other of the rank change phases."""
        loads, over = self._loads[:, rank], self._over
        out, back = self._units[layer, local][:, None, None, :], self._units[None]
        other = self.phase[:, rank][None]
        change = over(loads[number] - out + back) - self._excess[number, rank]
        change += over(loads[other] + out - back) - self._excess[other, rank]
        is_possible = (other != number) & (np.arange(len(self._units))[None, :, None] != layer[:, None, None])
        return np.where(is_possible, change, 0)

    def _return_exchange(self, give: Place, take: Place, gain: int) -> bool:
        """Make the exchange if another rank can make the opposite one without losing the gain."""
        old, new = int(self.phase[give]), int(self.phase[take])
        is_back, is_out = self.phase[give[0]] == new, self.phase[take[0]] == old  # by EP rank and local expert
        swing = self._units[give[0]][None, :, None, :] - self._units[take[0]][None, None, :, :]
        loads, excess = self._loads, self._excess
        change = self._over(loads[old][:, None, None] + swing) - excess[old][:, None, None]
        change += self._over(loads[new][:, None, None] - swing) - excess[new][:, None, None]
        is_possible = is_back[:, :, None] & is_out[:, None, :]
        is_possible[give[1]] = False
        change = np.where(is_possible, change, np.iinfo(np.int64).max)
        best = np.unravel_index(int(change.argmin()), change.shape)
        if not is_possible[best] or gain + change[best] >= 0:
            return False
        rank = int(best[0])
        for place, phase in (
            (give, new),
            (take, old),
            ((give[0], rank, int(best[1])), old),
            ((take[0], rank, int(best[2])), new),
        ):
            self._move(place, phase)
        self._least = min(self._least, int(self._excess.sum()))
        return True

    def swap_once(self, now: int) -> bool:
        """Make the best swap for the rank that exceeds the target most; return False if there is nothing to do."""
        number, rank = divmod(int(self._excess.argmax()), self._excess.shape[1])
        if self._excess[number, rank] == 0:
            return False
        layer, local = np.nonzero(self.phase[:, rank] == number)
        change = self._changes(number, rank, layer, local)
        is_held = (self._held[layer] > now) | (self._held[layer, rank, local] > now)[:, None, None]
        total = int(self._excess.sum())
        never = np.iinfo(np.int64).max
        change = np.where((self.phase[layer] == number) | (is_held & (total + change >= self._least)), never, change)
        best = np.unravel_index(int(change.argmin()), change.shape)
        if change[best] == never:
            return False
        source = (int(layer[best[0]]), rank, int(local[best[0]]))
        self._swap(source, (source[0], int(best[1]), int(best[2])), now)
        self._least = min(self._least, int(self._excess.sum()))
        return True

    def _changes(self, number: int, rank: int, layer: Ints, local: Ints) -> Ints:
        """Return the change of the excess for each expert of (phase, rank) and each partner in its layer."""
        loads, excess, over = self._loads, self._excess, self._over
        out = self._units[layer, local][:, None, None, :]
        back = self._units[layer][:, None, :, :]
        other, ranks = self.phase[layer], np.broadcast_to(self._ranks, self.phase[layer].shape)
        is_same = ranks == rank
        same = is_same[..., None]
        change = over(loads[number, rank] - out + np.where(same, back, 0)) - excess[number, rank]
        change += np.where(is_same, 0, over(loads[number, ranks] + back) - excess[number, ranks])
        change += over(loads[other, ranks] - back + np.where(same, out, 0)) - excess[other, ranks]
        change += np.where(is_same, 0, over(loads[other, rank] + out) - excess[other, rank])
        return np.asarray(change, dtype=np.int64)

    def _swap(self, source: Place, partner: Place, now: int) -> None:
        old, new = int(self.phase[source]), int(self.phase[partner])
        self._move(source, new)
        self._move(partner, old)
        self._held[source] = self._held[partner] = now + TENURE_SWAPS

    def _move(self, place: Place, phase: int) -> None:
        layer, rank, local = place
        old = int(self.phase[place])
        self._loads[old, rank] -= self._units[layer, local]
        self._loads[phase, rank] += self._units[layer, local]
        self.phase[place] = phase
        for number in (old, phase):
            self._excess[number, rank] = self._over(self._loads[number, rank])
