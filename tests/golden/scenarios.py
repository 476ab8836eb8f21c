"""Small repositories of format 1 that cover it: what is in them, and the production code that writes them.

Everything is fixed: names, attempts, values. `expected` says what a reader must find, computed from the values alone.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from moc._native import copy_crc32c
from moc.commit import CommitPlan, build_manifest, commit
from moc.format.manifest import Incarnation, Manifest, Parent
from moc.format.tagged import ArrayValue
from moc.gc import Retention
from moc.host import SystemHost
from moc.persist import checkpoint_name, persist_rank, read_base
from moc.plan.layout import arrange_arena
from moc.plan.rotation import expert_counts, rotation_of
from moc.plan.turns import Turns
from moc.repository import Repository
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import PERSIST, SealRecord
from moc.snapshot.snapshotter import Begun, Snapshotter
from moc.state import Expert, RankCatalog, Shard, catalog_digest, check_coverage, shard_order
from moc.store.port import Store
from moc.topology import Topology
from moc.trace import Trace
from tests.golden.describe import describe
from tests.support.repository import Model, build_partial_history, shard_bytes, state_tree

__all__ = ["RUN", "SCENARIOS", "Golden", "expected", "small_state", "tiny_catalog", "tiny_shard"]

RUN = "golden-1"
PARTS = ("exp_avg", "exp_avg_sq", "master")
DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "I64",
    "U64",
    "F64",
)
STATE_CAPACITY_BYTES = 8192
DEADLINE_S = 60.0
FINGERPRINT = {"lr": "0.001", "model": "golden", "parameters": 3, "tied": None}
VERSIONS = {"deepspeed": "0.19.8", "moc": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}


@dataclass
class Golden:
    """One repository under construction: lives and checkpoints through the code that jobs use."""

    store: Store
    catalogs: tuple[RankCatalog, ...]
    state_of: Callable[[int, int], dict[str, object]]
    checkpoints: dict[str, dict[str, object]] = field(default_factory=dict)
    lineage: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.repository = Repository(self.store)
        self.repository.create()
        size = len(self.catalogs)
        ep_sizes = (("ep_size_2", 2),) if size == 2 else ()
        self.plan = CommitPlan(
            ranks=tuple(range(size)),
            digest=catalog_digest(self.catalogs),
            tensors=check_coverage(shard for catalog in self.catalogs for shard in catalog.shards),
            topology=Topology(world_size=size, node_of_rank=(0,) * size, ep_sizes=ep_sizes).to_json(),
            fingerprint=FINGERPRINT,
            versions=VERSIONS,
        )

    def begin(self, number: int, reason: str, parent: Parent | None = None) -> None:
        """Write a life's record."""
        record = Incarnation(
            run=RUN,
            number=number,
            token=f"{0xA0 + number:08x}",
            parent=parent,
            reason=reason,
            fingerprint=FINGERPRINT,
        )
        self.repository.put_incarnation(record)

    def save(self, incarnation: int, steps: Mapping[int, Parent | None], *, nan_at: int | None = None) -> None:
        """Take a snapshot of each step into one arena, so that slots are used again, and commit it."""
        descriptor = {"versions": 2, "catalogs": [catalog.to_json() for catalog in self.catalogs]}
        layout = arrange_arena(self.catalogs, versions=2, descriptor_bytes=descriptor_room(descriptor))
        arena = Arena.create(descriptor, layout, name="golden")
        states = [_Values(catalog, self.state_of) for catalog in self.catalogs]
        snapshotters = [
            Snapshotter(
                state,  # type: ignore[arg-type]  # a snapshot needs the catalog, the values and the small state only
                arena,
                rank=state.catalog.rank,
                run=RUN,
                incarnation=incarnation,
                digest=self.plan.digest,
                turns=_turns(states),
                on_sealed=lambda _step: None,
                host=SystemHost(),
                trace=Trace(),
            )
            for state in states
        ]
        try:
            for count, (step, parent) in enumerate(steps.items(), start=1):
                for state in states:
                    state.advance(incarnation, step, has_nan=step == nan_at)
                attempt = f"{count:02x}{incarnation:02x}{step:04x}"
                records = [_seal(snapshotter, arena, step, attempt) for snapshotter in snapshotters]
                self._commit(arena, records, parent, [state.values for state in states])
        finally:
            for snapshotter in snapshotters:
                snapshotter.close()
            arena.close()

    def retain(self, incarnation: int, *, keep_last: int) -> None:
        """Do one round of retention, as after a commit."""
        retention = Retention(
            self.repository, run=RUN, incarnation=incarnation, keep_last=keep_last, keep_every=0, trace=Trace()
        )
        for name in retention.after_commit():
            del self.checkpoints[str(name)]

    def _commit(
        self, arena: Arena, records: list[SealRecord], parent: Parent | None, values: list[dict[str, bytes]]
    ) -> None:
        base = read_base(arena, records[0])
        receipts = [persist_rank(arena, record, self.repository, base=base, trace=Trace()) for record in records]
        manifest = build_manifest(self.plan, checkpoint_name(records[0]), parent, receipts)
        commit(self.repository, manifest, trace=Trace())
        for record in records:
            for index, sealed in arena.seals(record.rank).items():
                if sealed.step == record.step:
                    arena.free(record.rank, index)
        self.checkpoints[str(manifest.name)] = self._contents(manifest, values)

    def _contents(self, manifest: Manifest, values: list[dict[str, bytes]]) -> dict[str, object]:
        step = manifest.name.step
        pieces: dict[str, list[tuple[int, bytes]]] = {}
        facts: dict[str, tuple[str, list[int]]] = {}
        for catalog, held in zip(self.catalogs, values, strict=True):
            for shard in catalog.shards:
                name = f"{shard.part}/{shard.tensor}"
                facts[name] = (shard.dtype, list(shard.shape))
                pieces.setdefault(name, []).append((shard.offset, held[shard.name]))
        tensors = {
            name: [*facts[name], hashlib.sha256(b"".join(content for _, content in sorted(rows))).hexdigest()]
            for name, rows in sorted(pieces.items())
        }
        states = {str(catalog.rank): describe(self.state_of(catalog.rank, step)) for catalog in self.catalogs}
        return {"is_finite": manifest.is_finite, "tensors": tensors, "states": states}


