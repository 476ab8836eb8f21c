"""Stacks on demand: SIGURG makes a process write where all its threads are, even while they hang in foreign code.

SIGURG, because who does not know it ignores it: one that comes too late or reaches the wrong process harms nobody.
Python's fault handler, which needs neither the interpreter's lock nor memory, writes at once where the main thread is.
The other threads follow when the main thread comes back to Python, for only with the interpreter's lock do they stand
still: to read the frames of a thread that runs can end the process. The file's name tells process and start time, so
whoever asks needs no agent. Thread: the main thread, for a dump of all threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc.agent.runtime import open_private
from moc.clock import Clock
from moc.errors import UsageError

__all__ = ["StackDump", "StackReport", "collect_stacks", "facts_of_process"]

log = logging.getLogger(__name__)

SIGNAL = signal.SIGURG
POLL_S = 0.02
SETTLED_POLLS = 3  # a dump comes in many small writes
TEXT_LIMIT_BYTES = 1 << 20
THREAD_LIMIT = 200
_FILE = re.compile(r"stacks-(?P<name>[a-z0-9]+)-(?P<pid>\d+)-(?P<ticks>\d+)\.txt", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackReport:
    """The stacks of one process, or why they could not be had."""

    name: str
    pid: int
    text: str
    problem: str | None


class StackDump:
    """From construction to `close` this process answers SIGURG with its stacks, unless something else handles it."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name` is "agent" or "rank00000"; files that dead processes of this name left behind are removed."""
        for path, match in _files(folder):
            if match["name"] == name and _start_ticks(int(match["pid"])) != int(match["ticks"]):
                path.unlink(missing_ok=True)
        self._path = folder / f"stacks-{name}-{os.getpid()}-{_start_ticks(os.getpid())}.txt"
        self._file = None
        self._former: Any = None
        if _catches(os.getpid()):
            log.info("no stacks on demand: something else handles %s", SIGNAL.name)
            return
        try:
            self._file = open_private(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except (OSError, UsageError) as error:  # a full disk must not end what is only to be looked at
            log.warning("no stacks on demand: %s", error)
            return
        is_main = threading.current_thread() is threading.main_thread()
        if is_main:  # else Python takes no handler
            self._former = signal.signal(SIGNAL, self._dump_all)
        faulthandler.register(SIGNAL, file=self._file, all_threads=False, chain=is_main)

    def close(self) -> None:
        """Ignore the signal again, as before; again is harmless."""
        if self._file is not None:
            faulthandler.unregister(SIGNAL)
            if self._former is not None and threading.current_thread() is threading.main_thread():
                signal.signal(SIGNAL, self._former)
            self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)

    def _dump_all(self, *_: object) -> None:
        """Write where all threads are. The signal's handler, so this runs in the main thread, between two steps."""
        if self._file is not None:
            faulthandler.dump_traceback(file=self._file, all_threads=True)


def collect_stacks(folder: Path, *, clock: Clock, timeout_s: float) -> list[StackReport]:
    """Ask every living process that left a file in the runtime folder for its stacks.

    Blocks: until all have answered, at most `timeout_s`; a stopped process cannot answer.
    """
    asked: list[tuple[Path, re.Match[str]]] = []
    reports: list[StackReport] = []
    for path, match in _files(folder):
        pid = int(match["pid"])
        try:
            problem = _ask(path, pid, int(match["ticks"]))
        except (OSError, UsageError) as error:
            problem = f"cannot be asked: {error}"
        if problem is None:
            asked.append((path, match))
        else:
            reports.append(StackReport(name=match["name"], pid=pid, text="", problem=problem))
    _wait_settled([path for path, _ in asked], clock=clock, timeout_s=timeout_s)
    for path, match in asked:
        text = _read(path)
        problem = None if text else f"no answer within {timeout_s:.0f} s: {_state(int(match['pid']))}"
        reports.append(StackReport(name=match["name"], pid=int(match["pid"]), text=text, problem=problem))
    return sorted(reports, key=lambda report: (report.name, report.pid))


