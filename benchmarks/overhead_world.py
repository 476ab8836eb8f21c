"""One rank of `step_overhead.py`: train in blocks with and without moc, then beside DeepSpeed's own checkpoints.

Started by torchrun with the path of a plan (JSON), beside which it writes `rank<N>.json`. `manager.step()` is called
at the beginning of a step, which is the loop of a trainer turned by one call: a block then holds the whole cost of its
snapshots, the wait before the weight update included. In a block without moc it is not called.
"""

import json
import os
import random
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.launch import RUNTIME
from moc_train.config import TrainConfig, resolve
from moc_train.launch import Place, prepare_environment, read_place
from moc_train.options import bind

COPY_THREAD = "moc-copy"
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class World:
    """The engine, its manager, and the clocks of one rank."""

    def __init__(self, plan: dict[str, Any], folder: Path, place: Place) -> None:
        import torch.distributed as dist

        from moc import CheckpointManager, Config
        from moc.adapters.deepspeed import DeepSpeedState
        from moc.cli.live import read_statuses
        from moc_train import training
        from moc_train.data import SampleLoader

        self.plan, self.folder, self.place = plan, folder, place
        self._barrier, self._broadcast = dist.barrier, dist.broadcast_object_list
        config: TrainConfig = bind(TrainConfig, plan["config"])
        sizes = resolve(config, place.world_size)
        training.start_torch(config, place)
        tokens = training.open_tokens(config, place)
        self.engine = training.build_engine(config, sizes, tokens.vocab_size)
        self._loader = SampleLoader(
            tokens,
            seed=config.data.seed,
            rank=place.rank,
            world_size=place.world_size,
            micro_batch=config.training.micro_batch,
            accumulation=sizes.accumulation,
        )
        module = self.engine.module
        experts = sum(w.numel() for layer in module.moe_layers() for w in (layer.w1, layer.w2, layer.w3))
        self.parameters = sum(p.numel() for p in module.parameters()) + experts * (sizes.ep_size - 1)
        stateful = {"loader": self._loader}
        catalog = DeepSpeedState(self.engine, stateful, extra_fingerprint={}).catalog
        self.snapshot_bytes = sum(shard.size_bytes for shard in catalog.shards)
        self.shards = len(catalog.shards)
        self.manager = CheckpointManager.attach(
            self.engine,
            folder / "repository",
            Config(snapshot_every=1, persist_every=plan["block"], keep_last=2, versions=plan["versions"]),
            stateful=stateful,
            restore="never",
            runtime_dir=folder / RUNTIME,
        )
        ((_, status),) = read_statuses(self.manager.run_id, folder / RUNTIME)
        self.agent_pid, self.arena_bytes = int(status["pid"]), int(status["arena_bytes"])
        self._copy_thread = next(t.native_id for t in threading.enumerate() if t.name == COPY_THREAD)

    def train_step(self) -> None:
        samples = self._loader.next_step()
        for tokens, targets in samples.micro_batches:
            losses = self.engine(tokens, targets)
            self.engine.backward(losses.total)
            self.engine.step()

    def measure_block(self, *, is_saving: bool) -> dict[str, Any]:
        """Train one block and return its times; collective."""
        before = self.manager.status().snapshots
        first_step = self.manager.status().step
        rows: list[dict[str, float]] = []
        self._barrier()
        clocks = self._clocks()
        for _ in range(self.plan["block"]):
            began_s = time.perf_counter()
            if is_saving:
                self.manager.step()
            boundary_s = time.perf_counter() - began_s
            self.train_step()
            counters = self.manager.status().snapshots
            rows.append(
                {
                    "step_ms": 1e3 * (time.perf_counter() - began_s),
                    "boundary_ms": 1e3 * boundary_s,
                    "capture_ms": counters.capture_ms_last if is_saving else 0.0,
                    "copy_ms": counters.copy_ms_last if is_saving else 0.0,
                }
            )
        spent = {name: value - clocks[name] for name, value in self._clocks().items()}
        status = self.manager.status()
        after = status.snapshots
        return {
            "is_saving": is_saving,
            "first_step": first_step,
            "steps": rows,
            "spent_ms": spent,
            "sealed": after.sealed - before.sealed,
            "skipped": after.skipped - before.skipped,
            "failed": after.failed - before.failed,
            "stall_ms": after.stall_ms_total - before.stall_ms_total,
            "is_committed": status.last_committed_step == first_step,
            "problem": after.last_problem,
        }

    def measure_save(self, number: int) -> dict[str, float]:
        """Train some plain steps, then have DeepSpeed save; return the times of both; collective."""
        target = self.folder / "deepspeed"
        self._barrier()
        began_s = time.perf_counter()
        for _ in range(self.plan["plain_steps"]):
            self.train_step()
        self._barrier()
        plain_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        self.engine.save_checkpoint(str(target), tag=f"save{number}")
        self._barrier()
        save_s = time.perf_counter() - began_s
        if self.place.rank == 0:
            size_bytes = _make_durable(target)
        self._barrier()
        durable_s = time.perf_counter() - began_s
        if self.place.rank != 0:
            return {}
        shutil.rmtree(target)
        print(f"save {number}: {save_s:.2f} s", file=sys.stderr, flush=True)
        return {
            "plain_step_ms": 1e3 * plain_s / self.plan["plain_steps"],
            "save_ms": 1e3 * save_s,
            "durable_ms": 1e3 * durable_s,
            "bytes": size_bytes,
        }

    def is_agreed(self, opinion: bool) -> bool:
        """Return rank 0's opinion; collective."""
        held = [opinion]
        self._broadcast(held)
        return held[0]

    def committed_bytes(self) -> int:
        """Return the size of the newest checkpoint in the repository, all ranks together."""
        from moc.repository import Repository
        from moc.store.open import open_store

        repository = Repository(open_store(str(self.folder / "repository")))
        try:
            newest = repository.checkpoints()[-1]
            return repository.read_manifest(newest.name).size_bytes
        finally:
            repository.close()

    def _clocks(self) -> dict[str, float]:
        """Return milliseconds so far: wall, and of threads what they ran and what they waited for a core."""
        train_run, train_wait = _schedule(threading.get_native_id())
        copy_run, copy_wait = _schedule(self._copy_thread)
        return {
            "wall": 1e3 * time.perf_counter(),
            "rank_run": 1e3 * time.process_time(),
            "train_run": train_run,
            "train_wait": train_wait,
            "copy_run": copy_run,
            "copy_wait": copy_wait,
            "agent_run": _cpu_ms(self.agent_pid),
        }


