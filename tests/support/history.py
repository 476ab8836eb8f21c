"""A job's history by hand: seals in a real arena and checkpoints in a real repository, at whatever steps a test wants.

The bytes of every rank and step are those of an undisturbed `PlainState`, so whatever a recovery takes can be compared
bit by bit with the step that it says. Tokens are routed by a formula, so losses can be counted again.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from moc._native import crc32c
from moc.format.keys import CheckpointName, parse_object_key
from moc.format.manifest import Manifest, ObjectRow
from moc.format.stale import StaleExpert, sources
from moc.format.tagged import ArrayValue, encode_state
from moc.held import MemorySource, held_parts
from moc.layers import Open
from moc.persist import persist_rank, read_base
from moc.plan.layout import arrange_arena
from moc.plan.lineage import MEMORY, STORAGE, Candidate
from moc.recover import Source, StorageSource
from moc.repository import Repository
from moc.routing import Capture, Routing
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.seal import SealRecord
from moc.state import Expert, catalog_digest
from moc.store.memory import MemoryStore
from moc.topology import Topology
from moc.trace import Trace
from tests.support.plain import PlainState, SocketWorld

__all__ = ["EXPERTS", "LAYERS", "History", "Undisturbed", "every_rank", "plain", "routes"]

T = TypeVar("T")
LAYERS, EXPERTS = 2, 3
ELEMENTS = {"dense_elements": 331, "expert_elements": 61}
RUN = "run-7"
DEADLINE_S = 30.0


def routes(expert: Expert, step: int) -> int:
    """Return the tokens routed to an expert by a step."""
    return step * (10 * expert.layer + expert.index + 1)


class Undisturbed:
    """The tensors of every rank of a world after any number of steps."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._states = [plain(rank, size) for rank in range(size)]
        self._values = [[[value.copy() for value in state.values] for state in self._states]]

    def at(self, step: int, rank: int) -> list[np.ndarray]:
        while len(self._values) <= step:
            for state in self._states:
                state.advance()
            self._values.append([[value.copy() for value in state.values] for state in self._states])
        return self._values[step][rank]


def plain(rank: int, size: int) -> PlainState:
    """Return a rank's fresh state of the model that all histories have."""
    return PlainState(rank, size, layers=LAYERS, experts=EXPERTS, **ELEMENTS)


