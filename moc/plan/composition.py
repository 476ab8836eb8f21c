"""What a checkpoint consists of: experts that are written now, and those that it shares with the one before it.

The *base* is the newest committed checkpoint on the lineage. It alone says how long ago each expert was committed, so a
commit advances the rotation by becoming the next base: a save that failed changes nothing, and a restart goes on where
the last commit was. Equal snapshots on equal bases give equal compositions on every agent and hash seed. Pure.

Every expert of the model is in the composition once, written or kept. One is *fit* to be written if all ranks that hold
a slice of it have it at the same step, and the base has an older one. What the base has at the checkpoint's own step is
written all the same: a manifest names experts of other attempts only where they are older than itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from moc.errors import InternalError, PlanDivergedError
from moc.format.keys import CheckpointName, parse_object_keys
from moc.format.manifest import Manifest, ObjectRow
from moc.format.stale import StaleExpert
from moc.plan.rotation import Rotation, expert_counts
from moc.plan.select import Budget, History, Policy, select
from moc.routing import Routing
from moc.state import Expert

__all__ = [
    "KEPT_LIMIT",
    "Base",
    "Composition",
    "Sealed",
    "Terms",
    "compose",
    "is_counted_on",
    "is_newer",
    "next_base",
    "steps_of_experts",
]

KEPT_LIMIT = 1_000_000  # objects of other attempts, at up to 35 bytes each: half of what a manifest may be long
Held = dict[Expert, StaleExpert]
"""By expert of the model what the base has of it, as the row that a checkpoint after it would have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint that the next one grows from; `finite` are those of its attempts whose values are all finite."""

    manifest: Manifest
    finite: frozenset[CheckpointName]

    @property
    def name(self) -> CheckpointName:
        return self.manifest.name

    @staticmethod
    def of(manifest: Manifest) -> Base:
        """Return the base that a stored manifest is: where not all is finite, nothing is known to be."""
        names = {manifest.name, *(row.source for row in manifest.stale_experts)}
        return Base(manifest=manifest, finite=frozenset(names if manifest.is_finite else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A snapshot of all ranks, and the name of the checkpoint that it becomes.

    By expert of the model `steps` has the step of its bytes, None where ranks differ. `routing` are the routes of the
    snapshot's own step, None where nothing counts them; `learned` is what older bytes in it have learned, as far as
    anybody knows.
    """

    name: CheckpointName
    steps: Mapping[Expert, int | None]
    digest: str
    fingerprint: Mapping[str, object]
    routing: Routing | None = None
    learned: Mapping[Expert, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How experts take turns.

    `interval` is the number of steps between two commits, `faults` how often the run has gone on from storage.
    """

    policy: Policy
    rotation: Rotation
    interval: int
    faults: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """The experts of a checkpoint: those `written`, the `stale` ones, and the objects of other attempts that are `kept`
    for them; all sorted. `finite` are those of the other attempts whose values are all finite.
    """

    written: tuple[Expert, ...] = ()
    stale: tuple[StaleExpert, ...] = ()
    kept: tuple[ObjectRow, ...] = ()
    routing: Routing | None = None
    finite: frozenset[CheckpointName] = field(default_factory=frozenset)

    @property
    def is_kept_finite(self) -> bool:
        """Return whether all that is kept is finite."""
        return {owner for owner, *_ in parse_object_keys(row.key for row in self.kept)} <= self.finite

    @property
    def digest(self) -> str:
        """Return 16 hex digits of all of it that decides what is written and what the manifest says."""
        written = [f"{expert.layer} {expert.index}" for expert in self.written]
        stale = [f"{r.expert.layer} {r.expert.index} {r.step} {r.source} {r.routed}" for r in self.stale]
        kept = [f"{row.key} {row.size_bytes} {row.header_bytes} {row.header_crc32c}" for row in self.kept]
        routing = None if self.routing is None else self.routing.to_json()
        told = ["\n".join(lines) for lines in (written, stale, kept, [f"{routing} {self.is_kept_finite}"])]
        return hashlib.sha256("\n\n".join(told).encode()).hexdigest()[:16]


def steps_of_experts(slices: Iterable[tuple[Expert, int | None]]) -> dict[Expert, int | None]:
    """Return by expert the step of its bytes, None where two slices differ, or one is of several steps itself;
    `slices` are those of all ranks.
    """
    steps: dict[Expert, int | None] = {}
    for expert, step in slices:
        steps[expert] = step if steps.get(expert, step) == step else None
    return dict(sorted(steps.items()))


def compose(sealed: Sealed, base: Base | None, terms: Terms | None, *, kept_limit: int = KEPT_LIMIT) -> Composition:
    """Return what to write and what to keep.

    Without terms, where the base is of another experiment, and where the manifest would name too many objects of other
    attempts, all that is fit is written; else as many experts per layer as the terms allow, those first whose last
    commit is oldest. A base with other catalogs is none: its experts are cut in another way.
    Raises: PlanDivergedError for an expert that can neither be written nor kept.
    """
    name, steps = sealed.name, sealed.steps
    if base is not None and base.manifest.catalog_digest != sealed.digest:
        base = None
    held = {} if base is None else _held(base.manifest, steps, sealed.routing)
    fit = {e for e, step in steps.items() if step is not None and (e not in held or step > held[e].step)}
    due = [expert for expert in steps if expert not in held or held[expert].step >= name.step]
    _refuse_unfit(sealed, due, held)
    if base is None or terms is None or base.manifest.fingerprint != sealed.fingerprint:
        chosen = fit
    else:
        chosen = _chosen(sealed, base, held, fit, terms)
    written = chosen.union(due)
    sources = {held[expert].source for expert in steps if expert not in written}
    kept = () if base is None else tuple(_kept(base.manifest, sources))
    if len(kept) > kept_limit and terms is not None:
        return compose(sealed, base, None)
    return Composition(
        written=tuple(sorted(written)),
        stale=tuple(_stale_rows(sealed, held, written)),
        kept=kept,
        routing=sealed.routing,
        finite=frozenset() if base is None else base.finite & sources,
    )


def next_base(manifest: Manifest, composition: Composition, *, is_written_finite: bool) -> Base:
    """Return the base that a checkpoint is once it is committed."""
    own = {manifest.name} if is_written_finite else set()
    return Base(manifest=manifest, finite=composition.finite | own)


def is_newer(steps: Mapping[Expert, int | None], base: Base) -> bool:
    """Return whether a snapshot has any expert newer than the base."""
    held = _held(base.manifest, steps, None)
    return any(step is not None and step > held[expert].step for expert, step in steps.items())


def _held(manifest: Manifest, experts: Collection[Expert], present: Routing | None) -> Held:
    """Return what the checkpoint has of each expert, which has learned 0 of a count that began after it."""
    stale, routing = {row.expert: row for row in manifest.stale_experts}, manifest.routing
    is_counted = is_counted_on(routing, present) and present is not None and present.shape == expert_counts(experts)

    def row_of(expert: Expert) -> StaleExpert:
        if expert in stale:
            return stale[expert] if is_counted else replace(stale[expert], routed=0)
        learned = routing.learned[expert.layer][expert.index] if routing is not None and is_counted else 0
        return StaleExpert(expert=expert, step=manifest.name.step, source=manifest.name, routed=learned)

    return {expert: row_of(expert) for expert in sorted(experts)}


def is_counted_on(before: Routing | None, present: Routing | None) -> bool:
    """Return whether the present count goes on from the one before: what began anew is smaller, or of another kind."""
    if before is None or present is None or (before.basis, before.shape) != (present.basis, present.shape):
        return False
    return all(n <= m for rows in zip(before.routed, present.routed, strict=True) for n, m in zip(*rows, strict=True))


def _refuse_unfit(sealed: Sealed, due: Iterable[Expert], held: Held) -> None:
    """Raise PlanDivergedError for an expert that must be written and that memory does not have."""
    for expert in due:
        step = sealed.steps[expert]
        if step is None:
            raise PlanDivergedError(
                f"ranks hold an expert at different steps, and no earlier checkpoint has it: expert={expert} "
                f"step={sealed.name.step}"
            )
        if expert in held and step < held[expert].step:
            raise PlanDivergedError(
                f"memory holds an older expert than the checkpoint of the same step: expert={expert} "
                f"step={sealed.name.step} actual={step}"
            )


def _chosen(sealed: Sealed, base: Base, held: Held, fit: Collection[Expert], terms: Terms) -> set[Expert]:
    """Return whose turn it is. Each layer is planned alone, since they may differ in the number of their experts."""
    numbers = _commit_numbers({base.name, *(row.source for row in held.values())}, terms.interval)
    routing = sealed.routing
    shape = tuple(len(order) for order in terms.rotation.orders)
    if routing is not None and routing.shape != shape:
        raise InternalError(f"routes belong to another model: experts={routing.shape} expected={shape}")
    plt = 0.0 if routing is None else routing.plt
    budget = Budget(plt=plt, faults=terms.faults, step=sealed.name.step, interval=terms.interval)
    chosen: set[Expert] = set()
    for layer, order in enumerate(terms.rotation.orders):
        experts = [Expert(layer=layer, index=index) for index in range(len(order))]
        history = History(commits=numbers[base.name], last=(tuple(numbers[held[e].source] for e in experts),))
        loads = None
        if routing is not None:
            loads = [[max(0, routing.learned[layer][e.index] - held[e].routed) for e in experts]]
        among = frozenset(Expert(layer=0, index=e.index) for e in experts if e in fit)
        selection = select(terms.policy, history, Rotation(orders=(order,)), loads=loads, budget=budget, among=among)
        chosen.update(experts[e.index] for e in selection.experts)
    return chosen


def _commit_numbers(sources: Iterable[CheckpointName], interval: int) -> dict[CheckpointName, int]:
    """Return the attempts in the order of their commits, numbered as if all commits in between were still there.

    The objects of those may be gone. How many they were is told by the steps, so that an expert's patience (LoadAware)
    is not longer for it.
    """
    ordered = sorted(sources)
    numbers = {ordered[0]: 1}
    for earlier, later in pairwise(ordered):
        numbers[later] = numbers[earlier] + max(1, (later.step - earlier.step) // interval)
    return numbers


def _stale_rows(sealed: Sealed, held: Held, written: Collection[Expert]) -> Iterator[StaleExpert]:
    for expert, step in sorted(sealed.steps.items()):
        if expert not in written:
            yield held[expert]
        elif step is not None and step < sealed.name.step:
            earlier = held[expert].routed if expert in held else 0
            learned = sealed.learned.get(expert, earlier)
            yield StaleExpert(expert=expert, step=step, source=sealed.name, routed=learned)


def _kept(manifest: Manifest, sources: Collection[CheckpointName]) -> Iterator[ObjectRow]:
    places = parse_object_keys(row.key for row in manifest.objects)
    for row, (owner, _, piece) in zip(manifest.objects, places, strict=True):
        if piece != "d" and owner in sources:
            yield row
