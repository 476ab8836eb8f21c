"""One rank of `recovery_time.py` and `calibration.py`: a training job that notes when it has come how far.

Started by torchrun with the path of a plan (JSON), beside which it appends to `rank<N>.jsonl`. Times are seconds since
the machine's start, the same clock for all processes.
"""

import json
import os
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch.distributed as dist

from benchmarks.launch import RUNTIME
from moc import CheckpointManager, Config
from moc_train import training
from moc_train.config import TrainConfig, resolve
from moc_train.data import SampleLoader
from moc_train.launch import prepare_environment, read_place
from moc_train.options import bind


class Diary:
    """Events of this process, each one line and one write."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def note(self, event: str, **fields: object) -> None:
        row = {"event": event, "pid": os.getpid(), "at_s": time.clock_gettime(time.CLOCK_BOOTTIME), **fields}
        os.write(self._descriptor, (json.dumps(row) + "\n").encode())


def main() -> None:
    plan_path, place = Path(sys.argv[1]), read_place(os.environ)
    plan, folder = json.loads(plan_path.read_text()), plan_path.parent
    diary = Diary(folder / f"rank{place.rank}.jsonl")
    diary.note("imported", started_s=_started_s())
    prepare_environment(os.environ, place, deterministic=False)
    config: TrainConfig = bind(TrainConfig, plan["config"])
    sizes = resolve(config, place.world_size)
    training.start_torch(config, place)
    tokens = training.open_tokens(config, place)
    diary.note("joined")
    engine = training.build_engine(config, sizes, tokens.vocab_size)
    diary.note("built")
    loader = SampleLoader(
        tokens,
        seed=config.data.seed,
        rank=place.rank,
        world_size=place.world_size,
        micro_batch=config.training.micro_batch,
        accumulation=sizes.accumulation,
    )
    manager = CheckpointManager.attach(
        engine,
        folder / "repository",
        Config(snapshot_every=plan["snapshot_every"], persist_every=plan["persist_every"]),
        stateful={"loader": loader},
        runtime_dir=folder / RUNTIME,
    )
    report = manager.recovery
    recovered = None if report is None else {"source": report.source, "step": report.step, "seconds": report.seconds}
    diary.note("attached", resume_step=manager.resume_step, recovered=recovered)
    for step in range(manager.resume_step + 1, plan["steps"] + 1):
        for inputs, targets in loader.next_step().micro_batches:
            losses = engine(inputs, targets)
            engine.backward(losses.total)
            engine.step()
        manager.step()
        status = manager.status()
        diary.note("step", step=step, committed=status.last_committed_step, copy_ms=status.snapshots.copy_ms_last)
    manager.detach()
    dist.destroy_process_group()


def _started_s() -> float:
    """Return when the kernel started this process, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
