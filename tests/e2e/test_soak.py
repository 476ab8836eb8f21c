"""The soak finds nothing in a minute of kills, and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.world, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_short_soak_passes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/soak.py",
        "--minutes",
        "1",
        "--gap-s",
        "10",
        "20",
        "--out",
        str(tmp_path / "soak"),
    ]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "soak passed" in done.stdout
    facts = json.loads((tmp_path / "soak/soak.json").read_text())
    assert sum(facts["kills"].values()) >= 1
    assert facts["steps"] > 100
    assert not facts["problems"]
