"""One rank's ledger of routes in one life: what was registered here, and the sums over all ranks for its snapshots.

Counts are registered by micro-batch and MoE layer and added up here. At a boundary that takes a snapshot they are
summed over the ranks (`settle`), so every rank has the same totals at the same step. Whether a life counts routes at
all is settled at its first boundary; where nobody does, there is no further sum, and no key in the state. Routes of
steps that the engine has skipped count like all others: their tokens are used up.

What goes wrong ends the counting for the rest of the life, with one line in the log: a count that is incomplete would
claim that less was lost. Training and snapshots go on. Without torch.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moc.errors import CoordinationError, UsageError
from moc.routing import COUNT_LIMIT, KEPT, ROUTING_KEY, Counts, Routing, capture_tree
from moc.training import RouteSource, World

__all__ = ["Ledger"]

log = logging.getLogger(__name__)

STOPPED = "lost tokens are not counted any more in this life"
Ints = npt.NDArray[np.int64]


class Ledger:
    """Thread: the training thread. All ranks call the methods that are collective in the same order."""

    def __init__(
        self,
        experts: Sequence[int],
        world: World,
        *,
        step: int,
        plt_limit: float = 1.0,
        restored: Routing | None = None,
        source: RouteSource | None = None,
    ) -> None:
        """Begin at a life's first step, with the routes that its state was restored with.

        `experts` are the numbers of experts by MoE layer. `plt_limit` is the share of lost tokens above which there is
        an alarm. `source` has what was counted elsewhere, on a device.
        """
        self._experts, self._world, self._source = tuple(experts), world, source
        self._first_step, self._starts = step, np.cumsum([0, *experts], dtype=np.int64)
        self._basis = KEPT if source is None else source.basis
        self._pending = np.zeros(int(self._starts[-1]), dtype=np.int64)
        self._pending_limit = COUNT_LIMIT // world.size  # so that the sum over the ranks cannot overflow
        self._has_registered = self._has_ignored = self._has_stopped = self._has_alarmed = False
        self._plt_limit = plt_limit
        self._is_counting: bool | None = None if experts else False
        usable = self._checked(restored)
        self._routed = np.zeros_like(self._pending) if usable is None else _flat(usable.routed)
        self._learned = np.zeros_like(self._pending) if usable is None else _flat(usable.learned)
        self._is_restored = usable is not None
        self._captured, self._steps = self._learned.copy(), np.full_like(self._pending, step)
        self._offered = self._former = self._captured, self._steps
        self._failed = 0

    @property
    def plt(self) -> float | None:
        """Return the proportion of lost tokens at the last settlement, None where nothing counts routes."""
        if not self._is_known:
            return None
        rows = [slice(first, last) for first, last in zip(self._starts, self._starts[1:], strict=False)]
        routed, learned = ([float(counts[row].sum()) for row in rows] for counts in (self._routed, self._learned))
        return sum(1 - kept / most for kept, most in zip(learned, routed, strict=True) if most) / len(rows)

    def register(self, layer: int, counts: object) -> None:
        """Add this rank's routes to every expert of a MoE layer. Raises: UsageError for counts that cannot be.

        Where the life does not count, because nobody did at its first boundary or something went wrong, they are
        ignored, with one line in the log.
        """
        if type(layer) is not int or not 0 <= layer < len(self._experts):
            raise UsageError(
                f"no such MoE layer: layer={layer!r:.80} layers={len(self._experts)} allowed=counted from 0"
            )
        checked = _check_counts(layer, counts, self._experts[layer])
        if self._is_counting is False:
            self._ignore()
            return
        row = self._pending[self._starts[layer] : self._starts[layer + 1]]
        if (checked > self._pending_limit - row).any():
            raise UsageError(f"too many routes: {layer=} count={checked.max()} allowed={self._pending_limit} per rank")
        row += checked
        self._has_registered = True

    def settle(
        self, step: int, chosen: npt.NDArray[np.bool_] | None = None, *, failed: int = 0
    ) -> Mapping[str, object]:
        """Sum what was registered over the ranks; return what a snapshot with these experts (None: all) adds to its
        state.

        `failed` counts the copies of this life that have failed: after one more, the snapshot that was begun last has
        captured nothing. Collective, and never raises. Blocks: until all ranks are here.
        """
        if failed > self._failed:
            self._failed = failed
            self._captured, self._steps = self._former
        if self._is_counting or (self._is_counting is None and step != self._first_step):
            self._sum_up()
        if not self._is_known:
            return {}
        self._alarm()
        mask = np.ones(len(self._pending), dtype=np.bool_) if chosen is None else chosen
        captured, steps = np.where(mask, self._learned, self._captured), np.where(mask, step, self._steps)
        self._offered = captured, steps
        columns = {"routed": self._routed, "learned": self._learned, "captured": captured, "steps": steps}
        packed = {name: column.astype("<i8").tobytes() for name, column in columns.items()}
        return {ROUTING_KEY: capture_tree(self._basis, self._experts, packed)}

    def note(self, *, is_begun: bool) -> None:
        """Say whether the snapshot of the last settlement was begun: then its experts are captured, unless it fails."""
        if is_begun:
            self._former = self._captured, self._steps
            self._captured, self._steps = self._offered

    # Inside

    @property
    def _is_known(self) -> bool:
        """Return whether there are totals: counted, or restored and not yet counted further."""
        return bool(self._is_counting) or (self._is_counting is None and self._is_restored)

    def _ignore(self) -> None:
        if not self._has_ignored:
            self._has_ignored = True
            if not self._has_stopped:
                log.warning("routes are ignored: rank=%d allowed=from the first step of a life on", self._world.rank)

    def _sum_up(self) -> None:
        try:
            sums = np.frombuffer(self._world.sum_up(self._collect()), dtype=np.int64)
        except CoordinationError as error:
            log.warning("%s: rank=%d reason=%s", STOPPED, self._world.rank, error)
            self._stop()
            return
        registering, faulty, counts = int(sums[0]), int(sums[1]), sums[2:]
        if faulty or (counts > COUNT_LIMIT - self._routed).any():
            self._warn(f"{STOPPED}: ranks={faulty} reason=wrong counts" if faulty else f"{STOPPED}: reason=too many")
            self._stop()
            return
        if self._is_counting is None:
            self._is_counting = self._begin(registering)
        if self._is_counting:
            self._routed += counts
            self._learned += counts

    def _alarm(self) -> None:
        """Say once in a life that more was lost than the settings allow."""
        plt = self.plt
        if plt is not None and plt > self._plt_limit and not self._has_alarmed:
            self._has_alarmed = True
            self._warn(
                f"too many tokens are lost: plt={plt:.4%} basis={self._basis} allowed=plt_limit={self._plt_limit:.4%}"
            )

    def _checked(self, restored: Routing | None) -> Routing | None:
        if restored is None or (restored.shape == self._experts and restored.basis == self._basis):
            return restored
        self._warn(
            f"lost tokens are counted anew, because the restored counts are of another kind: basis={restored.basis!r} "
            f"experts={restored.shape} present={self._basis!r} {self._experts}"
        )
        return None

    def _collect(self) -> array[int]:
        """Return this rank's part of the sum: whether it registers, whether its counts are wrong, its counts."""
        faulty = 0
        try:
            for layer, counts in () if self._source is None else self._source.take():
                self.register(layer, counts)
        except UsageError as error:
            log.error("routes are wrong: rank=%d %s", self._world.rank, error)
            faulty = 1
        part = array("q", [int(self._has_registered), faulty])
        part.frombytes(self._pending.tobytes())
        self._pending[:] = 0
        return part

    def _begin(self, registering: int) -> bool:
        if registering == 0 and self._is_restored:
            self._warn("lost tokens are not counted any more: nothing registers routes, as an earlier life did")
        elif 0 < registering < self._world.size:
            self._warn(f"routes are registered by some ranks only: ranks={registering} expected={self._world.size}")
        return registering > 0

    def _stop(self) -> None:
        self._is_counting, self._has_stopped = False, True

    def _warn(self, words: str) -> None:
        if self._world.rank == 0:  # all ranks know the same
            log.warning("%s", words)


def _check_counts(layer: int, counts: object, experts: int) -> Ints:
    try:
        given = np.asarray(counts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"counts are no numbers: {layer=} type={type(counts).__name__} reason={error}") from error
    if given.shape != (experts,):
        raise UsageError(f"counts have a wrong shape: {layer=} shape={given.shape} allowed=({experts},)")
    if given.dtype.kind not in "iu":
        raise UsageError(f"counts have a wrong type: {layer=} dtype={given.dtype} allowed=integers")
    least, most = int(given.min()), int(given.max())
    if least < 0 or most > COUNT_LIMIT:
        wrong = least if least < 0 else most
        raise UsageError(f"count is out of range: {layer=} count={wrong} allowed=0..{COUNT_LIMIT}")
    return given.astype(np.int64)


def _flat(counts: Counts) -> Ints:
    return np.array([count for row in counts for count in row], dtype=np.int64)
