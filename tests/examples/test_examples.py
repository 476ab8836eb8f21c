"""The examples run as the README says, in real worlds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.main_job import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LOSS = re.compile(r"rank (\d+) step (\d+) loss (-?0x\S+?p[+-]\d+)")

pytestmark = pytest.mark.world


def run(arguments: list[str], folder: Path) -> str:
    """Run a program of this environment in `folder`, one thread per rank; return what it printed."""
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow  # twelve programs that import torch; what it shows is proved by e2e/test_exactness.py
def test_a_killed_native_moe_job_goes_on_bit_for_bit_from_memory_and_from_storage(tmp_path: Path) -> None:
    printed = run([sys.executable, "-m", "examples.kill_and_recover"], tmp_path)

    assert "losses equal: 80 of 80 (rank, step) pairs bit-equal" in printed


def test_a_dense_job_is_saved_without_touching_its_loop_and_goes_on_where_it_was(tmp_path: Path) -> None:
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    script = [*launcher, str(ROOT / "examples/attach_dense.py")]

    first = LOSS.findall(run([*script, "--steps", "12", "--storage", str(tmp_path / "ck")], tmp_path))
    second = LOSS.findall(run([*script, "--steps", "15", "--storage", str(tmp_path / "ck")], tmp_path))

    assert sorted({int(step) for _, step, _ in first}) == list(range(1, 13))
    assert sorted({int(step) for _, step, _ in second}) == [13, 14, 15]