def facts_of_process(pid: int) -> dict[str, object]:
    """Return what the kernel tells of a process and its threads: state, and what each waits in."""
    root = Path(f"/proc/{pid}")
    threads = []
    for task in sorted(root.glob("task/[0-9]*"), key=lambda path: int(path.name))[:THREAD_LIMIT]:
        row = {name: _text(task / name).strip() for name in ("comm", "wchan")}
        row["syscall"] = _text(task / "syscall").split(" ")[0]  # its number; what follows are addresses
        threads.append({"tid": int(task.name), "state": _stat_field(task, 2), **row})
    executable = ""
    with contextlib.suppress(OSError):
        executable = str((root / "exe").readlink())
    wanted = ("State", "VmRSS", "RssShmem", "Threads", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
    status = dict(line.split(":", 1) for line in _text(root / "status").splitlines() if ":" in line)
    return {
        "pid": pid,
        "state": _state(pid),
        "executable": executable,
        "status": {name: status[name].strip() for name in wanted if name in status},
        "oom_score": _text(root / "oom_score").strip(),
        "threads": threads,
    }


def _files(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in sorted(folder.glob("stacks-*.txt")):
        match = _FILE.fullmatch(path.name)
        if match is not None:
            yield path, match


def _ask(path: Path, pid: int, ticks: int) -> str | None:
    """Send the signal; return why that makes no sense, None if it was sent."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return "has ended"
    try:
        if _start_ticks(pid) != ticks:  # after the pidfd was opened: from here on it means this very process
            return "has ended"
        if not _catches(pid):
            return "does not answer the signal any more"
        with open_private(path, os.O_WRONLY) as stream:
            stream.truncate(0)
        signal.pidfd_send_signal(pidfd, SIGNAL)
    except ProcessLookupError:
        return "has ended"
    finally:
        os.close(pidfd)
    return None


def _wait_settled(paths: list[Path], *, clock: Clock, timeout_s: float) -> None:
    """Wait until every file has bytes and has stopped growing."""
    deadline_s = clock.now_s() + timeout_s
    sizes: dict[Path, int] = {}
    unchanged = dict.fromkeys(paths, 0)
    while any(count < SETTLED_POLLS for count in unchanged.values()) and clock.now_s() < deadline_s:
        clock.sleep(POLL_S)
        for path in paths:
            size = path.stat().st_size if path.exists() else 0
            unchanged[path] = unchanged[path] + 1 if size and size == sizes.get(path) else 0
            sizes[path] = size


def _read(path: Path) -> str:
    try:
        with open_private(path, os.O_RDONLY) as stream:
            return stream.read(TEXT_LIMIT_BYTES).decode("utf-8", "replace")
    except (OSError, UsageError):
        return ""  # its process has ended meanwhile


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended, or the kernel does not tell
        return ""


def _stat_field(folder: Path, number: int) -> str:
    """Return a field of `stat`, counted from 0; the name, field 1, may hold blanks."""
    fields = _text(folder / "stat").rpartition(")")[2].split()
    return fields[number - 2] if len(fields) > number - 2 else ""


def _start_ticks(pid: int) -> int:
    """Return when a process was started, in ticks since boot; -1 if there is none."""
    return int(_stat_field(Path(f"/proc/{pid}"), 21) or -1)


def _state(pid: int) -> str:
    names = {"R": "running", "S": "sleeping", "D": "waiting in the kernel", "T": "stopped", "t": "traced", "Z": "dead"}
    letter = _stat_field(Path(f"/proc/{pid}"), 2)
    return names.get(letter, letter or "ended")


def _catches(pid: int) -> bool:
    """Return whether a process has a handler for the signal, from C or Python."""
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", _text(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (SIGNAL - 1) & 1)
