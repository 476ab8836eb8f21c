"""Starts lives of a job: real processes with real collectives, each rank with its own log, a deadline on everything."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moc.agent.runtime import LOG_NAME, SOCKET_NAME
from tests.support.zygote import Zygote

__all__ = ["Event", "Job", "Life"]

DEADLINE_S = 90.0
POLL_S = 0.005
TAIL = 3500

Event = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Life:
    """The ranks of one life of a job."""

    zygote: Zygote
    name: str
    pids: tuple[int, ...]
    logs: tuple[Path, ...]
    records: tuple[Path, ...]
    runtime: Path
    _read: dict[int, list[Event]] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    def events(self, rank: int, kind: str) -> list[Event]:
        """Return what a rank has written so far; a line that is not whole is not there."""
        events = self._read.setdefault(rank, [])
        if self.records[rank].exists():
            with self.records[rank].open("rb") as stream:
                stream.seek(self._offsets.get(rank, 0))
                whole = stream.read().rpartition(b"\n")[0]
            if whole:
                self._offsets[rank] = self._offsets.get(rank, 0) + len(whole) + 1
                events += [json.loads(line) for line in whole.splitlines()]
        return [event for event in events if event["event"] == kind]

    def codes(self) -> list[int | None]:
        """Return every rank's exit code, None for those that run."""
        return [self.zygote.code(pid) for pid in self.pids]

    def until(
        self, condition: Callable[[], Any], what: str, *, may_end: bool = False, deadline_s: float = DEADLINE_S
    ) -> Any:
        """Return the condition's first true value; fail when time is over or, unless `may_end`, a rank has ended."""
        ends_s = time.monotonic() + deadline_s
        while True:
            has_ended = not may_end and any(code is not None for code in self.codes())
            value = condition()
            if value:
                return value
            if has_ended:
                raise AssertionError(f"{self.name}: a rank ended before {what}\n{self.story()}")
            if time.monotonic() > ends_s:
                self.signal(signal.SIGABRT)
                self.zygote.wait(1.0)
                raise AssertionError(f"{self.name}: {what} did not happen within {deadline_s:g} s\n{self.story()}")
            self.zygote.wait(POLL_S)

    def event(self, kind: str, rank: int = 0, **at_least: int) -> Event:
        """Wait for a rank's event with fields that are at least these."""

        def found() -> Event | None:
            return next(
                (e for e in self.events(rank, kind) if all((e[k] or 0) >= v for k, v in at_least.items())), None
            )

        event = self.until(found, f"event {kind!r} of rank {rank} with {at_least}")
        assert isinstance(event, dict)
        return event

    def ended(self, deadline_s: float = DEADLINE_S) -> list[int]:
        """Wait until all ranks have ended and return their codes."""
        self.until(lambda: None not in self.codes(), "the end of all ranks", may_end=True, deadline_s=deadline_s)
        return [code for code in self.codes() if code is not None]

    def finished(self, deadline_s: float = 240.0) -> None:
        """Wait until all ranks have come to a good end."""
        codes = self.codes

        def is_over() -> bool:
            return None not in codes() or any(codes())

        self.until(is_over, "a good end", may_end=True, deadline_s=deadline_s)
        assert codes() == [0] * len(self.pids), f"{self.name}: exit codes {codes()}\n{self.story()}"

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to these ranks, by default all, as far as they live."""
        for rank in ranks or range(len(self.pids)):
            if self.zygote.code(self.pids[rank]) is None:
                os.kill(self.pids[rank], number)

    def story(self) -> str:
        """Return what the processes wrote last, stacks included, for a failed test."""
        parts = []
        for rank, log in enumerate(self.logs):
            text = log.read_text(errors="replace")[-TAIL:] if log.exists() else ""
            parts.append(f"---- {self.name} rank {rank} code {self.zygote.code(self.pids[rank])}\n{text}")
        parts += [f"---- {path}\n{path.read_text()[-TAIL:]}" for path in self.runtime.rglob(LOG_NAME)]
        return "\n".join(parts)


class Job:
    """A repository, a node's agents and the lives of a job on them; a context manager that leaves no process behind."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self._zygote, self.folder = zygote, folder
        self.storage, self.runtime = folder / "repository", folder / "rt"
        self.lives: list[Life] = []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for life in self.lives:
            life.signal(signal.SIGKILL)
        for life in self.lives:
            life.ended()
        self.kill_agents()

    def start(self, name: str, ranks: int, spec: Mapping[str, object]) -> Life:
        """Start all ranks of a life; with `nodes` in the specification half of them, or a third, on each."""
        nodes = int(str(spec.get("nodes", 1)))
        logs = tuple(self.folder / f"{name}.{rank}.log" for rank in range(ranks))
        records = tuple(path.with_suffix(".jsonl") for path in logs)
        common = {"storage": str(self.storage), "runtime": str(self.runtime), "folder": str(self.folder), **spec}
        pids = []
        for rank in range(ranks):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            rendezvous = str(self.folder / f"{name}.rendezvous")
            own = {**common, "rendezvous": rendezvous, "record": str(records[rank])}
            if nodes > 1:
                own["runtime"] = str(self.node(rank * nodes // ranks))
            place = {k: str(v) for k, v in environment.items()}
            pids.append(self._zygote.fork("tests.e2e.worker", own, place, logs[rank]))
        life = Life(zygote=self._zygote, name=name, pids=tuple(pids), logs=logs, records=records, runtime=self.runtime)
        self.lives.append(life)
        return life

    def node(self, number: int) -> Path:
        """Return the runtime root of one of several nodes."""
        return self.runtime / str(number)

    def agent_pid(self) -> int | None:
        """Return the pid of the agent that listens, None if none does."""
        for path in self.runtime.glob(f"*/{SOCKET_NAME}"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                if probe.connect_ex(str(path)) == 0:
                    return int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
        return None

    def kill_agents(self, root: Path | None = None) -> int:
        """SIGKILL every agent of this job, or of one root, wait until they are gone, and return how many there were."""
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            if any(word.startswith(f"{root or self.runtime}/".encode()) for word in words):
                found += 1
                _kill(int(path.parent.name))
        return found


def _kill(pid: int) -> None:
    """SIGKILL a process that is not our child and wait until it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(DEADLINE_S * 1e3), f"process did not end: pid={pid}"
    except ProcessLookupError:
        return  # it has ended meanwhile
    finally:
        os.close(pidfd)