class _Values:
    """What a snapshot copies: the bytes of every shard of a rank at one step of one life."""

    def __init__(self, catalog: RankCatalog, state_of: Callable[[int, int], dict[str, object]]) -> None:
        self.catalog, self._state_of = catalog, state_of
        self.values: dict[str, bytes] = {}
        self._step = 0

    def advance(self, incarnation: int, step: int, *, has_nan: bool) -> None:
        self._step = step
        self.values = {shard.name: _values(shard, incarnation, step) for shard in self.catalog.shards}
        if has_nan:
            first = next(shard for shard in self.catalog.shards if shard.dtype == "F32")
            self.values[first.name] = struct.pack("<f", float("nan")) + self.values[first.name][4:]

    def copy_shards(self, targets: array[int], crcs: array[int]) -> None:
        buffers = [array("B", content) for content in self.values.values()]
        sources = array("Q", (buffer.buffer_info()[0] for buffer in buffers))
        copy_crc32c(sources, targets, array("Q", map(len, buffers)), crcs)

    def capture(self) -> dict[str, object]:
        return self._state_of(self.catalog.rank, self._step)


def _turns(states: Sequence[_Values]) -> Turns:
    shards = [shard for state in states for shard in state.catalog.shards]
    counts = expert_counts(shard.expert for shard in shards if shard.expert is not None)
    return Turns(rotation_of(counts, ()), k=None, every=1)


def _seal(snapshotter: Snapshotter, arena: Arena, step: int, attempt: str) -> SealRecord:
    begun = snapshotter.begin(step, flags=PERSIST, attempt=attempt)
    assert begun is Begun.STARTED, f"{begun} {snapshotter.counters.last_problem}"
    assert snapshotter.wait_finished(DEADLINE_S)
    rank = snapshotter._rank
    return next(record for record in arena.seals(rank).values() if record.step == step)


