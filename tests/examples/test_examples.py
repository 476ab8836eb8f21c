"""The examples run as the README says, in real worlds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.main_job import free_port
from tests.support.zygote import Zygote, run_world

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DENSE = ROOT / "examples/attach_dense.py"
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


def check_dense(first: str, second: str) -> None:
    """Check what a job of 12 steps has printed, and then one of 15 in the same repository."""
    assert sorted({(int(rank), int(step)) for rank, step, _ in LOSS.findall(first)}) == of_both_ranks(range(1, 13))
    assert sorted({(int(rank), int(step)) for rank, step, _ in LOSS.findall(second)}) == of_both_ranks(range(13, 16))


def of_both_ranks(steps: range) -> list[tuple[int, int]]:
    return [(rank, step) for rank in range(2) for step in steps]


def test_a_dense_job_is_saved_without_touching_its_loop_and_goes_on_where_it_was(
    zygote: Zygote, tmp_path: Path
) -> None:
    printed = []
    for steps in ("12", "15"):
        folder = tmp_path / steps
        folder.mkdir()
        spec = {"script": str(DENSE), "arguments": ["--steps", steps, "--storage", str(tmp_path / "ck")]}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        assert not run_world(zygote, "tests.examples.script", spec, ranks=2, folder=folder, environment=meeting)
        printed.append("".join(log.read_text() for log in sorted(folder.glob("*.log"))))

    check_dense(*printed)


@pytest.mark.slow  # six programs that import torch; all but the launcher is in the test before
def test_the_same_under_deepspeeds_launcher(tmp_path: Path) -> None:
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    script = [*launcher, str(DENSE), "--storage", str(tmp_path / "ck"), "--steps"]

    check_dense(run([*script, "12"], tmp_path), run([*script, "15"], tmp_path))