@dataclass(slots=True)
class History:
    """One arena and one repository of a life of `size` ranks; `close` unmaps the arena."""

    size: int
    is_counted: bool = True
    counted_from: int = 0
    """The step at which counting began anew."""
    store: MemoryStore = field(default_factory=MemoryStore)
    undisturbed: Undisturbed = field(init=False)
    repository: Repository = field(init=False)
    arena: Arena = field(init=False)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    """By step."""
    records: dict[int, dict[int, SealRecord]] = field(default_factory=dict)
    """By step and rank."""

    def __post_init__(self) -> None:
        self.undisturbed = Undisturbed(self.size)
        self.repository = Repository(self.store)
        self.repository.create()
        catalogs = [plain(rank, self.size).catalog for rank in range(self.size)]
        descriptor = {"catalogs": [c.to_json() for c in catalogs], "versions": 4, "software": {"worker": "1"}}
        room = descriptor_room(descriptor)
        self.arena = Arena.create(
            descriptor, arrange_arena(catalogs, versions=4, descriptor_bytes=room), name="history"
        )

    @property
    def grid(self) -> list[Expert]:
        return [Expert(layer=layer, index=index) for layer in range(LAYERS) for index in range(EXPERTS)]

    def seal(self, step: int, versions: Mapping[tuple[int, Expert], int] | None = None) -> Candidate:
        """Seal a snapshot of all ranks; `versions` are the experts of ranks whose bytes are of an earlier step."""
        record_index = len(self.records)
        older = dict(versions or {})
        for rank in range(self.size):
            units = self.arena.rank_layout(rank).units
            steps = [step if u.expert is None else older.get((rank, u.expert), step) for u in units]
            slots = array("I", [record_index] * len(units))
            crcs = array("I")
            offsets = iter(self.arena.shard_offsets(rank, slots))
            shards = self.arena.catalog(rank).shards
            for number, unit in enumerate(units):
                for index in range(unit.first, unit.first + len(unit.positions)):
                    content = self.undisturbed.at(steps[number], rank)[index].tobytes()
                    assert len(content) == shards[index].size_bytes
                    self._write(next(offsets), content)
                    crcs.append(crc32c(content))
            blob = encode_state(self._tree(rank, step, older)).to_bytes()
            self._write(self.arena.state_offset(rank, slots), blob)
            self.arena.seal(
                record_index,
                SealRecord(
                    run=RUN,
                    incarnation=1,
                    step=step,
                    rank=rank,
                    flags=0,
                    attempt=f"00{step:06x}",
                    digest="0" * 16,
                    state_bytes=len(blob),
                    state_crc32c=crc32c(blob),
                    slots=slots,
                    steps=array("Q", steps),
                    crcs=crcs,
                ),
            )
        self.records[step] = {r: self.arena.seals(r)[record_index] for r in range(self.size)}
        return Candidate(source=MEMORY, run=RUN, incarnation=1, step=step, attempt=f"00{step:06x}")

    def store_checkpoint(
        self, step: int, *, base: int | None = None, written: Sequence[Expert] | None = None
    ) -> Candidate:
        """Make a checkpoint of a sealed snapshot: these experts (None: all) of it, the others as the base has them."""
        records = self.records[step]
        name = CheckpointName(run=RUN, incarnation=1, step=step, attempt=f"00{step:06x}")
        base_state = read_base(self.arena, records[min(records)])
        receipts = [
            persist_rank(self.arena, record, self.repository, experts=written, base=base_state, trace=Trace())
            for record in records.values()
        ]
        rows = [row for receipt in receipts for row in receipt.rows]
        stale = self._stale(name, base, written)
        if base is not None:
            others = set(sources(stale)) - {name}
            shared = self.manifests[base].objects
            rows += [r for r in shared if parse_object_key(r.key)[2] != "d" and parse_object_key(r.key)[0] in others]
        manifest = Manifest(
            name=name,
            parent=None,
            topology=Topology(world_size=self.size, node_of_rank=(0,) * self.size).to_json(),
            catalog_digest=catalog_digest(self.arena.catalogs),
            tensors=len({(s.tensor, s.part) for c in self.arena.catalogs for s in c.shards}),
            objects=tuple(sorted(rows, key=lambda row: row.key)),
            fingerprint={"model": "plain"},
            versions={"worker": "1"},
            is_finite=True,
            stale_experts=stale,
            routing=self._routing(step) if self.is_counted else None,
        )
        self.repository.put_manifest(manifest)
        self.manifests[step] = manifest
        return Candidate(source=STORAGE, run=RUN, incarnation=1, step=step, attempt=name.attempt)

    def opener(self, rank: int) -> Open:
        """Return how a rank opens this history's snapshots and checkpoints."""

        def open_source(candidate: Candidate) -> tuple[Source, Callable[[], None]]:
            if candidate.source == MEMORY:
                return MemorySource(held_parts(self.arena, self.records[candidate.step])), lambda: None
            name = CheckpointName(run=RUN, incarnation=1, step=candidate.step, attempt=candidate.attempt)
            return StorageSource(self.repository, self.repository.read_manifest(name), rank=rank), lambda: None

        return open_source

    def flip(self, step: int, rank: int, expert: Expert | None) -> None:
        """Flip a bit in a sealed snapshot: in the first shard of this rank's unit."""
        record = self.records[step][rank]
        units = self.arena.rank_layout(rank).units
        number = next(n for n, unit in enumerate(units) if unit.expert == expert)
        place = self.arena.slot_offset(rank, number, record.slots[number]) + units[number].positions[0] + 5
        with self.arena.view(place, 1) as view:
            view[0] ^= 0x10

    def flip_object(self, step: int, rank: int, expert: Expert) -> str:
        """Flip a bit in the object that a rank wrote at a step: in the expert's first shard. Return its key."""
        row = self.object_row(step, rank)
        header = self.repository.read_header(row)
        stored = next(stored for stored in header.shards if stored.shard.expert == expert)
        content = bytearray(self.store.read(row.key, limit_bytes=1 << 30))
        content[row.header_bytes + stored.position + 5] ^= 0x10
        self.store.put(row.key, [memoryview(content)])
        return row.key

    def object_row(self, step: int, rank: int) -> ObjectRow:
        """Return the row of the experts' object that a rank wrote at a step."""
        own = self.manifests[step]
        return next(
            row
            for row in own.objects
            if parse_object_key(row.key)[0] == own.name and parse_object_key(row.key)[1:] == (rank, "e00")
        )

    def close(self) -> None:
        self.arena.close()

    def _write(self, offset: int, content: bytes) -> None:
        with self.arena.view(offset, len(content)) as view:
            view[:] = content

    def _tree(self, rank: int, step: int, older: Mapping[tuple[int, Expert], int]) -> dict[str, object]:
        noise = ArrayValue(dtype="I64", shape=(8,), kind="numpy", data=memoryview(bytes(64)))
        tree: dict[str, object] = {"step": step, "noise": noise}
        if self.is_counted:
            steps = tuple(
                tuple(older.get((rank, Expert(layer=la, index=i)), step) for i in range(EXPERTS))
                for la in range(LAYERS)
            )
            captured = tuple(
                tuple(self._counted(Expert(layer=la, index=i), steps[la][i]) for i in range(EXPERTS))
                for la in range(LAYERS)
            )
            tree["routing"] = Capture(routing=self._routing(step), captured=captured, steps=steps).to_tree()
        return tree

    def _routing(self, step: int) -> Routing:
        counts = tuple(
            tuple(self._counted(Expert(layer=la, index=i), step) for i in range(EXPERTS)) for la in range(LAYERS)
        )
        return Routing(basis="kept", routed=counts, learned=counts)

    def _counted(self, expert: Expert, step: int) -> int:
        return max(0, routes(expert, step) - routes(expert, self.counted_from))

    def _stale(
        self, name: CheckpointName, base: int | None, written: Sequence[Expert] | None
    ) -> tuple[StaleExpert, ...]:
        rows = []
        for expert in self.grid:
            if written is None or expert in written:
                source, step = name, self._step_in_memory(name.step, expert)
            else:
                assert base is not None, "without a base every expert is written"
                source, step = self.manifests[base].version(expert)
            if step < name.step:
                rows.append(StaleExpert(expert=expert, step=step, source=source, routed=routes(expert, step)))
        return tuple(rows)

    def _step_in_memory(self, step: int, expert: Expert) -> int:
        steps = {
            record.steps[number]
            for rank, record in self.records[step].items()
            for number, unit in enumerate(self.arena.rank_layout(rank).units)
            if unit.expert == expert
        }
        (found,) = steps
        return found


def every_rank(size: int, act: Callable[[SocketWorld], T]) -> list[T | BaseException]:
    """Run `act` on a thread for each rank of a world; return what each returned or raised, by rank."""
    outcomes: list[T | BaseException] = [RuntimeError("did not end")] * size

    def run(rank: int, path: Path) -> None:
        try:
            world = SocketWorld(rank, size, path, timeout_s=DEADLINE_S)
            with contextlib.closing(world):
                outcomes[rank] = act(world)
        except BaseException as error:  # noqa: BLE001  # handed to the test
            outcomes[rank] = error

    with tempfile.TemporaryDirectory(prefix="moc-world-") as folder:
        threads = [threading.Thread(target=run, args=(rank, Path(folder) / "rv")) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    return outcomes
