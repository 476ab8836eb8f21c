"""The main job: train a small MoE on real text, lose a rank, recover from memory, prove that nothing changed.

    .venv/bin/python -m examples.main_job

Trains the same configuration twice: once undisturbed and without moc, once under `moc run` with rank 1 killed by
SIGKILL in the middle of step 120 (`faults.kill_rank`, `faults.kill_step`). Then compares both sequences of losses bit
for bit, and shows what is stored.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/main_job"), help="emptied first")
    parser.add_argument("--config", type=Path, default=ROOT / "examples/configs/main_job.yaml")
    parser.add_argument("--kill-step", type=int, default=120)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="passed to both runs")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    began_s = time.monotonic()

    say("1/3 the undisturbed run, without moc")
    train(options, [], ["checkpoint.enabled=false", f"logging.folder={options.out / 'undisturbed'}"])

    say(f"2/3 the same under `moc run`; rank 1 is killed in the middle of step {options.kill_step}")
    storage = options.out / "checkpoints"
    train(
        options,
        [str(BIN / "moc"), "run", "-r", str(storage), "--max-restarts", "2", "--"],
        [
            f"logging.folder={options.out / 'disturbed'}",
            "faults.kill_rank=1",
            f"faults.kill_step={options.kill_step}",
        ],
    )

    say("3/3 what is stored, and the proof")
    run([str(BIN / "moc"), "ls", "-r", str(storage)])
    compare = [
        sys.executable,
        "-m",
        "moc_train.compare",
        str(options.out / "undisturbed"),
        str(options.out / "disturbed"),
    ]
    verdict = run(compare, check=False)
    say(f"took {time.monotonic() - began_s:.0f} s")
    return verdict


def train(options: argparse.Namespace, supervisor: list[str], overrides: list[str]) -> None:
    """Run the trainer with DeepSpeed's launcher; raises CalledProcessError if it fails for good."""
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    run(
        [
            *supervisor,
            *launcher,
            str(ROOT / "moc_train/pretrain.py"),
            "--config",
            str(options.config),
            *options.overrides,
            *overrides,
        ]
    )


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: list[str], *, check: bool = True) -> int:
    """Run a command with this environment's programs first on the path; return its exit code."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, check=check, env=env, cwd=ROOT).returncode


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
