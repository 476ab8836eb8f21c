"""What a loop may do between an update and the end of the copy behind it; cases of a world, as in `cases`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moc.adapters.deepspeed import DeepSpeedState, Hooks
from moc.errors import SaveFailedError, UsageError
from tests.adapters.cases import assembled, attach, gathered, snapshot
from tests.adapters.engines import build, train
from tests.adapters.models import WIDTH
from tests.adapters.refusals import expect
from tests.adapters.scenarios import Scenario

__all__ = ["CASES"]


def frozen(_: str, __: Path) -> None:
    """A frozen parameter that the forward pass writes is never torn: the snapshot fails, later ones hold the boundary's
    values.
    """
    engine = build(Scenario(ranks=2, dtype="bf16", zero=2, base="foreach", model="stacked"))
    state, layer = attach(engine), engine.module.frozen
    held = [shard for shard in state.catalog.shards if shard.part == "weight" and shard.expert is None]
    assert sum(shard.length for shard in held) == (WIDTH * WIDTH + WIDTH) // 2
    assert len(held) == (2 if dist.get_rank() == 0 else 1)
    snapshot(state)

    # By ways that no version counter sees; the second leaves the old memory to nobody but the copy.
    layer.weight.data.mul_(0.5)
    expect(SaveFailedError, "parameters=frozen.weight count=1", lambda: snapshot(state))
    for _turn in range(2):
        _expect_boundary(state, "frozen.weight", layer.weight, lambda: layer.weight.data.mul_(0.5))

    _expect_boundary(state, "frozen.bias", layer.bias, lambda: _replace(layer.bias))
    if dist.get_rank() == 0:  # ranges of equal size over all frozen ones: the bias, which comes first, is not cut
        expect(SaveFailedError, "parameters=frozen.bias count=1", lambda: snapshot(state))
    else:
        snapshot(state)
    _expect_boundary(state, "frozen.bias", layer.bias, lambda: _replace(layer.bias))

    layer.bias.data.fill_(3)
    state.note_loaded()
    snapshot(state)
    engine.destroy()


def forced(_: str, __: Path) -> None:
    """Where the loop tells the engine its boundaries, a capture between the micro-batches of a step is refused."""
    scenario = Scenario(ranks=2, dtype="fp32", zero=1, base="foreach", model="dense", accumulation=3)
    engine = build(scenario)
    state = attach(engine)
    hooks = Hooks(engine, lambda: None, state.note_update, lambda: None, lambda: None)
    for step in range(1, 3):
        for turn in range(1, 6):  # another number than the configured one, as such loops have it
            engine.set_gradient_accumulation_boundary(turn == 5)
            train(engine, replace(scenario, accumulation=1), 1)
            if turn < 5:
                expect(UsageError, f"accumulated_micro_batches={turn}", state.capture)
        engine.set_gradient_accumulation_boundary(False)  # already for the next step
        snapshot(state)
        assert state.step == step
    hooks.detach()
    engine.destroy()


def _expect_boundary(state: DeepSpeedState, name: str, parameter: torch.Tensor, write: Callable[[], object]) -> None:
    """Write to a parameter between boundary and copy, and expect the boundary's values in the copy."""
    before = parameter.detach().clone().view(torch.uint8).numpy().tobytes()
    copies, _ = snapshot(state, between=write)
    whole = {key[0]: data for key, data in assembled(gathered(copies)).items()}
    assert whole[name] == before, name
    assert parameter.detach().view(torch.uint8).numpy().tobytes() != before


def _replace(parameter: torch.Tensor) -> None:
    parameter.data = parameter.data + 1


CASES: dict[str, Callable[[str, Path], None]] = {"forced": forced, "frozen": frozen}
