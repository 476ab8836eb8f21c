"""What a partial snapshot's plan costs inside the training loop: the choice, the slots and the addresses.

    python benchmarks/partial_plan.py [--layers 64] [--experts 128] [--k 16] [--repeats 200]

One rank holds every expert, in three parts of one element each, so that hardly a byte is copied and what is left is the
plan. A boundary is `Boundaries.choose` and `Snapshotter.begin`, which run on the training thread; `targets` runs on the
copy thread, and holds the interpreter's lock as long as it takes. `cpu` is the training thread's processor time in a
boundary, which other processes of a busy machine do not change.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from array import array
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moc.boundary import Boundaries
from moc.host import SystemHost
from moc.plan.layout import arrange_arena
from moc.plan.rotation import even_rotation
from moc.plan.turns import Turns
from moc.snapshot.arena import Arena, descriptor_room
from moc.snapshot.places import Places
from moc.snapshot.snapshotter import Begun, Snapshotter
from moc.state import Expert, RankCatalog, Shard, shard_order
from moc.trace import Trace
from tests.support.plain import PARTS, ArrayState, SocketWorld

VERSIONS = 3
LIMIT_MS = 1.0
DEADLINE_S = 60.0


class ManyExperts(ArrayState):
    """A state whose experts are many and small."""

    def __init__(self, layers: int, experts: int) -> None:
        owners = [None, *(Expert(layer=layer, index=index) for layer in range(layers) for index in range(experts))]
        shards = [_shard(part, owner) for part in PARTS for owner in owners]
        self._shards = tuple(sorted(shards, key=shard_order))
        self.step, self.noise = 0, np.zeros(8, dtype=np.int64)

    @property
    def catalog(self) -> RankCatalog:
        return RankCatalog(rank=0, shards=self._shards, state_capacity_bytes=65536)

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {}

    def copy_shards(self, targets: array[int], crcs: array[int]) -> None:
        """Nothing: the plan alone is measured."""

    def capture(self) -> dict[str, object]:
        return {"step": self.step}


def _shard(part: str, expert: Expert | None) -> Shard:
    tensor = "dense" if expert is None else f"layers.{expert.layer}.experts.{expert.index}.w"
    return Shard(tensor=tensor, part=part, dtype="F32", shape=(1,), offset=0, length=1, expert=expert)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of each part by repetition."""
    state = ManyExperts(options.layers, options.experts)
    descriptor = {"versions": VERSIONS, "catalogs": [state.catalog.to_json()]}
    layout = arrange_arena((state.catalog,), versions=VERSIONS, descriptor_bytes=descriptor_room(descriptor))
    arena = Arena.create(descriptor, layout, name="plan")
    turns = Turns(even_rotation(options.layers, options.experts, 1), k=options.k, every=1)
    boundaries = Boundaries(SocketWorld(0, 1, Path("unused")), turns, persist_every=0)
    snapshotter = Snapshotter(
        state,
        arena,
        rank=0,
        run="run-7",
        incarnation=1,
        digest="0" * 16,
        turns=turns,
        on_sealed=lambda _step: None,
        host=SystemHost(),
        trace=Trace(),
    )
    places = Places(arena, 0, turns)
    times: dict[str, list[float]] = {"choose": [], "begin": [], "boundary": [], "cpu": [], "targets": []}
    for step in range(1, options.repeats + 1):
        began_s, cpu_s = time.perf_counter(), time.thread_time()
        boundaries.learn()
        choice = boundaries.choose(step)
        chosen_s = time.perf_counter()
        assert choice is not None
        begun = snapshotter.begin(step, flags=0, attempt="00abcdef", experts=choice.experts)
        begun_s, cpu_s = time.perf_counter(), time.thread_time() - cpu_s
        assert begun is Begun.STARTED, snapshotter.counters.last_problem
        boundaries.tell(choice, begun, snapshotter.setbacks, is_asked_to_terminate=False)
        assert snapshotter.wait_finished(DEADLINE_S)
        record = max(arena.seals(0).values(), key=lambda held: held.step)
        slots = np.array(record.slots, dtype=np.uint32)
        units, targets_s = places.units_of(choice.experts), time.perf_counter()
        places.targets(slots, units)
        ended_s = time.perf_counter()
        row = (chosen_s - began_s, begun_s - chosen_s, begun_s - began_s, cpu_s, ended_s - targets_s)
        for name, seconds in zip(times, row, strict=True):
            times[name].append(1e3 * seconds)
        for index, held in arena.seals(0).items():  # as an agent does once a newer snapshot is global
            if held.step < step:
                arena.free(0, index)
    snapshotter.close()
    arena.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    times = measure(options)
    print(f"{options.layers} layers x {options.experts} experts on one rank, k={options.k}, repeats={options.repeats}")
    for name, row in times.items():
        ordered = sorted(row[1:])  # the first snapshot of a life holds everything
        tail = ordered[int(0.95 * (len(ordered) - 1))]
        print(f"{name:9} median {statistics.median(ordered):.3f} ms, 95 % below {tail:.3f} ms")
    median = statistics.median(times["cpu"][1:])
    print(f"processor time of a boundary within {LIMIT_MS} ms: {'yes' if median < LIMIT_MS else 'no'}")
    return 0 if median < LIMIT_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
