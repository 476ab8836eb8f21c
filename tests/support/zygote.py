"""Worlds of ranks that are forked from a process which has imported torch and DeepSpeed already."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["Zygote", "run_world"]

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 400.0  # the first start on a machine compiles DeepSpeed's operators
DEADLINE_S = 90.0
POLL_S = 0.005
TAIL = 3500


class Zygote:
    """The forking process, `zygote_process.py`; a context manager. When it ends, so do all ranks."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._codes: dict[int, int] = {}
        self._pids: list[int] = []
        self._pending = b""

    def __enter__(self) -> Zygote:
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # this torch's ninja
        settings = {"PATH": tools, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.zygote_process"],
                cwd=ROOT,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._replies, selectors.EVENT_READ)
        self._is_ready = False
        self._until(
            lambda: self._is_ready, START_DEADLINE_S, "imports; a stale lock of torch's extension builder makes it hang"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._replies.close()

    def fork(self, module: str, spec: Mapping[str, object], environment: Mapping[str, str], log: Path) -> int:
        """Start a rank that does what the module's `main(spec)` does, and return its pid."""
        known = len(self._pids)
        request = {"module": module, "spec": dict(spec), "environment": dict(environment), "log": str(log)}
        self._requests.write(json.dumps(request).encode() + b"\n")
        self._requests.flush()
        self._until(lambda: len(self._pids) > known, DEADLINE_S, "a fork")
        return self._pids[-1]

    def code(self, pid: int) -> int | None:
        """Return a rank's exit code, negative for a signal, None while it runs."""
        self._read(0)
        return self._codes.get(pid)

    def wait(self, seconds: float) -> None:
        """Let time pass, or less if a rank ends."""
        self._read(seconds)

    def _until(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        ends_s = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > ends_s or self._process.poll() is not None:
                raise AssertionError(f"the zygote did not come to {what}:\n{self._log.read_text()[-TAIL:]}")
            self._read(POLL_S)

    def _read(self, seconds: float) -> None:
        if not self._selector.select(seconds):
            return
        *lines, self._pending = (self._pending + os.read(self._replies.fileno(), 1 << 16)).split(b"\n")
        for line in lines:
            reply = json.loads(line)
            if "ended" in reply:
                self._codes[reply["ended"]] = reply["code"]
            elif "pid" in reply:
                self._pids.append(reply["pid"])
            else:
                self._is_ready = True


def run_world(
    zygote: Zygote,
    module: str,
    spec: Mapping[str, object],
    *,
    ranks: int,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    deadline_s: float = 240.0,
) -> str:
    """Run a world to its end and return what was wrong, with the ranks' last words; "" if nothing was.

    The specification gets the path of a file that `init_process_group` may meet at, as "rendezvous".
    """
    logs = [folder / f"world{ranks}.rank{rank}.log" for rank in range(ranks)]
    meeting = folder / f"world{ranks}.rendezvous"
    meeting.unlink(missing_ok=True)
    pids: list[int] = []
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        words = {key: str(value) for key, value in place.items()} | dict(environment or {})
        pids.append(zygote.fork(module, {**spec, "rendezvous": str(meeting)}, words, log))
    ends_s = time.monotonic() + deadline_s

    def codes() -> list[int | None]:
        return [zygote.code(pid) for pid in pids]

    try:
        while None in codes() and not any(codes()) and time.monotonic() < ends_s:
            zygote.wait(POLL_S)
        if None in codes():
            _signal(zygote, pids, signal.SIGABRT)  # the rank writes its stacks
            zygote.wait(1.0)
    finally:
        _signal(zygote, pids, signal.SIGKILL)
    if codes() == [0] * ranks:
        return ""
    words = [f"---- rank {rank}\n{log.read_text(errors='replace')[-TAIL:]}" for rank, log in enumerate(logs)]
    return "\n".join((f"exit codes {codes()}", *words))


def _signal(zygote: Zygote, pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to those that live; a pid is not used again before its end has been read."""
    for pid in pids:
        if zygote.code(pid) is None:
            os.kill(pid, number)
