"""The restore of the best candidate: all ranks try one after the other until one can be restored whole.

A candidate whose bytes are bad or gone is passed over. One that storage does not give is tried again, since a storage
that is away for a moment must not cost a checkpoint; it is passed over only where the repository gives other things and
an older candidate is restored instead (docs/decisions/, record 16). A rejected candidate leaves the state partly
overwritten, never the outcome: the next one overwrites all of it, or the attach fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moc import errors
from moc.agent.peers.lender import Doubts
from moc.agreement import agree, decide, exchange
from moc.assembly import Terms, TooStale, assemble
from moc.errors import (
    IntegrityError,
    MocError,
    NoCheckpointError,
    ObjectMissingError,
    RankFailedError,
    StorageError,
    StoreDeniedError,
    StoreUnavailableError,
)
from moc.format.tagged import decode_state, encode_state, expect_mapping
from moc.held import MemorySource
from moc.host import Host
from moc.layers import Layers, Open, WithheldError
from moc.opening import checkpoint_name, open_source
from moc.plan.freeing import filled_limit
from moc.plan.lineage import PEERS, STORAGE, Candidate
from moc.plan.versions import Sizes, older_layers
from moc.recover import Source
from moc.report import ExpertOrigin, Rejection, StaleVersion, reasons_for_drift
from moc.repository import Repository
from moc.routing import Routing
from moc.survey import Origin, Request, refuse_mismatch
from moc.trace import Trace
from moc.training import TrainingState, World

__all__ = ["Restored", "restore_best"]

log = logging.getLogger(__name__)

WEIGHT_PARTS = ("master", "weight")
READ_ATTEMPTS = 3  # of a candidate that storage does not give: what passes by itself passes within seconds
READ_DELAY_S = 2.0  # between them; a remote store has repeated each request for longer before


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was restored, and what was passed over for it.

    `layers` are the snapshots in memory, older than the candidate, that some
    experts come from: with the candidate they are what this restore could be made from again.
    """

    candidate: Candidate
    bytes_per_rank: tuple[int, ...]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]
    experts: tuple[ExpertOrigin, ...] = ()
    stale: tuple[StaleVersion, ...] = ()
    layers: tuple[Candidate, ...] = ()
    routing: Routing | None = None
    lost: tuple[int, ...] = ()


def restore_best(
    request: Request,
    origin: Origin,
    wanted: Sequence[Candidate],
    state: TrainingState,
    world: World,
    *,
    sizes: Sizes,
    software: Mapping[str, str],
    host: Host,
    trace: Trace,
) -> Restored | None:
    """Restore the first candidate that can be restored; None if none is wanted. Collective.

    `sizes` are those of the model's experts.

    In a partial mode one whose stale experts exceed the limit of lost tokens is passed over for the first without any,
    unless all of that would be older than the oldest of these experts; where there is none, it is restored
    nevertheless. What was asked for by its step is restored as it is.

    Raises the same error on every rank: NoCheckpointError where all are damaged, StorageError where storage does not
    give what there is, and whatever is no fault of a candidate.
    """
    search = _Search(request, origin, wanted, state, world, sizes, software, host, trace)
    is_asked_for = request.restore != "auto" or any(life.reason == "rewind" for life in origin.lineage[-1:])
    is_limited = request.config.mode != "full" and not is_asked_for
    try:
        restored = search.first(wanted, plt_limit=request.config.plt_limit if is_limited else None)
        if restored is None and search.too_stale is not None:
            restored = search.first([search.too_stale], plt_limit=None)
        if restored is None and search.unread:
            raise search.unread[0][1]
    except WithheldError as error:  # its class is for those who look for another candidate
        raise StoreUnavailableError(str(error)) from error
    if restored is None and search.rejected:
        raise NoCheckpointError(
            "no candidate could be restored: " + "; ".join(f"{r.candidate}: {r.reason}" for r in search.rejected)
        )
    return restored


