"""Engines that must be refused, by name, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from moc.adapters.deepspeed import DeepSpeedState
from moc.errors import MocError, UsageError
from tests.adapters.engines import build
from tests.adapters.models import Net
from tests.adapters.scenarios import Scenario

Change = Callable[[DeepSpeedEngine], None]


def expect(kind: type[MocError], words: str, call: Callable[[], object]) -> None:
    """Raise unless `call` raises an error of exactly this kind with these words."""
    try:
        call()
    except MocError as error:
        if type(error) is not kind or words not in str(error):
            raise AssertionError(
                f"expected {kind.__name__} with {words!r}, got {type(error).__name__}: {error}"
            ) from error
        return
    raise AssertionError(f"nothing was raised: expected {kind.__name__} with {words!r}")


def run(_: str, __: Path) -> None:
    """Refuse every engine that is not on the list, without touching it."""
    refuse(lambda: plain(stage=3), "zero optimizer: type=deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3")
    refuse(lambda: plain(stage=0), "zero optimizer: type=torch.optim.adamw.AdamW")
    for optimizer in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop):
        refuse(lambda kind=optimizer: plain(optimizer=kind), f".{optimizer.__name__} allowed=AdamW,Adam,")
    refuse(lambda: plain(optimizer=type("MyAdamW", (torch.optim.AdamW,), {})), "MyAdamW allowed=AdamW,Adam,")
    refuse(lambda: plain(frozen_late=True), "trainable parameters are in no optimizer group: parameters=head.bias")
    refuse(cycling, "cycle_momentum=True base_optimizer=DeepSpeedCPUAdam")
    refuse_changed("parameter is not contiguous in memory: parameter=frozen.weight", _transpose)
    refuse_changed("unsupported engine: type=deepspeed.runtime.pipe.engine.PipelineEngine", _as_pipeline)
    refuse_changed("offloaded states=['x']", lambda engine: engine.optimizer.offloaded_states.add("x"))
    refuse_changed("sequence parallel size=2", lambda engine: setattr(engine, "sequence_parallel_size", 2))
    refuse_changed("tensor parallel size=2", lambda engine: setattr(engine, "mp_world_size", 2))
    refuse_changed("zenflow=True", lambda engine: setattr(engine, "zenflow", True))
    refuse_changed("not at the boundary of a step: accumulated_micro_batches=1", _accumulate)
    for section in ("progressive_layer_drop", "curriculum_learning"):
        refuse_changed(f"{section}=enabled", lambda e, s=section: e._config._param_dict.update({s: {"enabled": True}}))
    compression = {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}}
    refuse_changed("compression_training=enabled", lambda engine: engine._config._param_dict.update(compression))


def refuse(make: Callable[[], DeepSpeedEngine], words: str) -> None:
    """Attach to an engine and expect a UsageError with these words and an unchanged engine."""
    engine = make()
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    before = dict(engine.__dict__), len(base.state), dict(engine.optimizer.__dict__).keys()
    expect(UsageError, words, lambda: DeepSpeedState(engine, {}, extra_fingerprint={}))
    assert (dict(engine.__dict__), len(base.state), dict(engine.optimizer.__dict__).keys()) == before
    engine.destroy()


def refuse_changed(words: str, change: Change) -> None:
    """Refuse an engine that is fine but for one change."""

    def make() -> DeepSpeedEngine:
        engine = build(Scenario(ranks=2, dtype="fp32", zero=2, base="foreach", model="dense", accumulation=2))
        change(engine)
        return engine

    refuse(make, words)


def plain(stage: int = 2, optimizer: type = torch.optim.AdamW, *, frozen_late: bool = False):
    """Return an engine of the dense network."""
    net = Net("dense", 1)
    if frozen_late:  # trainable again once DeepSpeed has left it out
        net.head.bias.requires_grad_(requires_grad=False)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        # Stage 3 would replace torch.nn.functional.linear for good, and with it the bits of every engine here.
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    parameters = [p for p in net.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=net, optimizer=optimizer(parameters, lr=0.01), config=config)[0]
    if frozen_late:
        net.head.bias.requires_grad_(requires_grad=True)
    return engine


def cycling():
    """Return an engine whose scheduler changes the betas that DeepSpeed's CPU kernel keeps powers of."""
    scenario = Scenario(ranks=2, dtype="fp32", zero=1, base="cpu_adam", model="dense", options=("offload",))
    engine = build(scenario)
    engine.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(engine.optimizer.optimizer, 0.1, total_steps=9)
    return engine


def _as_pipeline(engine: DeepSpeedEngine) -> None:
    engine.__class__ = PipelineEngine  # its own constructor needs a pipelined network; the type is what is looked at


def _transpose(engine: DeepSpeedEngine) -> None:
    engine.module.frozen.weight.data = engine.module.frozen.weight.data.t()


def _accumulate(engine: DeepSpeedEngine) -> None:
    engine.micro_steps += 1
