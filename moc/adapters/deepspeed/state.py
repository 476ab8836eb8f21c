"""`DeepSpeedState`: one rank's training state of a DeepSpeed engine, as `moc.training.TrainingState` describes it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

from moc.adapters.deepspeed.adam import materialise_moments, rebuild_running_powers
from moc.adapters.deepspeed.allow import check_engine
from moc.adapters.deepspeed.identity import build_fingerprint
from moc.adapters.deepspeed.layout import build_layout
from moc.adapters.deepspeed.memory import ShardMemory
from moc.adapters.deepspeed.names import moe_layers, name_parameters, name_state
from moc.adapters.deepspeed.rng import capture_rng, derive_rng, restore_rng
from moc.adapters.deepspeed.routes import RouteCounter
from moc.adapters.deepspeed.scalars import (
    capture_buffers,
    capture_engine,
    capture_groups,
    check_boundary,
    check_scheduler,
    restore_buffers,
    restore_engine,
    restore_groups,
)
from moc.adapters.deepspeed.values import live_of, plain_of
from moc.adapters.deepspeed.zero import ZeroOptimizer
from moc.errors import InternalError, MismatchError, UsageError
from moc.format.tagged import encode_state
from moc.state import RankCatalog, Shard
from moc.topology import Topology

__all__ = ["DeepSpeedState", "Stateful"]

STATE_CAPACITY_MIN_BYTES = 1 << 20
STATE_CAPACITY_FACTOR = 2  # a loader's position or a scheduler's history may grow
STATE_ALIGNMENT_BYTES = 4096
ROUTE_BYTES = 48  # per expert of the model: four counts of 8 bytes as base64


class Stateful(Protocol):
    """PyTorch's convention for an object whose state can be saved."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class DeepSpeedState:
    """The state of one engine and of the objects that belong to its training loop.

    Construction refuses, with a UsageError, whatever could not be restored bit-exactly, before it changes anything;
    then it creates the optimizer moments that the first step would create, with the same values. Collective only in
    `derive_weights`.
    """

    def __init__(
        self, engine: DeepSpeedEngine, stateful: Mapping[str, object], *, extra_fingerprint: Mapping[str, object]
    ) -> None:
        check_engine(engine)
        check_scheduler(engine)
        self._engine: Any = engine
        self._stateful = _checked_stateful(stateful)
        self._updated_at = int(engine.micro_steps)
        self._zero = ZeroOptimizer(engine.optimizer)
        self._named = name_parameters(engine.module)
        self._state_names = name_state(engine.module)
        self._fingerprint = build_fingerprint(engine, self._zero, self._named, extra_fingerprint)
        build_layout(self._zero, self._named)  # refuses before the moments are created
        own_bytes = encode_state(self._tree()).size_bytes  # names a value it cannot store
        capacity = _state_capacity(own_bytes, sum(int(layer.num_experts) for layer in moe_layers(engine.module)))
        self._materialise()
        layout = build_layout(self._zero, self._named)
        self._held = ShardMemory(layout.buffers, layout.held)
        self._wanted = ShardMemory(layout.buffers, layout.needed)
        self._needed = tuple(piece.shard for piece in layout.needed)
        self._routes = RouteCounter(engine.module)
        self._catalog = RankCatalog(
            rank=dist.get_rank(),
            shards=tuple(piece.shard for piece in layout.held),
            state_capacity_bytes=capacity,
        )

    @property
    def catalog(self) -> RankCatalog:
        """Return the shards this rank copies at every snapshot."""
        return self._catalog

    @property
    def needed(self) -> tuple[Shard, ...]:
        """Return the shards this rank must receive: as the catalog, with replicated parameters whole."""
        return self._needed

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """Return what must be equal to resume; the same on every rank."""
        return self._fingerprint

    @property
    def routes(self) -> RouteCounter:
        """Return what counts the routes of the engine's module."""
        return self._routes

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done, skipped ones included."""
        return int(self._engine.global_steps)

    @property
    def ep_sizes(self) -> tuple[tuple[str, int], ...]:
        """Return the expert-parallel size of each expert group in use, sorted by name."""
        names = sorted({entry.group_name for entry in self._named if entry.group_name is not None})
        return tuple((name, int(groups._get_expert_parallel_world_size(name))) for name in names)

    def topology(self, node_of_rank: Sequence[int]) -> Topology:
        """Return the rank grid, given the node of every rank."""
        return Topology(world_size=dist.get_world_size(), node_of_rank=tuple(node_of_rank), ep_sizes=self.ep_sizes)

    def copy_shards(self, targets: array[int], crcs: array[int]) -> None:
        """Copy and checksum every catalog shard. Thread: the snapshot thread. Blocks: until all bytes are in place."""
        self._held.copy_to(targets, crcs)

    def note_update(self) -> None:
        """Say that the engine has made a step: no gradients are accumulated now."""
        self._updated_at = int(self._engine.micro_steps)

    def note_loaded(self) -> None:
        """Say that the engine has loaded one of DeepSpeed's own checkpoints."""
        self.note_update()
        self._held.forget_frozen()

    def capture(self) -> dict[str, object]:
        """Return everything that is not a shard; arrays alias live CPU memory where they can.

        Raises: UsageError between the micro-batches of one step, whose gradients are not part of any state.
        """
        tree = self._tree()
        self._held.mark_boundary()
        return tree

    def begin_restore(self) -> None:
        """Create the optimizer moments if the optimizer has lost them since construction."""
        check_engine(self._engine)
        self._materialise()
        self._held.forget_frozen()

    def write_shard(self, index: int, offset: int, view: memoryview) -> None:
        """Copy `view` into needed shard `index` from its element `offset` on. Thread: any, on distinct ranges."""
        self._wanted.write(index, offset, view)

    def apply(self, tree: Mapping[str, object]) -> None:
        """Apply a captured tree's counters, hyper-parameters, scheduler and buffers."""
        state = cast("dict[str, Any]", tree)
        if state["stateful"].keys() != self._stateful.keys():
            raise MismatchError(
                f"stateful objects differ: stored={','.join(sorted(state['stateful']))} "
                f"present={','.join(sorted(self._stateful))}"
            )
        restore_engine(self._engine, self._zero, state)
        restore_groups(self._zero, self._named, state["groups"])  # after the scheduler, which may set learning rates
        restore_buffers(self._engine.module, state["buffers"])
        self.note_update()

    def derive_weights(self) -> None:
        """Derive the model's weights and the running powers from masters and steps. Collective."""
        self._zero.update_weights()
        rebuild_running_powers(self._zero)

    def finish_restore(self, tree: Mapping[str, object], *, exact_rank: bool) -> None:
        """Load the stateful objects, then the RNG."""
        state = cast("dict[str, Any]", tree)
        for name, item in self._stateful.items():
            item.load_state_dict(cast("dict[str, Any]", live_of(state["stateful"][name])))
        if exact_rank:
            restore_rng(state["rng"])
        else:
            derive_rng(state["rng"], self._catalog.rank)

    def _tree(self) -> dict[str, object]:
        check_boundary(self._engine, updated_at=self._updated_at)
        return {
            **capture_engine(self._engine, self._zero),
            "groups": capture_groups(self._zero, self._named),
            "buffers": capture_buffers(self._engine.module),
            **self._state_names,
            "stateful": {
                name: plain_of(item.state_dict(), f"stateful[{name!r}]", is_lenient=False)
                for name, item in self._stateful.items()
            },
            "rng": capture_rng(),  # last: a state_dict() that draws numbers is part of the step
        }

    def _materialise(self) -> None:
        if materialise_moments(self._zero):
            # DeepSpeed links parameters to their moments once; it must do so again for new ones.
            self._zero.optimizer._hp_optimizer_states_linked = False


def _checked_stateful(stateful: Mapping[str, object]) -> dict[str, Stateful]:
    for name, item in stateful.items():
        if not (callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))):
            raise UsageError(
                f"object cannot be saved: stateful={name} type={type(item).__qualname__} "
                "allowed=state_dict() and load_state_dict()"
            )
    return cast("dict[str, Stateful]", dict(sorted(stateful.items())))


def _state_capacity(size_bytes: int, experts: int) -> int:
    if size_bytes <= 0:
        raise InternalError(f"state blob has no bytes: size_bytes={size_bytes}")
    wanted = max(STATE_CAPACITY_MIN_BYTES, STATE_CAPACITY_FACTOR * (size_bytes + ROUTE_BYTES * experts))
    return -(-wanted // STATE_ALIGNMENT_BYTES) * STATE_ALIGNMENT_BYTES
