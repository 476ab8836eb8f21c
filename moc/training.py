"""The port between the torch-free core and whatever trains: what a snapshot reads and what a restore writes.

`moc.adapters.deepspeed` implements it for a DeepSpeed engine; the crash tests implement it over plain memory. One
object per rank.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol

from moc.state import RankCatalog, Shard

__all__ = ["RouteSource", "TrainingState", "World"]


class TrainingState(Protocol):
    """One rank's training state. Thread: the training thread, unless a method says otherwise."""

    @property
    def catalog(self) -> RankCatalog:
        """Return the shards this rank copies at every snapshot; constant for the life of the object."""

    @property
    def needed(self) -> tuple[Shard, ...]:
        """Return the shards this rank must receive at a restore, sorted.

        A superset of the catalog where others hold a part.
        """

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """Return what must be equal to resume, as plain JSON values; the number of ranks is not part of it."""

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done, skipped ones included."""

    @property
    def routes(self) -> RouteSource | None:
        """Return what the engine counts by itself, None for nothing."""

    def copy_shards(self, targets: array[int], crcs: array[int]) -> None:
        """Copy every catalog shard i to address `targets[i]` ('Q') and put its crc32c into `crcs[i]` ('I').

        A target of 0 means "leave this shard out": it is not read, and its place in `crcs` stays as it is.

        Thread: the snapshot thread, while forward and backward passes run. The memory read here must not change before
        the next weight update. Blocks: until all bytes are in place.
        """

    def capture(self) -> dict[str, object]:
        """Return what the next forward pass or the loop may change: counters, RNG, scalers, buffers, stateful objects.

        The result is a tree of None, bool, int, float, str, bytes, list, tuple, dict and
        `moc.format.tagged.ArrayValue`; arrays may alias live memory, so the caller must encode the tree before it
        returns to the training loop.
        """

    def begin_restore(self) -> None:
        """Create what a fresh engine does not have yet (optimizer moments), so that every needed shard has memory to
        receive it.
        """

    def write_shard(self, index: int, offset: int, view: memoryview) -> None:
        """Copy `view` into needed shard `index`, starting at element `offset` of that shard.

        Thread: any; distinct ranges in parallel.
        """

    def apply(self, tree: Mapping[str, object]) -> None:
        """Apply a captured tree's counters, hyper-parameters and buffers.

        Not collective: it may raise on one rank alone.
        """

    def derive_weights(self) -> None:
        """Derive from the shards what follows from them (low-precision weights, running optimizer powers).

        Collective.
        """

    def finish_restore(self, tree: Mapping[str, object], *, exact_rank: bool) -> None:
        """Load the stateful objects, and the RNG last, so that nothing draws from it afterwards. Not collective.

        `exact_rank` is False when the tree was captured by another rank (the world size changed): per-rank items are
        then derived.
        """


class World(Protocol):
    """The few collectives that the workflows need, on a side channel of their own.

    Thread: the training thread. Blocks: with a timeout.

    Every method is called by all ranks in the same order.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload, by rank."""

    def broadcast(self, payload: bytes | None) -> bytes:
        """Return rank 0's payload on every rank; others pass None."""

    def start_max(self, values: Sequence[int]) -> None:
        """Begin an element-wise maximum over the ranks (at most 8 non-negative int64); at most one may be under way."""

    def finish_max(self) -> tuple[int, ...] | None:
        """Return the result of the pending `start_max`, or None if there is none."""

    def sum_up(self, values: array[int]) -> array[int]:
        """Return the element-wise sum over the ranks ('q', as many values everywhere); the sum must fit int64."""


class RouteSource(Protocol):
    """What a training engine counts by itself, away from the host's memory. Thread: the training thread."""

    @property
    def basis(self) -> str:
        """Return what is counted, one of `moc.routing.BASES`; constant."""

    def take(self) -> Sequence[tuple[int, object]]:
        """Return what was counted since the last call, as (MoE layer, counts by expert). Blocks: for the device."""
