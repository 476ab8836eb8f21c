"""The ownership map against a real DeepSpeed world: four ranks, expert-parallel size 2, ZeRO-2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moc.plan.ownership import Ownership, zero2_ownership
from moc.plan.shapes import ModelShape

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS, HIDDEN, FFN = 3, 4, 12, 10
RANKS, EP = 4, 2


class StackedShape(ModelShape):
    """The shape of `tests.adapters.models.Stacked`, whose three matrices differ."""

    @property
    def expert_matrices(self) -> tuple[int, ...]:
        return (HIDDEN * 7, 7 * HIDDEN, 3 * HIDDEN)


def shape(kind: str) -> ModelShape:
    cls = StackedShape if kind == "stacked" else ModelShape
    return cls(
        name=kind,
        layers=LAYERS,
        hidden=HIDDEN,
        heads=1,
        vocabulary=1,
        ffn=0,
        moe_layers=LAYERS,
        experts=EXPERTS,
        expert_ffn=FFN,
        top_k=1,
        gated=False,
        biased=True,
        stacked=kind == "stacked",
    )


def owned(own: Ownership, rank: int) -> dict[str, int]:
    column, ep_rank = divmod(rank, own.ep)
    grid = own.slices[own.profile[column]]
    return {
        f"{layer}.{ep_rank * own.local_experts + local}": int(grid[layer, local])
        for layer in range(own.layers)
        for local in range(own.local_experts)
        if grid[layer, local]
    }


@pytest.mark.slow
@pytest.mark.world
def test_the_map_is_what_real_ranks_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [*command, "-m", "tests.plan.world_worker", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PATH": tools, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    for kind in ("separate", "stacked"):
        own = zero2_ownership(shape(kind), RANKS, EP)
        for rank in range(RANKS):
            held = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
            held.pop("dense")
            assert held == owned(own, rank), (kind, rank)
