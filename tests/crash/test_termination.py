"""SIGTERM reaches a rank that hangs in C code, and children that were forked from a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import os, sys, threading
from moc.termination import Termination
asked = []
termination = Termination(ask=lambda: asked.append(1), patience_s=lambda: {patience})
print("ready", flush=True)
"""


def start(body: str, patience_s: float) -> subprocess.Popen[str]:
    """Start a Python program with SIGTERM installed; return once it is."""
    code = PRELUDE.format(patience=patience_s) + body
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_rank_that_never_comes_to_a_boundary_ends_by_itself() -> None:
    # A lock held for ever keeps the main thread in C: a Python handler cannot run.
    child = start("import _thread; lock = _thread.allocate_lock(); lock.acquire(); os.read(os.pipe()[0], 1)", 0.3)

    os.kill(child.pid, signal.SIGTERM)

    assert child.wait(20) == 128 + signal.SIGTERM


def test_a_rank_that_agrees_in_time_goes_on_until_it_has_saved() -> None:
    child = start(
        "while not asked: threading.Event().wait(0.01)\n"
        "termination.heard()\n"
        "threading.Event().wait(0.6)\n"
        "termination.restore()\n"
        "os.kill(os.getpid(), 15)\n",
        0.3,
    )

    os.kill(child.pid, signal.SIGTERM)

    assert child.wait(20) == -signal.SIGTERM


def test_a_forked_child_of_a_rank_ends_by_sigterm() -> None:
    child = start(
        "read, write = os.pipe()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os.write(write, b'x')\n"  # Python drops signals that arrive while it forks
        "    threading.Event().wait(60)\n"
        "    os._exit(1)\n"
        "os.read(read, 1)\n"
        "os.kill(pid, 15)\n"
        "print(os.waitpid(pid, 0)[1], flush=True)\n"
        "termination.restore()\n",
        60,
    )

    assert child.stdout is not None
    assert child.stdout.readline() == f"{int(signal.SIGTERM)}\n"
    assert child.wait(20) == 0


def test_the_former_handler_is_back_after_restore() -> None:
    body = "import signal\ntermination.restore(); termination.restore()\n"
    child = start(body + "sys.exit(signal.getsignal(15) != signal.SIG_DFL)\n", 60)

    assert child.wait(20) == 0
