"""What the saves of one life are composed of: the policy that its settings name, and the checkpoint that a save grows
from.

In mode `full` a checkpoint is its snapshot, all of one step, and nothing is looked up. Else, and for a snapshot that
the life has inherited from one in another mode, it grows from the newest one on the lineage up to the fork, then from
what this life has committed. Ranks are told nothing: the base alone says whose turn it is
(docs/decisions/0020-the-agent-decides-what-to-persist.md). One that cannot be read makes the next checkpoint a whole
one. A save is composed of what the nodes offer for it, of which there is one on one node.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moc.errors import MocError, PlanDivergedError
from moc.format.keys import CheckpointName
from moc.format.manifest import Incarnation, Manifest
from moc.persist import Receipt, read_base, read_capture
from moc.plan.composition import Base, Composition, Sealed, Terms, compose, is_newer, next_base, steps_of_experts
from moc.plan.freeing import Moment
from moc.plan.lineage import chain, faults_of, is_on_chain, merge_incarnations
from moc.plan.offers import Attempt, Offer, Offered, join, offered_experts
from moc.plan.rotation import Rotation, expert_counts, rotation_of
from moc.plan.select import DynamicK, LoadAware, Policy, SelectAll, Sequential
from moc.repository import Repository
from moc.routing import Capture
from moc.snapshot.arena import Arena
from moc.snapshot.seal import SealRecord
from moc.state import Expert
from moc.topology import Topology

__all__ = ["FULL", "Composer"]

log = logging.getLogger(__name__)

FULL = "full"
BY_LOAD = "partial_by_load"


class Composer:
    """The base of one life's saves, and how they use it. Thread: the agent's persist thread."""

    def __init__(
        self,
        repository: Repository,
        life: Incarnation,
        lineage: Iterable[Incarnation],
        listed: Iterable[CheckpointName],
    ) -> None:
        """`lineage` are the lives that memory knows, `listed` the checkpoints in the repository."""
        self._repository, self._life = repository, life
        self._lineage, self._listed = (*lineage, life), tuple(listed)
        self._base: Base | None = None
        self._has_warned = False

    @property
    def base(self) -> CheckpointName | None:
        """What the next save grows from, as far as it was looked up."""
        return None if self._base is None else self._base.name

    def offer(
        self,
        name: CheckpointName,
        records: Sequence[SealRecord],
        arena: Arena,
        descriptor: Mapping[str, Any],
        *,
        is_whole: bool,
        is_inherited: bool,
        is_joint: bool,
        is_lowest: bool = True,
        lenders: Sequence[SealRecord] = (),
    ) -> Offer:
        """Return what these ranks have for the checkpoint of this name. With `is_joint`, other nodes offer too.

        What is long and the same everywhere, counts of routes and the outline of a state, the lowest node says alone.
        The `lenders` are the seals of older snapshots that some of its experts are from: they know what these have
        learned. Raises: ShardCorruptError for a state that has changed.
        """
        steps = _steps(arena, records)
        captures = _captures(arena, (*records, *lenders), steps)
        is_of_earlier_mode = is_inherited and (is_joint or any(step != name.step for step in steps.values()))
        grows = descriptor["config"]["mode"] != FULL or is_of_earlier_mode
        base = self._base_of(name) if grows else None
        return Offer(
            moment=(name.step, name.attempt),
            experts=offered_experts(steps, captures, name.step),
            is_whole=is_whole,
            is_inherited=is_inherited,
            base=None if base is None else _attempt(base.name),
            finite=() if base is None else tuple(sorted(map(_attempt, base.finite))),
            routing=captures[0].routing if captures and is_lowest else None,
            state=read_base(arena, min(records, key=lambda record: record.rank)) if is_lowest else None,
        )

    def compose(self, name: CheckpointName, offers: Sequence[Offer], descriptor: Mapping[str, Any]) -> Composition:
        """Return what the checkpoint of this name writes of the snapshot that was offered, and what it keeps.

        One that is inherited from an earlier life may be of several steps whatever the mode is now.
        Raises: PlanDivergedError for what cannot be a checkpoint; MocError where another node's base cannot be read.
        """
        offered = join(offers)
        base = self._follow(name, offered)
        sealed = Sealed(
            name=name,
            steps=offered.steps,
            digest=descriptor["digest"],
            fingerprint=descriptor["fingerprint"],
            routing=offered.routing,
            learned=offered.learned,
        )
        is_of_several_steps = any(step != name.step for step in offered.steps.values())
        is_of_earlier_mode = offered.is_inherited and (len(offers) > 1 or is_of_several_steps)
        if descriptor["config"]["mode"] != FULL or is_of_earlier_mode:
            _refuse_other_experts(offered, descriptor)
            return compose(sealed, base, None if offered.is_whole else self._terms(descriptor, sealed))
        composition = compose(sealed, None, None)
        if composition.stale:
            row = composition.stale[0]
            raise PlanDivergedError(
                f"a checkpoint of mode full would be of several steps: step={name.step} {row.expert} actual={row.step}"
            )
        return composition

    def stored(self, name: CheckpointName, moment: Moment, offers: Sequence[Offer]) -> Manifest | None:
        """Return the checkpoint that a second one of its moment would grow from, if that would add nothing to it."""
        offered = join(offers)
        base = self._follow(name, offered)
        if base is None or (base.name.step, base.name.attempt) != moment or is_newer(offered.steps, base):
            return None
        return base.manifest

    def note_commit_elsewhere(self, name: CheckpointName) -> None:
        """Let the next save grow from a checkpoint that another node has committed, which is read then."""
        self._base, self._listed = None, (name,)

    def note_commit(self, manifest: Manifest, composition: Composition, receipts: Iterable[Receipt]) -> None:
        """Let the next save grow from this checkpoint."""
        is_written_finite = all(receipt.is_finite for receipt in receipts)
        self._base = next_base(manifest, composition, is_written_finite=is_written_finite)

    def _follow(self, name: CheckpointName, offered: Offered) -> Base | None:
        """Return the newest base that was offered; one that this node does not know is read."""
        if offered.base is None:
            return None
        incarnation, step, attempt = offered.base
        wanted = CheckpointName(run=self._life.run, incarnation=incarnation, step=step, attempt=attempt)
        if wanted >= name:
            raise PlanDivergedError(f"a node would have a checkpoint grow from a later one: name={name} base={wanted}")
        base = self._base
        if base is None or base.name != wanted:
            base = Base.of(self._repository.read_manifest(wanted))
        if self._base is None or self._base.name < wanted:
            self._base = base
        sources = {wanted, *(row.source for row in base.manifest.stale_experts)}
        return replace(base, finite=frozenset(source for source in sources if _attempt(source) in offered.finite))

    def _base_of(self, name: CheckpointName) -> Base | None:
        """Return what the checkpoint of this name grows from; None where there is nothing that it can share."""
        if self._base is None:
            try:
                self._base = self._find_base()
            except MocError as error:
                log.warning("the checkpoint is made whole, because what it could grow from cannot be read: %s", error)
        # Behind a later one it may be gone already.
        return self._base if self._base is not None and self._base.name < name else None

    def _find_base(self) -> Base | None:
        """Return the newest checkpoint on the lineage, as everybody else would follow it.

        A stored record outranks one that only memory knows: a rewind may have taken a life's number while storage was
        away.
        """
        stored = [record for record in self._repository.incarnations()[0] if record.run == self._life.run]
        links = chain(merge_incarnations(stored, self._lineage), self._life.number)
        known = [
            name
            for name in self._listed
            if name.run == self._life.run and is_on_chain(links, name.incarnation, name.step, name.attempt)
        ]
        return Base.of(self._repository.read_manifest(max(known))) if known else None

    def _terms(self, descriptor: Mapping[str, Any], sealed: Sealed) -> Terms:
        if "rotation" in descriptor:
            rotation = Rotation(orders=tuple(map(tuple, descriptor["rotation"])))
        else:  # all experts in every commit, or an arena that an earlier version of moc has described
            topology = Topology.from_json(descriptor["topology"])
            rotation = rotation_of(expert_counts(sealed.steps), topology.ep_sizes)
        return Terms(
            policy=self._policy(descriptor["config"], is_counted=sealed.routing is not None),
            rotation=rotation,
            interval=max(1, descriptor["config"]["persist_every"]),
            faults=faults_of(self._lineage),
        )

    def _policy(self, config: Mapping[str, Any], *, is_counted: bool) -> Policy:
        k, is_by_load = config["k_persist"], config["mode"] == BY_LOAD
        if is_by_load and not is_counted and not self._has_warned:
            self._has_warned = True
            log.warning("experts take turns, because nothing counts their tokens: mode=%s", BY_LOAD)
        if k is None:
            return SelectAll()
        if not is_counted:
            return Sequential(k)
        return LoadAware(k) if is_by_load else DynamicK(k, config["plt_limit"])


def _refuse_other_experts(offered: Offered, descriptor: Mapping[str, Any]) -> None:
    """Raise PlanDivergedError unless the offers have every expert of the model, as far as the descriptor tells."""
    counts = descriptor.get("experts", [])
    model = {Expert(layer=layer, index=index) for layer, count in enumerate(counts) for index in range(count)}
    differing = sorted(model.symmetric_difference(offered.steps))
    if counts and differing:
        raise PlanDivergedError(f"offers have other experts than the model: differing={differing[:4]}")


def _attempt(name: CheckpointName) -> Attempt:
    return (name.incarnation, name.step, name.attempt)


def _steps(arena: Arena, records: Iterable[SealRecord]) -> dict[Expert, int | None]:
    """Return by expert the step of its bytes in the snapshot, None where its ranks differ."""
    return steps_of_experts(
        (unit.expert, record.steps[number])
        for record in records
        for number, unit in enumerate(arena.rank_layout(record.rank).units)
        if unit.expert is not None
    )


def _captures(arena: Arena, records: Sequence[SealRecord], steps: Mapping[Expert, int | None]) -> tuple[Capture, ...]:
    """Return the routes that the lowest rank has captured; those of the others too if it has missed a snapshot."""
    first = read_capture(arena, records[0])
    if first is None:
        return ()
    if all(step is None or first.learned_by(expert, step) is not None for expert, step in steps.items()):
        return (first,)
    others = (read_capture(arena, record) for record in records[1:])
    return (first, *(capture for capture in others if capture is not None))
