"""The restore of one candidate on all ranks: its dense part from the candidate itself, its experts from its layers.

All ranks read, tell each other what was bad, and read those experts again from the next layer, until nothing is bad.
Every byte is checked before it reaches the training state. Each round finds a version bad or is the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moc.agreement import agree, exchange
from moc.errors import MismatchError, MocError, ShardCorruptError, StoreDeniedError
from moc.held import MemorySource
from moc.host import Host
from moc.layers import Layers, WithheldError, is_withheld
from moc.plan.lineage import MEMORY, PEERS, STORAGE, Candidate
from moc.plan.versions import Choice
from moc.recover import fill_shards, split_tree
from moc.report import ExpertOrigin, StaleVersion
from moc.routing import Routing, lose
from moc.state import Expert
from moc.trace import Trace
from moc.training import TrainingState, World

__all__ = ["Assembled", "Terms", "TooStale", "assemble"]

log = logging.getLogger(__name__)

NOTE_LIMIT = 16  # of the experts that were bad; all are in the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is asked of a restore.

    `parts` are the only ones to restore; None: all, with the small state. `has_layers`: an expert may come from an
    older layer than the candidate itself. `is_whole`: no expert may be older than the candidate's step. `plt_limit` is
    the most PLT that is accepted where an expert is, None for any. `answers` tells whether storage gives other things
    (collective); None: what it withholds ends the try, which is made again.
    """

    parts: Sequence[str] | None
    has_layers: bool
    is_whole: bool
    plt_limit: float | None
    answers: Callable[[], bool] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TooStale:
    """A candidate that was not restored because its experts are too old: why, in words, and the step of the oldest."""

    reason: str
    oldest_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """What is in the training state now; equal on all ranks but for `size_bytes` (read by this rank) and the tree.

    `experts` says where each comes from, where that may be several places. `stale` are those that are older than the
    candidate's step, `layers` the older snapshots in memory that some experts come from. `routing` counts as lost what
    they have not learned, None where nothing counts routes; `lost` are the routes that this restore has lost, by layer.
    """

    size_bytes: int
    tree: Mapping[str, object] | None
    is_exact: bool
    experts: tuple[ExpertOrigin, ...]
    stale: tuple[StaleVersion, ...]
    layers: tuple[Candidate, ...]
    routing: Routing | None
    lost: tuple[int, ...]
    notes: tuple[str, ...]


def assemble(
    layers: Layers, state: TrainingState, world: World, terms: Terms, *, host: Host, trace: Trace
) -> Assembled | TooStale:
    """Open the candidate and fill the training state from its layers. Collective.

    Raises the same error on every rank, with the state partly overwritten: IntegrityError or StorageError where the
    dense part cannot be had, or some expert in no version; WithheldError where that is storage's fault.
    """
    work = _Work(layers, state, world, terms, host, trace)
    layers.open_first(expert for expert in work.targets if expert is not None)
    tree, is_exact, counted = None, True, None
    if terms.parts is None:
        tree, is_exact, capture = agree(world, lambda: split_tree(*layers.first.state(world.rank)))
        counted = None if capture is None else capture.routing
    for _ in range(len(layers.candidates) + 1):
        choice = work.choose()
        stale = _stale(layers, choice)
        routing = _lose(layers, choice, stale, counted)
        reason = _too_stale(layers.candidates[0], stale, routing, terms, world)
        if reason is not None:
            return TooStale(reason=reason, oldest_step=min(row.step for row in stale))
        if work.read(choice):
            lent = work.lent() if terms.has_layers else frozenset()
            used = sorted({n for n in choice.layers.values() if n and layers.candidates[n].source == MEMORY})
            return Assembled(
                size_bytes=work.size_bytes,
                tree=tree,
                is_exact=is_exact,
                experts=_origins(layers, choice, lent) if terms.has_layers else (),
                stale=stale,
                layers=tuple(layers.candidates[n] for n in used),
                routing=routing,
                lost=_newly_lost(counted, routing),
                notes=tuple(work.notes),
            )
    raise AssertionError(f"an expert was bad in more versions than there are layers: {len(layers.candidates)}")


