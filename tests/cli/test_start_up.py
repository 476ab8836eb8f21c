"""Looking at a local repository is quick and loads none of the heavy libraries."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.console import clean_env, moc

HEAVY = ("aiohttp", "deepspeed", "fsspec", "numpy", "rich", "s3fs", "safetensors", "torch", "yaml")
LIMIT_S = 0.3

PROBE = """
import sys
from moc.cli.main import main
code = main(sys.argv[2:])
print("loaded:", *[name for name in sys.argv[1].split(",") if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments",
    [("ls",), ("ls", "--json"), ("show", "20"), ("verify",), ("verify", "--read-data"), ("rewind", "--step", "20")],
)
def test_a_local_repository_needs_no_heavy_library(arguments: tuple[str, ...], damaged: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(HEAVY), *arguments, "-r", str(damaged)],
        capture_output=True,
        text=True,
        env=clean_env(),
        timeout=60,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "loaded:"


def test_ls_takes_less_than_300_ms(history: Path) -> None:
    # Processor time: on an idle machine it is the wall time, and other jobs hardly change it.
    seconds = []
    for _ in range(5):
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert moc("ls", "-r", history).returncode == 0
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime)

    assert min(seconds) < LIMIT_S, seconds