class _Search:
    """One candidate after the other, and why those before it were not taken. Methods are collective."""

    def __init__(
        self,
        request: Request,
        origin: Origin,
        wanted: Sequence[Candidate],
        state: TrainingState,
        world: World,
        sizes: Sizes,
        software: Mapping[str, str],
        host: Host,
        trace: Trace,
    ) -> None:
        self._request, self._origin, self._wanted = request, origin, wanted
        self._state, self._world, self._sizes, self._software = state, world, sizes, software
        self._host, self._trace = host, trace
        self._doubts = Doubts(host)
        self.rejected: list[Rejection] = []
        self.unread: list[tuple[Candidate, MocError]] = []
        self.too_stale: Candidate | None = None
        self.back_to = 0
        """The step that nothing may be older than which is restored instead of what is too stale."""

    def first(self, candidates: Sequence[Candidate], *, plt_limit: float | None) -> Restored | None:
        """Restore the first that can be, None if none can; from the first on that is too stale, only a whole one."""
        for candidate in candidates:
            is_whole = self.too_stale is not None and plt_limit is not None
            if is_whole and candidate.step < self.back_to:
                continue  # going back would cost every part of the state more than any expert loses now
            terms = Terms(
                parts=WEIGHT_PARTS if self._request.restore == "weights" else None,
                has_layers=self._request.config.mode != "full" and not is_whole,
                is_whole=is_whole,
                plt_limit=plt_limit,
                answers=None,
            )
            try:
                outcome = self._patiently(candidate, terms)
            except MocError as error:
                self._reject(candidate, error, is_optional=is_whole)
                continue
            if isinstance(outcome, Restored):
                return outcome
            log.warning("candidate passed over: %s reason=%s", candidate, outcome.reason)
            self.rejected.append(Rejection(candidate=str(candidate), reason=outcome.reason))
            if self.too_stale is None:
                self.too_stale, self.back_to = candidate, outcome.oldest_step
        return None

    def _reject(self, candidate: Candidate, error: MocError, *, is_optional: bool) -> None:
        """Note why a candidate could not be restored; raise the error where it is no fault of the candidate."""
        if _is_unread(error, candidate):
            # A snapshot lacks but some experts: an older one that has them all needs no storage, and costs few steps.
            is_needed = candidate.source == STORAGE and not is_optional
            if is_needed and (candidate == self._wanted[-1] or not self._repository_answers()):
                raise error
            self.unread.append((candidate, error))
        elif not _is_rejection(error):
            raise error
        log.warning("candidate rejected: %s reason=%s", candidate, error)
        self.rejected.append(Rejection(candidate=str(candidate), reason=str(error)))

    def _patiently(self, candidate: Candidate, terms: Terms) -> Restored | TooStale:
        """Restore as `_try`, again and after a pause where storage does not give something."""
        for attempt in range(1, READ_ATTEMPTS + 1):
            if attempt == READ_ATTEMPTS:
                terms = replace(terms, answers=self._repository_answers)
            try:
                return self._try(candidate, terms)
            except MocError as error:
                # What nobody could list when this life began, no other try will find.
                is_unlisted = isinstance(error, WithheldError) and not self._origin.is_stored
                if attempt == READ_ATTEMPTS or is_unlisted or not _is_unread(error, candidate):
                    raise
                log.warning("storage does not give a candidate, trying again: %s reason=%s", candidate, error)
            self._host.sleep(READ_DELAY_S)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _try(self, candidate: Candidate, terms: Terms) -> Restored | TooStale:
        """Restore one candidate on all ranks; raises one error on all of them if any rank fails."""
        request, state, world, trace = self._request, self._state, self._world, self._trace
        own = agree(world, lambda: encode_state(state.capture()).to_bytes()) if terms.parts is not None else b""
        config = request.config
        snapshots = filled_limit(config.arena_versions, has_replicas=config.replicas > 0) - 1  # the candidate is one
        older = older_layers(candidate, self._origin.layers, snapshots=snapshots) if terms.has_layers else ()
        sizes = self._sizes if terms.has_layers else None
        is_away = not self._origin.is_stored
        with (
            trace.span("recover.restore", source=candidate.source, step=candidate.step, rank=world.rank),
            Layers(candidate, older, self._opener(candidate), world, sizes=sizes, is_storage_away=is_away) as layers,
        ):
            outcome = assemble(layers, state, world, terms, host=self._host, trace=trace)
            if isinstance(outcome, TooStale):
                return outcome
            notes: tuple[str, ...] = ()
            if terms.parts is None:
                notes = reasons_for_drift(
                    stored_ranks=layers.first.world_size,
                    ranks=world.size,
                    stored_software=layers.first.software,
                    software=self._software,
                )
            lent = [source.lent_bytes if isinstance(source, MemorySource) else 0 for source in layers.sources]
        tree = expect_mapping(decode_state(own), "state") if outcome.tree is None else outcome.tree
        with trace.span("recover.apply", step=candidate.step, rank=world.rank):
            agree(world, lambda: state.apply(tree))  # agreed before the collective: a failed rank would not take part
            agree(world, state.derive_weights)
            agree(world, lambda: state.finish_restore(tree, exact_rank=outcome.is_exact))
        told: list[list[int]] = exchange(world, [outcome.size_bytes, lent[0], sum(lent)])  # type: ignore[assignment]  # our own rows
        if any(row[2] for row in told):
            notes += (f"{sum(row[2] for row in told)} bytes were read from the memory of other nodes",)
        return Restored(
            candidate=replace(candidate, source=PEERS) if any(row[1] for row in told) else candidate,
            bytes_per_rank=tuple(row[0] for row in told),
            rejected=tuple(self.rejected),
            notes=(*notes, *outcome.notes, *self._notes(candidate)),
            experts=outcome.experts,
            stale=outcome.stale,
            layers=outcome.layers,
            routing=outcome.routing,
            lost=outcome.lost,
        )

    def _notes(self, candidate: Candidate) -> tuple[str, ...]:
        """Return what the user should know of the choice."""
        notes = [_note_unread(passed) for passed, _ in self.unread if passed != candidate]
        if self.too_stale == candidate:
            notes.append(
                "more tokens are lost than plt_limit allows, and nothing without stale experts can be restored that is "
                f"as new as the oldest of these: step={self.back_to}"
            )
        elif self.too_stale is not None:
            notes.append(
                f"{self.too_stale.step - candidate.step} more steps are done again, because more tokens than plt_limit "
                f"allows are lost in {self.too_stale}: this is the newest state without stale experts"
            )
        return tuple(notes)

    def _opener(self, first: Candidate) -> Open:
        """Return how this rank opens a candidate's layers. Not collective."""

        def open_layer(layer: Candidate) -> tuple[Source | None, Callable[[], None]]:
            is_whole, rank = layer == first, self._world.rank
            source, close = open_source(
                self._request,
                self._origin,
                layer,
                rank,
                is_whole=is_whole,
                doubts=self._doubts,
                host=self._host,
                trace=self._trace,
            )
            if source is not None and not is_whole:
                try:  # whether the candidate itself may be used was asked before anything was looked at
                    refuse_mismatch(source.fingerprint, self._request)
                except MocError:
                    close()
                    raise
            return source, close

        return open_layer

    def _repository_answers(self) -> bool:
        """Return whether storage gives FORMAT and a checkpoint's manifest, so that it refuses single objects."""

        def look() -> dict[str, object]:
            try:
                repository = Repository(self._host.open_store(self._request.storage, trace=self._trace))
            except StorageError:
                return {"answers": False}
            try:
                has_manifest = any(_has_manifest(repository, c) for c in self._origin.candidates)
                return {"answers": repository.exists() and has_manifest}
            except (StorageError, IntegrityError):
                return {"answers": False}
            finally:
                repository.close()

        return bool(decide(self._world, look)["answers"])


