"""The training run: build, attach, step, log.

A step is `accumulation` forward and backward passes, one weight update, its log line, and then `checkpointing.step()`:
the line of a step is written before its state can be saved, so every saved step has its line.
"""

import importlib.util
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from moc_train.build_locks import clear_dead_locks, extension_roots
from moc_train.checkpointing import Checkpointing, attach
from moc_train.config import ConfigError, FaultConfig, Resolved, TrainConfig, resolve
from moc_train.data import SampleLoader, StepSamples, TokenFile, prepare
from moc_train.deepspeed_config import derive_deepspeed_config, learning_rate_ratio
from moc_train.launch import Place, thread_count
from moc_train.model import Transformer
from moc_train.options import as_mapping
from moc_train.progress import ProgressView
from moc_train.runlog import RunLog, log_path

__all__ = ["Trainer", "build_engine", "fingerprint", "open_tokens", "run"]


def run(config: TrainConfig, place: Place) -> float:
    """Train as configured, from where the last incarnation stopped, and return the final loss; collective."""
    sizes = resolve(config, place.world_size)
    check_machine(config)
    start_torch(config, place)
    tokens = open_tokens(config, place)
    engine = build_engine(config, sizes, tokens.vocab_size)
    loader = SampleLoader(
        tokens,
        seed=config.data.seed,
        rank=place.rank,
        world_size=place.world_size,
        micro_batch=config.training.micro_batch,
        accumulation=sizes.accumulation,
    )
    checkpointing = attach(
        config.checkpoint, engine, stateful={"loader": loader}, fingerprint=fingerprint(config, sizes, tokens)
    )
    view = ProgressView(steps=config.training.steps, every=config.logging.every, is_shown=place.rank == 0)
    with RunLog(log_path(Path(config.logging.folder), place.rank)) as log, view:
        trainer = Trainer(config, sizes, place, engine, loader, checkpointing, log, view)
        loss = trainer.train()
    checkpointing.detach()
    return loss


def check_machine(config: TrainConfig) -> None:
    """Raise ConfigError for settings that need a package or an accelerator that is not here."""
    if config.model.gmm == "grouped_gemm":
        name = get_accelerator().device_name()
        if name != "cuda":
            raise ConfigError(f"model.gmm grouped_gemm needs a cuda accelerator, this one is {name}")
        require_package("grouped_gemm", "model.gmm grouped_gemm")
    if config.logging.tensorboard:
        require_package("tensorboard", "logging.tensorboard true")


def require_package(package: str, setting: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting} needs the package {package}, which is not installed")


def start_torch(config: TrainConfig, place: Place) -> None:
    """Set threads, determinism and log level, and join the process group; collective."""
    # DeepSpeed calls collectives by names that newer versions of torch warn about, on every rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed", category=FutureWarning)
    deepspeed_logger.setLevel(config.logging.deepspeed.upper())
    if get_accelerator().device_name() == "cpu":
        torch.set_num_threads(thread_count(place, config.training.threads))
    else:
        get_accelerator().set_device(place.local_rank)  # before the first collective, which is bound to a device
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and no result reads such memory
    torch.manual_seed(config.model.seed)
    for lock in clear_dead_locks(extension_roots()) if place.local_rank == 0 else ():
        deepspeed_logger.warning(f"removed the lock of a native build whose process is gone path={lock}")
    deepspeed.init_distributed()


def open_tokens(config: TrainConfig, place: Place) -> TokenFile:
    """Return the token file, built by the first rank of each node while the others wait; collective."""
    folder = prepare(config.data) if place.local_rank == 0 else None
    dist.barrier()
    tokens = TokenFile.open(folder or prepare(config.data), sequence_length=config.data.sequence_length)
    digests: list[str | None] = [None] * place.world_size
    torch.distributed.all_gather_object(digests, tokens.digest)
    if len(set(digests)) != 1:
        raise RuntimeError(f"the ranks have prepared different token files: {sorted(set(map(str, digests)))}")
    return tokens