def _values(shard: Shard, incarnation: int, step: int) -> bytes:
    """Return a shard's bytes: a part of the whole tensor's, which depends on tensor, part, life and step only."""
    elements = prod(shard.shape)
    noise = hashlib.shake_128(f"{shard.tensor}/{shard.part}/{incarnation}/{step}".encode()).digest(8 * elements)
    numbers = [noise[i] / 64 - 2 for i in range(elements)]
    match shard.dtype:
        case "F16" | "F32" | "F64":
            whole = struct.pack(f"<{elements}{ {'F16': 'e', 'F32': 'f', 'F64': 'd'}[shard.dtype] }", *numbers)
        case "BF16":  # the upper half of a float32
            whole = b"".join(struct.pack("<f", number)[2:] for number in numbers)
        case "BOOL":
            whole = bytes(byte & 1 for byte in noise[:elements])
        case "F8_E4M3" | "F8_E5M2":
            whole = bytes(byte & 0x3F for byte in noise[:elements])
        case _:
            whole = noise[: elements * int(shard.dtype[1:]) // 8]
    width = len(whole) // elements if elements else 0
    return whole[shard.offset * width : (shard.offset + shard.length) * width]


def tiny_shard(
    tensor: str, part: str, shape: tuple[int, ...], dtype: str = "F32", *, cut: tuple[int, int] | None = None,
    expert: Expert | None = None,
) -> Shard:  # fmt: skip
    first, last = cut or (0, prod(shape))
    return Shard(tensor=tensor, part=part, dtype=dtype, shape=shape, offset=first, length=last - first, expert=expert)


def tiny_catalog(rank: int, shards: list[Shard]) -> RankCatalog:
    ordered = tuple(sorted(shards, key=shard_order))
    return RankCatalog(rank=rank, shards=ordered, state_capacity_bytes=STATE_CAPACITY_BYTES)


def small_state(rank: int, step: int) -> dict[str, object]:
    noise = memoryview(hashlib.shake_128(f"rng/{rank}/{step}".encode()).digest(16 + step))
    return {"step": step, "rng": ArrayValue(dtype="U8", shape=(noise.nbytes,), kind="torch", data=noise)}


def _mostly_alike(rank: int, step: int) -> dict[str, object]:
    """Return a tree of which ranks have most alike: what differs is one of three buffers, and random numbers."""
    noise = hashlib.shake_128(f"buffers/{step}".encode()).digest(600)
    buffers = {"mask": noise[:300], "mean": noise[300:340] + bytes([rank]), "router": noise[341:]}
    return {
        "engine": {"global_steps": step, "names": ["layers.0", "layers.1"] * 9},
        "buffers": {
            name: ArrayValue(dtype="U8", shape=(len(data),), kind="torch", data=memoryview(data))
            for name, data in buffers.items()
        },
        **small_state(rank, step),
    }


def _every_value(rank: int, step: int) -> dict[str, object]:
    """Return a tree with a value of each kind that a state may hold."""
    numbers = memoryview(struct.pack("<6f", *(step + i / 4 for i in range(6))))
    integers = memoryview(struct.pack("<2q", -step, 2**62))
    return {
        "rank": rank,
        "constants": [None, True, False],
        "integers": (0, -1, step, 2**70, -(2**200)),
        "floats": [0.0, -0.0, 0.1, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"), step / 3],
        "texts": ["", "plain", 'quo"te\\', "nul\0", "übung ☃ 🦉", "x" * step],
        "bytes": [b"", b"\0\xff", bytes(range(256))],
        "nested": {"list": [[], [[1]]], "tuple": ((), (1, (2,))), "empty": {}},
        "keys": {1: "int", "1": "text", (1, 2): "tuple", None: "none", 2.5: "float", b"k": "bytes"},
        "arrays": {
            "torch": ArrayValue(dtype="F32", shape=(2, 3), kind="torch", data=numbers),
            "numpy": ArrayValue(dtype="I64", shape=(2,), kind="numpy", data=integers),
            "scalar": ArrayValue(dtype="F32", shape=(), kind="torch", data=numbers[:4]),
            "empty": ArrayValue(dtype="F64", shape=(0, 3), kind="numpy", data=numbers[:0]),
        },
        "order": {"z": 1, "a": 2, "m": 3},
    }


def _one_rank(store: Store) -> Golden:
    """One rank without experts: every dtype, every kind of state, and a step with a NaN."""
    shards = [tiny_shard("embed.weight", part, (3, 5)) for part in PARTS]
    shards += [tiny_shard(f"frozen.{dtype.lower()}", "weight", (2, 3), dtype) for dtype in DTYPES]
    golden = Golden(store, (tiny_catalog(0, [*shards, tiny_shard("scalar", "master", ())]),), _every_value)
    golden.begin(1, "start")
    golden.save(1, {1: None, 2: Parent(incarnation=1, step=1, attempt="01010001")}, nan_at=2)
    golden.lineage = sorted(golden.checkpoints, reverse=True)
    return golden


def _two_ranks(store: Store, state_of: Callable[[int, int], dict[str, object]] = small_state) -> Golden:
    """Two ranks: dense tensors cut in unequal parts, two experts in each of two layers, one per rank."""
    catalogs = []
    for rank in range(2):
        shards = [tiny_shard("embed.weight", part, (5, 7), cut=((0, 18), (18, 35))[rank]) for part in PARTS]
        shards += [
            tiny_shard(f"layers.{layer}.experts.{rank}.w", part, (2, 4), expert=Expert(layer=layer, index=rank))
            for part in PARTS
            for layer in range(2)
        ]
        catalogs.append(tiny_catalog(rank, shards))
    golden = Golden(store, tuple(catalogs), state_of)
    golden.begin(1, "start")
    golden.save(1, {3: None})
    golden.lineage = sorted(golden.checkpoints)
    return golden


def _lives(store: Store) -> Golden:
    """A fork at step 2, a rewind to it, a life from memory, and a round of retention that left a victim list."""
    golden = Golden(store, (tiny_catalog(0, [tiny_shard("w", "master", (2, 2))]),), small_state)

    def grown(incarnation: int, step: int, attempt: str | None) -> Parent:
        return Parent(incarnation=incarnation, step=step, attempt=attempt)

    golden.begin(1, "start")
    golden.save(1, {1: None, 2: grown(1, 1, "01010001"), 3: grown(1, 2, "02010002")})
    golden.begin(2, "recover", grown(1, 2, "02010002"))
    golden.save(2, {3: grown(1, 2, "02010002")})
    golden.begin(3, "rewind", grown(1, 2, "02010002"))
    golden.begin(4, "recover", grown(3, 4, None))
    golden.save(4, {5: grown(3, 4, None), 6: grown(4, 5, "01040005")})
    golden.retain(4, keep_last=3)
    golden.lineage = ["000004-golden-1/000000000006-02040006", "000004-golden-1/000000000005-01040005"]
    golden.lineage += ["000001-golden-1/000000000002-02010002"]
    return golden


def _steps(*layers: tuple[int, ...]) -> dict[Expert | None, int]:
    rows = enumerate(layers)
    return {Expert(layer=layer, index=index): step for layer, steps in rows for index, step in enumerate(steps)}


PARTIAL_STEPS: Mapping[int, Mapping[Expert | None, int]] = {
    10: {},
    20: _steps((10, 10, 20, 10), (10, 10, 10, 20)),
    30: _steps((10, 10, 20, 28), (28, 10, 10, 20)),
    40: _steps((40, 10, 20, 28), (28, 40, 10, 20)),
}
"""By checkpoint of the scenario "partial" the step of each expert's bytes."""


def _partial(store: Store) -> Golden:
    """Two lives that write one of four experts in each of two layers, the second on one rank instead of two.

    The newest checkpoint has experts of four attempts, of which one wrote versions that were older than itself.
    """
    model = Model(hidden=2, dense=(("embed.weight", (5, 7)),))
    builder = build_partial_history(store, run=RUN, model=model, ranks_after=1, last_step=40)
    golden = Golden(store, model.catalogs(), state_tree)
    for stored in builder.repository.checkpoints():
        manifest = builder.repository.read_manifest(stored.name)
        ranks = int(str(manifest.topology["world_size"]))
        golden.catalogs = replace(model, world_size=ranks).catalogs()
        values = [
            {
                shard.name: shard_bytes(shard, PARTIAL_STEPS[stored.name.step].get(shard.expert, stored.name.step))
                for shard in catalog.shards
            }
            for catalog in golden.catalogs
        ]
        golden.checkpoints[str(stored.name)] = golden._contents(manifest, values)
    golden.lineage = sorted(golden.checkpoints, reverse=True)
    return golden


SCENARIOS: Mapping[str, Callable[[Store], Golden]] = {
    "one-rank": _one_rank,
    "two-ranks": _two_ranks,
    "lives": _lives,
    "partial": _partial,
    "alike": lambda store: _two_ranks(store, _mostly_alike),
}


def expected(golden: Golden) -> dict[str, object]:
    """Return what every reader must find."""
    return {"lineage": golden.lineage, "checkpoints": dict(sorted(golden.checkpoints.items()))}