def main() -> None:
    plan_path = Path(sys.argv[1])
    plan, place = json.loads(plan_path.read_text()), read_place(os.environ)
    prepare_environment(os.environ, place, deterministic=False)
    world = World(plan, plan_path.parent, place)
    rng = random.Random(plan["seed"])  # the same order on every rank
    for is_saving in (True, False) * plan["warmup_pairs"]:
        world.measure_block(is_saving=is_saving)
    pairs: list[dict[str, Any]] = []
    ends_s = time.monotonic() + 60 * plan["minutes"]
    for number in range(plan["pairs"]):
        order = rng.sample((True, False), k=2)
        blocks = [world.measure_block(is_saving=is_saving) for is_saving in order]
        pairs.append({"with": blocks[order.index(True)], "without": blocks[order.index(False)]})
        if place.rank == 0:
            print(f"pair {number + 1} of {plan['pairs']}", file=sys.stderr, flush=True)
        if world.is_agreed(time.monotonic() > ends_s):
            break
    saves = [world.measure_save(number) for number in range(plan["saves"] + 1)][1:]  # the first is warm-up
    result = {
        "pairs": pairs,
        "saves": saves,
        "snapshot_bytes": world.snapshot_bytes,
        "shards": world.shards,
        "arena_bytes": world.arena_bytes,
        "checkpoint_bytes": world.committed_bytes(),
        "parameters": world.parameters,
    }
    world.manager.detach()
    plan_path.with_name(f"rank{place.rank}.json").write_text(json.dumps(result))


def _make_durable(folder: Path) -> int:
    """Have everything below the folder on the disk; return its bytes."""
    size_bytes = 0
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        size_bytes += path.stat().st_size if path.is_file() else 0
    return size_bytes


def _schedule(thread: int) -> tuple[float, float]:
    """Return how long a thread of this process has run, and has waited for a core, in milliseconds."""
    run_ns, wait_ns, _ = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
    return int(run_ns) / 1e6, int(wait_ns) / 1e6


def _cpu_ms(pid: int) -> float:
    """Return the CPU time of a process, ended threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


if __name__ == "__main__":
    main()