class _Work:
    """The rounds of one restore: what was found bad so far, and where each expert was last read from."""

    def __init__(
        self, layers: Layers, state: TrainingState, world: World, terms: Terms, host: Host, trace: Trace
    ) -> None:
        self._layers, self._state, self._world, self._terms = layers, state, world, terms
        self._host, self._trace = host, trace
        self._bad: set[tuple[Expert, str]] = set()
        self._read: dict[Expert | None, int] = {}
        self._is_withheld = False
        self.size_bytes = 0
        self.notes: list[str] = []
        self.targets: dict[Expert | None, list[int]] = {}
        for index, shard in enumerate(state.needed):
            if terms.parts is None or shard.part in terms.parts:
                self.targets.setdefault(shard.expert, []).append(index)

    def choose(self) -> Choice:
        """Return where each expert comes from; raises where one comes from nowhere. Collective."""
        known = len(self._layers.withheld)
        choice = self._layers.choose(self._bad)
        for words, is_needed in self._layers.withheld[known:]:
            self._pass_over(words, is_needed=is_needed)
        if not choice.missing:
            return choice
        first, candidate = choice.missing[0], self._layers.candidates[0]
        words = (
            f"no whole version of {len(choice.missing)} expert(s): candidate={candidate} layer={first.layer} "
            f"expert={first.index} layers={len(self._layers.candidates)}"
            + "".join(f"; {note}" for note in self.notes[-1:])
        )
        if self._is_withheld or self._layers.withheld or self._layers.is_storage_away:
            raise WithheldError(words)
        raise ShardCorruptError(words)

    def read(self, choice: Choice) -> bool:
        """Read what is not where the choice says; return whether all of it was good on all ranks. Collective."""
        groups: dict[int, list[Expert | None]] = {}
        for expert in self.targets:
            layer = 0 if expert is None else choice.layers[expert]
            if self._read.get(expert) != layer:
                groups.setdefault(layer, []).append(expert)
        damaged = agree(self._world, lambda: self._fill(groups))
        self._read |= {expert: layer for layer, experts in groups.items() for expert in experts}
        mine = [
            [
                e.layer,
                e.index,
                self._layers.version(choice, e).holder,
                is_withheld(error),
                _is_denied(error),
                str(error),
            ]
            for e, error in sorted(damaged.items())
        ]
        told: list[list[Any]] = exchange(self._world, mine)  # type: ignore[assignment]  # our own rows
        marks = [(rank, row) for rank, rows in enumerate(told) for row in rows]
        for rank, (_, _, _, _, is_denied, words) in marks:
            if is_denied:
                raise StoreDeniedError(f"{words} rank={rank}")
        for rank, (layer, index, holder, withheld, _, words) in marks:
            self._bad.add((Expert(layer=layer, index=index), holder))
            self._note(f"expert {index} of layer {layer} is not usable in {holder}: {words} rank={rank}")
            if withheld:
                self._pass_over(f"{words} rank={rank}")
        return not marks

    def lent(self) -> frozenset[Expert]:
        """Return the experts of which some rank has read something from memory of other nodes. Collective."""
        mine: set[Expert] = set()
        for source in self._layers.sources:
            if isinstance(source, MemorySource):
                mine |= source.lent_experts
        told: list[list[list[int]]] = exchange(self._world, [[e.layer, e.index] for e in sorted(mine)])  # type: ignore[assignment]  # our own rows
        return frozenset(Expert(layer=layer, index=index) for rows in told for layer, index in rows)

    def _fill(self, groups: Mapping[int, Sequence[Expert | None]]) -> dict[Expert, MocError]:
        """Read these experts (None: the dense part) from these layers; return those that were bad. Not collective."""
        if not self._read:
            self._state.begin_restore()
        damaged: dict[Expert, MocError] = {}
        for number, experts in sorted(groups.items()):
            source, candidate = self._layers.sources[number], self._layers.candidates[number]
            if source is None:
                words = f"this node has nothing of the snapshot: candidate={candidate}"
                damaged |= {expert: ShardCorruptError(words) for expert in experts if expert is not None}
                continue
            targets = [target for expert in experts for target in self.targets[expert]]
            try:
                filled = fill_shards(source, self._state, targets, candidate, host=self._host, trace=self._trace)
            except MismatchError as error:
                if not number:
                    raise
                # Another model, which the user has allowed for this start: it has no experts for the present one.
                damaged |= {expert: error for expert in experts if expert is not None}
                continue
            self.size_bytes += filled.size_bytes
            damaged |= filled.damaged
            if not self._terms.has_layers:
                for _, reason in sorted(filled.damaged.items()):
                    raise reason
        return damaged

    def _pass_over(self, words: str, *, is_needed: bool = True) -> None:
        """Go on without what storage withholds, if it gives other things or that is not needed. Collective.

        Else, and where another try will be made, raise WithheldError.
        """
        if self._terms.answers is None:
            raise WithheldError(words)
        if is_needed and not self._is_withheld and not self._terms.answers():
            raise WithheldError(words)
        self._is_withheld = self._is_withheld or is_needed

    def _note(self, words: str) -> None:
        if len(self.notes) < NOTE_LIMIT:
            self.notes.append(words)
        if self._world.rank == 0:
            log.warning("%s", words)


