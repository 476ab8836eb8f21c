"""The layers of one recovery candidate, opened one after the other by all ranks together.

The first layer is the candidate itself. An older one is opened only when an expert needs it, and counts only if every
rank could open it: so all ranks have the same inventories, and choose alike (see `moc.plan.versions`). A node that has
nothing of a snapshot, because its memory is lost, opens it all the same and tells nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from moc.agreement import agree, exchange
from moc.errors import (
    IntegrityError,
    MismatchError,
    MocError,
    ObjectMissingError,
    StorageError,
    StoreUnavailableError,
)
from moc.plan.lineage import MEMORY, STORAGE, Candidate
from moc.plan.versions import Choice, Inventory, Sizes, Version, choose, consistent
from moc.recover import Source
from moc.state import Expert
from moc.training import World

__all__ = ["Layers", "Open", "WithheldError", "is_withheld"]

log = logging.getLogger(__name__)

Open = Callable[[Candidate], tuple[Source | None, Callable[[], None]]]
"""Open a candidate's source, None where this node has nothing of an older layer; the second value closes it."""


class WithheldError(StoreUnavailableError):
    """Storage has what some expert needs, as far as one can tell, and does not give it. The same on all ranks."""


def is_withheld(error: MocError) -> bool:
    """Return whether the error says that storage did not give something, and not that it is bad or gone."""
    return isinstance(error, StorageError) and not isinstance(error, ObjectMissingError)


class Layers:
    """The layers of one candidate; a context manager that closes what was opened.

    Methods are collective unless they say otherwise.
    """

    def __init__(
        self,
        candidate: Candidate,
        older: Sequence[Candidate],
        opener: Open,
        world: World,
        *,
        sizes: Sizes | None = None,
        is_storage_away: bool = False,
    ) -> None:
        """`older` are the layers below the candidate, in the order in which they are opened.

        `sizes` say how much of an expert makes it whole; None: whatever is told of it. `is_storage_away`: there may be
        more layers, which nobody could list.
        """
        self.candidates = (candidate, *older)
        self.sources: list[Source | None] = []
        self.inventories: list[Inventory] = []
        self.withheld: list[tuple[str, bool]] = []
        """What storage did not give when layers were opened, and whether an expert was missing without it."""
        self.is_storage_away = is_storage_away
        self._sizes = sizes
        self._open, self._world = opener, world
        self._closers: list[Callable[[], None]] = []
        self._experts: tuple[Expert, ...] = ()

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *_: object) -> None:
        while self._closers:
            self._closers.pop()()

    @property
    def first(self) -> Source:
        """The candidate's own source. Not collective."""
        source = self.sources[0]
        assert source is not None, "the first layer is open, or `open_first` has raised"
        return source

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All experts that some rank needs, sorted. Not collective."""
        return self._experts

    def open_first(self, needed: Iterable[Expert]) -> None:
        """Open the candidate; `needed` are the experts that this rank needs. Raises if any rank cannot open it."""
        candidate = self.candidates[0]
        wanted = sorted(set(needed))
        source = agree(self._world, lambda: self._keep(candidate))
        assert source is not None, "what cannot be opened is no candidate"
        rows: list[list[list[int]]] = exchange(self._world, [[e.layer, e.index] for e in wanted])  # type: ignore[assignment]  # our own rows
        self._experts = tuple(sorted({Expert(layer=layer, index=index) for row in rows for layer, index in row}))
        slices = agree(self._world, lambda: self._slices(source))
        self._append(source, exchange(self._world, slices))

    def choose(self, bad: Collection[tuple[Expert, str]]) -> Choice:
        """Return where each expert comes from, opening as many layers as it takes.

        A layer is opened where an expert would be missing otherwise, or where it may have a newer version: of one that
        the candidate has not, or has in a stale version that a snapshot in memory may have as it was later.
        """
        while True:
            choice = choose(self._experts, self.inventories, bad)
            opened = len(self.inventories)
            if opened == len(self.candidates) or not (choice.missing or self._may_improve(choice)):
                return choice
            self._open_next(is_needed=bool(choice.missing))

    def version(self, choice: Choice, expert: Expert) -> Version:
        """Return the version that was chosen for an expert. Not collective."""
        return self.inventories[choice.layers[expert]][expert]

    def _may_improve(self, choice: Choice) -> bool:
        first, following = self.candidates[0], self.candidates[len(self.inventories)]
        # A rotation leaves experts behind: no checkpoint before this one has them any newer, nor has a snapshot before
        # this one. But memory may have what a checkpoint has not.
        is_newer_level = first.source == STORAGE and following.source == MEMORY
        # And a later snapshot of the same step, taken on request with all experts, may have outlived its memory.
        is_taken_again = any(_is_later_of_step(other, first) for other in self.candidates[len(self.inventories) :])
        return any(
            ((layer or is_newer_level) and self.inventories[layer][expert].step < following.step)
            or (is_taken_again and self.inventories[layer][expert].step < first.step)
            for expert, layer in choice.layers.items()
        )

    def _open_next(self, *, is_needed: bool) -> None:
        candidate = self.candidates[len(self.inventories)]
        source, mine = agree(self._world, lambda: self._look(candidate))
        told: list[dict[str, object]] = exchange(self._world, mine)  # type: ignore[assignment]  # our own dicts come back
        problems = [(rank, row) for rank, row in enumerate(told) if "problem" in row]
        if problems:
            rank, row = problems[0]
            log.warning("layer cannot be used: %s rank=%d reason=%s", candidate, rank, row["problem"])
            if any(row["is_withheld"] for _, row in problems):
                self.withheld.append((f"{candidate}: {row['problem']}", is_needed))
            self._append(None, [])
            return
        self._append(source, [row["slices"] for row in told])

    def _look(self, candidate: Candidate) -> tuple[Source | None, dict[str, object]]:
        """Open a layer; return its source and what the other ranks must know. Not collective."""
        try:
            source = self._keep(candidate)
            return source, {"slices": [] if source is None else self._slices(source)}
        except (IntegrityError, StorageError, MismatchError) as error:
            return None, {"problem": str(error), "is_withheld": is_withheld(error)}

    def _keep(self, candidate: Candidate) -> Source | None:
        source, close = self._open(candidate)
        self._closers.append(close)
        return source

    def _slices(self, source: Source) -> list[list[list[object]]]:
        """Return what this rank tells the others of a layer: an inventory for each of its parts that is this rank's."""
        step = self.candidates[0].step
        inventories = source.slices(self._experts, self._world.rank, self._world.size, step=step)
        return [
            [[e.layer, e.index, v.step, v.learned, v.holder, v.elements] for e, v in inventory.items()]
            for inventory in inventories
        ]

    def _append(self, source: Source | None, told: Sequence[object]) -> None:
        slices: list[dict[Expert, Version]] = [
            {
                Expert(layer=layer, index=index): Version(step=step, learned=learned, holder=holder, elements=elements)
                for layer, index, step, learned, holder, elements in rows
            }
            for inventories in told
            for rows in inventories  # type: ignore[attr-defined]  # `_slices` of every rank
        ]
        self.sources.append(source)
        self.inventories.append(consistent(slices, self._sizes))


def _is_later_of_step(other: Candidate, first: Candidate) -> bool:
    return (other.incarnation, other.step) == (first.incarnation, first.step) and other.attempt > first.attempt
