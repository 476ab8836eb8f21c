"""Builds real repositories for tests: a small sharded model with experts, written by the format's own codecs.

The model: dense tensors split flat over the ranks (uneven cuts, as ZeRO makes them), and experts spread over the ranks,
so the expert-parallel size is the world size. Values depend on tensor, part, step and seed,
never on who writes them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from moc._native import crc32c
from moc.format.keys import CheckpointName, object_key, parse_object_key
from moc.format.manifest import Incarnation, Manifest, ObjectRow, Parent
from moc.format.object import ObjectHeader, StoredShard, align, encode_header
from moc.format.stale import StaleExpert, sources
from moc.format.tagged import ArrayValue, encode_state
from moc.repository import Repository
from moc.routing import Routing
from moc.state import Expert, RankCatalog, Shard, catalog_digest, check_coverage, shard_order
from moc.store.port import Store
from moc.topology import Topology

__all__ = [
    "Model",
    "RepositoryBuilder",
    "build_history",
    "build_partial_history",
    "shard_bytes",
    "state_tree",
    "tensor_bytes",
]

ROUTES_PER_STEP = 100  # of every expert
PARTS = ("exp_avg", "exp_avg_sq", "master")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is trained, and on how many ranks."""

    world_size: int = 2
    moe_layers: int = 2
    experts: int = 4
    hidden: int = 24
    dense: tuple[tuple[str, tuple[int, ...]], ...] = (("embed.weight", (97, 24)), ("norm.weight", (7,)))
    state_capacity_bytes: int = 16384

    def catalogs(self) -> tuple[RankCatalog, ...]:
        """Return who holds which shard, by rank."""
        return tuple(
            RankCatalog(
                rank=rank,
                shards=tuple(sorted([*self._dense_of(rank), *self._experts_of(rank)], key=shard_order)),
                state_capacity_bytes=self.state_capacity_bytes,
            )
            for rank in range(self.world_size)
        )

    def topology(self) -> Topology:
        sizes = (("ep_size_" + str(self.world_size), self.world_size),) if self.moe_layers else ()
        return Topology(world_size=self.world_size, node_of_rank=(0,) * self.world_size, ep_sizes=sizes)

    def grid(self) -> tuple[Expert, ...]:
        """Return all experts, sorted."""
        return tuple(Expert(layer=layer, index=i) for layer in range(self.moe_layers) for i in range(self.experts))

    def _dense_of(self, rank: int) -> list[Shard]:
        shards = []
        for tensor, shape in self.dense:
            first, last = (prod(shape) * r // self.world_size for r in (rank, rank + 1))
            if last > first:
                shards += [_shard(tensor, part, shape, first, last - first, None) for part in PARTS]
        return shards

    def _experts_of(self, rank: int) -> list[Shard]:
        shape = (self.hidden, 2 * self.hidden)
        per_rank = self.experts // self.world_size
        return [
            _shard(f"layers.{layer}.experts.{index}.w1", part, shape, 0, prod(shape), Expert(layer=layer, index=index))
            for layer in range(self.moe_layers)
            for index in range(rank * per_rank, (rank + 1) * per_rank)
            for part in PARTS
        ]


@dataclass(slots=True)
class RepositoryBuilder:
    """Writes lives and checkpoints of one run into a store."""

    store: Store
    run: str = "run-7"
    model: Model = field(default_factory=Model)
    seed: int = 0
    fingerprint: Mapping[str, object] = field(default_factory=lambda: {"optimizer": "AdamW", "parameters": 9})
    versions: Mapping[str, object] = field(default_factory=lambda: {"moc": "0.1.0", "torch": "2.13.0"})
    repository: Repository = field(init=False)

    def __post_init__(self) -> None:
        self.repository = Repository(self.store)
        self.repository.create()

    def begin(self, number: int, *, parent: Parent | None = None, reason: str | None = None) -> Incarnation:
        """Begin a life of the job."""
        record = Incarnation(
            run=self.run,
            number=number,
            token=f"{number:08x}",
            parent=parent,
            reason=reason or ("start" if parent is None else "recover"),
            fingerprint=self.fingerprint,
        )
        self.repository.put_incarnation(record)
        return record

    def commit(
        self,
        incarnation: int,
        step: int,
        *,
        attempt: str | None = None,
        parent: Parent | None = None,
        is_finite: bool = True,
        base: Manifest | None = None,
        written: Mapping[Expert, int] | None = None,
        routing: Routing | None = None,
    ) -> Manifest:
        """Write one checkpoint, its manifest last; without a base a whole one.

        `written` are the experts that it writes, with the steps of their bytes; the others are those of the base.
        """
        name = self.name(incarnation, step, attempt=attempt)
        catalogs = self.model.catalogs()
        steps = dict.fromkeys(self.model.grid(), step) if written is None else written
        rows = [row for catalog in catalogs for row in self.write_objects(name, catalog, steps)]
        stale = self._stale(name, steps, base)
        others = set(sources(stale)) - {name}
        if base is not None:
            rows += [row for row in base.objects if _owner_of_experts(row) in others]
        manifest = Manifest(
            name=name,
            parent=parent,
            topology=self.model.topology().to_json(),
            catalog_digest=catalog_digest(catalogs),
            tensors=check_coverage(shard for catalog in catalogs for shard in catalog.shards),
            objects=tuple(sorted(rows, key=lambda row: row.key)),
            fingerprint=self.fingerprint,
            versions=self.versions,
            is_finite=is_finite,
            stale_experts=stale,
            routing=routing,
        )
        self.repository.put_manifest(manifest)
        return manifest

    def turn(self, step: int) -> dict[Expert, int]:
        """Return whose turn it is in each layer; every third time the version in memory is two steps old."""
        number = step // 10
        experts = (
            Expert(layer=layer, index=(number + layer) % self.model.experts) for layer in range(self.model.moe_layers)
        )
        return dict.fromkeys(experts, step if number % 3 else step - 2)

    def routing(self, step: int) -> Routing:
        """Return the routes up to a step; a recovery at step 30 took the first expert of each layer from step 10."""
        count, experts = ROUTES_PER_STEP * step, self.model.experts
        learned = (count - 20 * ROUTES_PER_STEP, *(count for _ in range(1, experts)))
        layers = self.model.moe_layers
        return Routing(basis="kept", routed=((count,) * experts,) * layers, learned=(learned,) * layers)

    def name(self, incarnation: int, step: int, *, attempt: str | None = None) -> CheckpointName:
        attempt = attempt or hashlib.sha256(f"{incarnation}/{step}".encode()).hexdigest()[:8]
        return CheckpointName(run=self.run, incarnation=incarnation, step=step, attempt=attempt)

    def _stale(
        self, name: CheckpointName, written: Mapping[Expert, int], base: Manifest | None
    ) -> tuple[StaleExpert, ...]:
        """Return the rows of the experts that the checkpoint does not write at its step."""
        rows = []
        for expert in self.model.grid():
            if written.get(expert) == name.step:
                continue
            if expert in written:
                source, step = name, written[expert]
            else:
                assert base is not None, "without a base every expert is written"
                source, step = base.version(expert)
            rows.append(StaleExpert(expert=expert, step=step, source=source, routed=ROUTES_PER_STEP * step))
        return tuple(rows)

    def write_objects(
        self, name: CheckpointName, catalog: RankCatalog, written: Mapping[Expert, int] | None = None
    ) -> list[ObjectRow]:
        """Write one rank's objects and return their manifest rows; `written`: of which experts, by default of all."""
        dense = [shard for shard in catalog.shards if shard.expert is None]
        experts = [s for s in catalog.shards if s.expert is not None and (written is None or s.expert in written)]
        rows = [self._write_object(name, catalog.rank, "d", dense, state_tree(catalog.rank, name.step))]
        if experts:
            rows.append(self._write_object(name, catalog.rank, "e00", experts, None, written))
        return rows

    def _write_object(
        self,
        name: CheckpointName,
        rank: int,
        piece: str,
        shards: Sequence[Shard],
        state: object,
        steps: Mapping[Expert, int] | None = None,
    ) -> ObjectRow:
        data = bytearray()
        stored = []
        for shard in shards:
            step = name.step if steps is None or shard.expert is None else steps[shard.expert]
            content = shard_bytes(shard, step, self.seed)
            stored.append(StoredShard(shard=shard, step=step, position=len(data), crc32c=crc32c(content)))
            data += content.ljust(align(len(content)), b"\0")
        state_row = None
        if state is not None:
            blob = encode_state(state).to_bytes()
            state_row = (len(data), len(blob), crc32c(blob))
            data += blob.ljust(align(len(blob)), b"\0")
        header = encode_header(
            ObjectHeader(name=name, rank=rank, piece=piece, shards=tuple(stored), state=state_row, data_bytes=len(data))
        )
        key = object_key(name, rank, piece)
        self.repository.put_object(key, [memoryview(header), memoryview(data)])
        return ObjectRow(
            key=key, size_bytes=len(header) + len(data), header_bytes=len(header), header_crc32c=crc32c(header)
        )


def _owner_of_experts(row: ObjectRow) -> CheckpointName | None:
    name, _, piece = parse_object_key(row.key)
    return None if piece == "d" else name


def state_tree(rank: int, step: int) -> dict[str, object]:
    """Return what a rank stores beside its shards."""
    noise = memoryview(hashlib.shake_128(f"rng/{rank}/{step}".encode()).digest(256))
    return {
        "counters": {"global_steps": step, "skipped_steps": 0},
        "rng": ArrayValue(dtype="U8", shape=(256,), kind="torch", data=noise),
        "scheduler": {"last_lr": [1e-3 / (1 + step)], "betas": (0.9, 0.95)},
    }


def shard_bytes(shard: Shard, step: int, seed: int = 0) -> bytes:
    """Return the bytes that a builder with this seed stores for a shard."""
    whole = tensor_bytes(shard.tensor, shard.part, prod(shard.shape), step, seed)
    return whole[shard.offset * 4 : (shard.offset + shard.length) * 4]


def tensor_bytes(tensor: str, part: str, elements: int, step: int, seed: int = 0) -> bytes:
    """Return a whole tensor's bytes: finite float32 values between -2 and 2."""
    noise = hashlib.shake_128(f"{seed}/{tensor}/{part}/{step}".encode()).digest(elements)
    return array("f", [byte / 64 - 2 for byte in noise]).tobytes()


def _shard(tensor: str, part: str, shape: tuple[int, ...], offset: int, length: int, expert: Expert | None) -> Shard:
    return Shard(tensor=tensor, part=part, dtype="F32", shape=shape, offset=offset, length=length, expert=expert)


def build_history(store: Store, *, model: Model | None = None) -> RepositoryBuilder:
    """Write three lives: steps 10, 20, 30; a fork at 20 with its own 30, 40; a rewind to that 30, nothing saved yet."""
    builder = RepositoryBuilder(store, model=model or Model())
    builder.begin(1)
    for step in (10, 20, 30):
        builder.commit(1, step)
    builder.begin(2, parent=Parent(incarnation=1, step=20, attempt=builder.name(1, 20).attempt))
    for step in (30, 40):
        builder.commit(2, step)
    builder.begin(3, parent=Parent(incarnation=2, step=30, attempt=builder.name(2, 30).attempt), reason="rewind")
    return builder


def build_partial_history(
    store: Store, *, run: str = "run-7", model: Model | None = None, ranks_after: int = 4, last_step: int = 50
) -> RepositoryBuilder:
    """Write two lives of partial checkpoints, one expert of each layer in turn, the second on other ranks.

    Step 10 is whole, 20 and 30 are partial, and 30 writes versions that are older than it. The second life forks at 30
    and goes on with 40 and 50, which share what the first has left.
    """
    builder = RepositoryBuilder(store, run=run, model=model or Model())
    builder.begin(1)
    base = builder.commit(1, 10)
    for step in (20, 30):
        base = builder.commit(1, step, parent=_parent_of(base), base=base, written=builder.turn(step))
    builder.begin(2, parent=_parent_of(base))
    builder.model = replace(builder.model, world_size=ranks_after)
    for step in range(40, last_step + 1, 10):
        written = builder.turn(step)
        routing = builder.routing(step)
        base = builder.commit(2, step, parent=_parent_of(base), base=base, written=written, routing=routing)
    return builder


def _parent_of(manifest: Manifest) -> Parent:
    name = manifest.name
    return Parent(incarnation=name.incarnation, step=name.step, attempt=name.attempt)