def build_engine(config: TrainConfig, sizes: Resolved, vocab_size: int) -> Any:
    """Return the DeepSpeed engine of a new model; collective."""
    model = Transformer(config.model, vocab_size=vocab_size, ep_size=sizes.ep_size)

    def ratio(updates: int) -> float:
        return learning_rate_ratio(
            updates,
            warmup_steps=config.warmup_steps(),
            decay_steps=config.decay_steps(),
            min_ratio=config.optimizer.min_lr_ratio,
        )

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, ratio),
        config=derive_deepspeed_config(config, sizes),
    )
    return engine


def parameter_groups(model: Transformer) -> list[dict[str, Any]]:
    """Return the parameters in two groups: matrices, and norm weights, which do not decay."""
    parameters = list(model.parameters())
    return [
        {"name": "decay", "params": [p for p in parameters if p.ndim > 1]},
        {"name": "no_decay", "params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def fingerprint(config: TrainConfig, sizes: Resolved, tokens: TokenFile) -> dict[str, Any]:
    """Return what must be the same for a resume to be the same experiment: flat, and free of the number of ranks."""
    model = {f"model.{key}": value for key, value in as_mapping(config.model).items() if key not in ("ep_size", "gmm")}
    model["model.moe_layers"] = ",".join(map(str, config.model.moe_layer_indices()))
    return {
        **model,
        "data.digest": tokens.digest,
        "data.sequence_length": config.data.sequence_length,
        "data.seed": config.data.seed,
        "training.global_batch": sizes.global_batch,
        "training.precision": config.training.precision,
        "optimizer.warmup_steps": config.warmup_steps(),
        "optimizer.decay_steps": config.decay_steps(),
        "optimizer.min_lr_ratio": config.optimizer.min_lr_ratio,
    }


class Trainer:
    """One incarnation's loop over the steps."""

    def __init__(
        self,
        config: TrainConfig,
        sizes: Resolved,
        place: Place,
        engine: Any,
        loader: SampleLoader,
        checkpointing: Checkpointing,
        log: RunLog,
        view: ProgressView,
    ) -> None:
        self._config, self._sizes, self._place = config, sizes, place
        self._engine, self._loader, self._checkpointing = engine, loader, checkpointing
        self._log, self._view = log, view
        self._layers = engine.module.moe_layers()
        self._routed_before = self._routed()
        self._boundary_ms = 0.0

    def train(self) -> float:
        """Run the remaining steps and return the last loss (nan when none remained)."""
        self._announce()
        loss = float("nan")
        for step in range(self._checkpointing.resume_step + 1, self._config.training.steps + 1):
            record = self._train_step(step)
            loss = record["loss"]
            self._log.write(record)
            self._view.show(record)
            self._write_monitor(record)
            self._mark_boundary()
        self._log.write({"event": "end", "incarnation": self._checkpointing.incarnation, "step": step_of(self._engine)})
        return loss

    def _mark_boundary(self) -> None:
        started = time.perf_counter()
        self._checkpointing.step()
        self._boundary_ms = (time.perf_counter() - started) * 1e3

    def _announce(self) -> None:
        checkpointing = self._checkpointing
        self._log.write(
            {
                "event": "start",
                "incarnation": checkpointing.incarnation,
                "resume_step": checkpointing.resume_step,
                "rank": self._place.rank,
                "world_size": self._place.world_size,
                "ep_size": self._sizes.ep_size,
                "global_batch": self._sizes.global_batch,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "config": as_mapping(self._config),
            }
        )
        parameters = sum(p.numel() for p in self._engine.module.parameters())
        own = sum(getattr(layer, name).numel() for layer in self._layers for name in ("w1", "w2", "w3"))
        self._view.say(
            f"model {(parameters + own * (self._sizes.ep_size - 1)) / 1e6:.1f} M parameters,"
            f" {self._place.world_size} ranks, expert parallel {self._sizes.ep_size},"
            f" {self._sizes.global_batch} sequences of {self._config.data.sequence_length} tokens per step,"
            f" incarnation {checkpointing.incarnation}, from step {checkpointing.resume_step}"
        )
        report = checkpointing.report()
        if report is not None:
            self._view.say(report)

    def _train_step(self, step: int) -> dict[str, Any]:
        started = time.perf_counter()
        engine, samples = self._engine, self._loader.next_step()
        rate = float(engine.get_lr()[0])
        parts: list[Tensor] = []
        for turn, (tokens, targets) in enumerate(samples.micro_batches, 1):
            losses = engine(tokens.to(engine.device), targets.to(engine.device))
            engine.backward(losses.total)
            parts.append(torch.stack((losses.language, losses.balance, losses.z)))
            if turn == len(samples.micro_batches) and is_fault_due(
                self._config.faults, self._place.rank, step, self._checkpointing.incarnation
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            engine.step()
        language, balance, z = mean_over_ranks(torch.stack(parts))
        loads = self._step_loads()
        norm = engine.get_global_grad_norm()
        elapsed = time.perf_counter() - started
        return {
            "event": "step",
            "incarnation": self._checkpointing.incarnation,
            "step": step,
            "loss": language,
            "loss_hex": language.hex(),
            "balance_loss": balance,
            "z_loss": z,
            "lr": rate,
            "grad_norm": 0.0 if norm is None else float(norm),
            "tokens_per_s": len(samples.ids) * self._config.data.sequence_length / elapsed,
            "step_ms": elapsed * 1e3,
            "load": loads,
            "load_max_over_mean": max(loads, default=1.0),
            "stall_ms": self._checkpointing.stall_ms(),
            "previous_boundary_ms": self._boundary_ms,
            "skipped": int(engine.skipped_steps),
            "samples": describe(samples),
        }

    def _routed(self) -> Tensor:
        if not self._layers:
            return torch.zeros(0, dtype=torch.int64)
        return torch.stack([layer.tokens_per_expert for layer in self._layers])

    def _step_loads(self) -> list[float]:
        """Return, per MoE layer, the most loaded expert's share of routes over the mean, in this step on all ranks.

        What this rank has routed is registered on the way: every route is kept, so the counts are exact.
        """
        routed = self._routed()
        counts, self._routed_before = routed - self._routed_before, routed
        if not self._layers:
            return []
        for layer, own in enumerate(counts):
            self._checkpointing.register_routing(layer, own)
        dist.all_reduce(counts)
        return [float(layer.max() / layer.double().mean()) for layer in counts.cpu()]

    def _write_monitor(self, record: dict[str, Any]) -> None:
        monitor = getattr(self._engine, "monitor", None)
        if self._place.rank != 0 or monitor is None or not monitor.enabled:
            return
        names = ("loss", "balance_loss", "z_loss", "lr", "grad_norm", "tokens_per_s", "stall_ms")
        events = [(f"train/{name}", record[name], record["step"]) for name in names]
        for layer, load in zip(self._config.model.moe_layer_indices(), record["load"], strict=True):
            events.append((f"load_max_over_mean/layer{layer}", load, record["step"]))
        monitor.write_events(events)


def mean_over_ranks(parts: Tensor) -> list[float]:
    """Return the mean of each column over the rows of all ranks; the same bits on every rank; collective.

    Sums run in fp64, in the order of micro-batches and ranks, so the value does not depend on a reduction's schedule.
    """
    own = parts.double()
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    rows = torch.cat([part.cpu() for part in gathered]).tolist()
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def is_fault_due(faults: FaultConfig, rank: int, step: int, incarnation: int) -> bool:
    """Return whether this rank is to kill itself in this step."""
    return incarnation == 1 and faults.kill_rank == rank and faults.kill_step == step


def describe(samples: StepSamples) -> dict[str, Any]:
    """Return what the log says about the samples of a step."""
    return {
        "first": samples.first,
        "count": len(samples.ids),
        "epoch": samples.epoch,
        "epoch_size": samples.epoch_size,
        "digest": samples.digest(),
        "rank_ids": [list(ids) for ids in samples.rank_ids],
    }


def step_of(engine: Any) -> int:
    """Return the number of steps that the engine has made."""
    return int(engine.global_steps)


def finish(loss: float, place: Place) -> None:
    """Print the last line of a run and leave the process group; collective."""
    if place.rank == 0:
        print(f"final loss {loss:.6f} ({loss.hex()})", flush=True)
    sys.stdout.flush()
    dist.destroy_process_group()