def _origins(layers: Layers, choice: Choice, lent: Collection[Expert]) -> tuple[ExpertOrigin, ...]:
    def origin_of(expert: Expert) -> ExpertOrigin:
        level, version = layers.candidates[choice.layers[expert]].source, layers.version(choice, expert)
        is_lent = expert in lent and level != STORAGE
        return ExpertOrigin(expert=expert, level=PEERS if is_lent else level, step=version.step, source=version.holder)

    return tuple(map(origin_of, sorted(choice.layers)))


def _stale(layers: Layers, choice: Choice) -> tuple[StaleVersion, ...]:
    step = layers.candidates[0].step
    versions = ((expert, layers.version(choice, expert)) for expert in sorted(choice.layers))
    return tuple(
        StaleVersion(expert=expert, step=version.step, source=version.holder)
        for expert, version in versions
        if version.step < step
    )


def _lose(layers: Layers, choice: Choice, stale: Sequence[StaleVersion], counted: Routing | None) -> Routing | None:
    """Return the routing with what the stale experts have not learned."""
    if counted is None:
        return None
    return lose(counted, {row.expert: layers.version(choice, row.expert).learned for row in stale})


def _too_stale(
    candidate: Candidate, stale: Sequence[StaleVersion], routing: Routing | None, terms: Terms, world: World
) -> str | None:
    """Return why these versions are not accepted, None if they are. Collective."""
    if not stale:
        return None
    words = f"{len(stale)} expert(s) are older than step {candidate.step}"
    if terms.is_whole:
        return f"{words}; wanted is a state without"
    if terms.plt_limit is None:
        return None
    plt = 0.0 if routing is None else routing.plt
    # Each rank has read the counts for itself: what one of them refuses is refused.
    worst = max(float(str(told)) for told in exchange(world, plt))
    return f"{words}; plt={worst:.6f} plt_limit={terms.plt_limit}" if worst > terms.plt_limit else None


def _newly_lost(counted: Routing | None, routing: Routing | None) -> tuple[int, ...]:
    if counted is None or routing is None:
        return ()
    return tuple(after - before for before, after in zip(counted.lost, routing.lost, strict=True))


def _is_denied(error: MocError) -> bool:
    return isinstance(error, StoreDeniedError)