def _note_unread(candidate: Candidate) -> str:
    if candidate.source != STORAGE:
        return f"a newer snapshot was passed over because storage does not give the experts that it lacks: {candidate}"
    return (
        f"a newer checkpoint was passed over because storage does not give it: {candidate}; it is off the lineage now, "
        f"and `moc rewind --step {candidate.step}-{candidate.attempt}` brings it back once it can be read"
    )


def _is_rejection(error: MocError) -> bool:
    """Return whether the error says that the candidate's bytes are bad or gone, on whatever rank."""
    classes = _classes(error)
    return bool(classes) and all(issubclass(c, (IntegrityError, ObjectMissingError)) for c in classes)


def _is_unread(error: MocError, candidate: Candidate) -> bool:
    """Return whether storage holds what the candidate needs, as far as one can tell, and yet does not give it."""
    if isinstance(error, WithheldError):
        return True
    classes = _classes(error)
    is_of_storage = all(issubclass(c, (IntegrityError, StorageError)) for c in classes)
    # Missing rights are somebody's mistake, and mended by somebody.
    is_denied = any(issubclass(c, StoreDeniedError) for c in classes)
    return candidate.source == STORAGE and is_of_storage and not is_denied and not _is_rejection(error)


def _classes(error: MocError) -> list[type]:
    kinds = sorted(error.kinds) if isinstance(error, RankFailedError) else [type(error).__name__]
    return [getattr(errors, kind, MocError) for kind in kinds]


def _has_manifest(repository: Repository, candidate: Candidate) -> bool:
    if candidate.source != STORAGE:
        return False
    try:
        repository.read_manifest(checkpoint_name(candidate))
    except (StorageError, IntegrityError):
        return False
    return True
