"""Drives a job of torch-free workers through many lives: start, wait, kill, start again, compare.

Workers are real processes forked from a server that has imported everything (a life costs 0.1 s instead of 1 s), the
agent is the production one. Every wait ends with an event or with an AssertionError that shows what was written.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.runtime import LOG_NAME, SOCKET_NAME, runtime_folder
from moc.errors import ObjectMissingError
from moc.repository import Repository
from moc.store.open import open_store
from moc.verify import verify_checkpoint
from tests.crash.worker import serve
from tests.support.plain import expected_digest, expected_tensors

__all__ = ["Event", "Job", "Life", "lineage_steps", "start_agent", "until", "wait_killed"]

AGENT_WORKER = Path(__file__).resolve().parents[1] / "crash" / "agent_worker.py"
EDITION = Path(__file__).resolve().with_name("edition.py")
DEADLINE_S = 60.0
POLL_MS = 5
ENDLESS = 1_000_000  # steps of a life that ends by a kill

Event = dict[str, Any]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.crash.worker"])


@dataclass(slots=True)
class Life:
    """The trainers of one life, by rank."""

    job: Job
    number: int
    logs: list[Path]
    errors: list[Path]
    processes: list[BaseProcess]
    _read: dict[int, list[Event]] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.processes)

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def events(self, rank: int, kind: str | None = None) -> list[Event]:
        """Return what a rank has written so far; a line that is not whole yet is left for later."""
        events = self._read.setdefault(rank, [])
        if self.logs[rank].exists():
            with self.logs[rank].open("rb") as stream:
                stream.seek(self._offsets.get(rank, 0))
                whole = stream.read().rpartition(b"\n")[0]
            if whole:
                self._offsets[rank] = self._offsets.get(rank, 0) + len(whole) + 1
                events += [json.loads(line) for line in whole.splitlines()]
        return [event for event in events if kind is None or event["event"] == kind]

    def last(self, rank: int, kind: str) -> Event | None:
        events = self.events(rank, kind)
        return events[-1] if events else None

    def newest_step(self, kind: str) -> int | None:
        """Return the newest step that any rank has announced in events of this kind."""
        steps = [event["step"] for rank in range(self.size) for event in self.events(rank, kind)]
        return max(steps, default=None)

    # Waiting

    def until(
        self, condition: Callable[[], Any], what: str, *, may_end: bool = False, deadline_s: float = DEADLINE_S
    ) -> Any:
        """Return the condition's first true value; fail at the deadline or (not `may_end`) at the trainers' end."""
        ends_s = time.monotonic() + deadline_s
        poller = select.poll()
        running = {process.sentinel for process in self.processes if process.is_alive()}
        for sentinel in running:
            poller.register(sentinel, select.POLLIN)
        while True:
            value = condition()
            if value:
                return value
            if not may_end and not any(process.is_alive() for process in self.processes):
                value = condition()
                if value:
                    return value
                raise AssertionError(f"trainers ended before {what}\n{self.story()}")
            if time.monotonic() > ends_s:
                raise AssertionError(f"{what} did not happen within {deadline_s} s\n{self.story()}")
            for sentinel, _ in poller.poll(POLL_MS):
                poller.unregister(sentinel)

    def event(self, kind: str, *, rank: int = 0, step: int = 0, may_end: bool = False) -> Event:
        """Wait for a rank's event of this kind at this step or later."""

        def found() -> Event | None:
            return next((e for e in self.events(rank, kind) if e.get("step", step) >= step), None)

        event = self.until(found, f"event {kind!r} of rank {rank} at step {step}", may_end=may_end)
        assert isinstance(event, dict)
        return event

    def ended(self, *, deadline_s: float = DEADLINE_S) -> list[int]:
        """Wait until all trainers have ended; return their exit codes (negative: the signal)."""
        self.until(
            lambda: all(not p.is_alive() for p in self.processes),
            "the end of all trainers",
            may_end=True,
            deadline_s=deadline_s,
        )
        return [process.exitcode or 0 for process in self.processes]

    def finished(self) -> None:
        """Wait until all trainers have come to their own good end."""
        codes = self.ended()
        assert codes == [0] * self.size, f"exit codes {codes}\n{self.story()}"

    def refused(self, error: str) -> str:
        """Wait until attach is refused on all ranks with this class; return rank 0's words."""
        self.ended()
        events = [self.last(rank, "refused") for rank in range(self.size)]
        assert all(e is not None and e["error"] == error for e in events), f"expected {error}: {events}\n{self.story()}"
        assert events[0] is not None
        return str(events[0]["words"])

    # Ending

    def kill(self, *ranks: int) -> None:
        """SIGKILL these trainers (default: all) and wait until they are gone."""
        for rank in ranks or range(self.size):
            if self.processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(self.pid(rank), signal.SIGKILL)
        for rank in ranks or range(self.size):
            self.processes[rank].join(DEADLINE_S)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(self.size):
            os.kill(self.pid(rank), number)

    # Judging

    def attached(self) -> Event:
        """Wait until all ranks have attached and check every rank's state; return rank 0's event."""
        events = [self.event("attached", rank=rank) for rank in range(self.size)]
        for event in events:
            step = event["step"]
            assert step == events[0]["step"], f"ranks resumed at different steps\n{self.story()}"
            assert event["tensors"] == expected_tensors(event["rank"], self.size, step), (
                f"wrong tensors\n{self.story()}"
            )
        return events[0]

    def exact(self) -> None:
        """Check the digest of everything the trainers reported against an undisturbed run."""
        for rank in range(self.size):
            for event in self.events(rank):
                if event["event"] in ("attached", "step"):
                    expected = expected_digest(rank, self.size, event["step"])
                    assert event["digest"] == expected, f"rank {rank} differs at step {event['step']}\n{self.story()}"

    def story(self) -> str:
        """Return what the processes wrote last, for a failed test."""
        parts = [f"life {self.number} in {self.job.folder}, alive: {[p.is_alive() for p in self.processes]}"]
        for rank in range(self.size):
            tail = [json.dumps(event)[:600] for event in self.events(rank)[-4:]]
            errors = self.errors[rank].read_text()[-2500:] if self.errors[rank].exists() else ""
            parts += [f"-- rank {rank}, exit code {self.processes[rank].exitcode}", *tail, errors]
        logs = [path for root in self.job.roots for path in root.glob(f"*/{LOG_NAME}")]
        parts += [f"-- {path}\n{path.read_text()[-2500:]}" for path in logs]
        return "\n".join(parts)


class Job:
    """One repository, one runtime root, the lives of a job on them. A context manager that leaves no process behind."""

    def __init__(
        self,
        *,
        size: int = 1,
        nodes: int = 1,
        root: Path | None = None,
        storage: Path | str | None = None,
        **options: object,
    ) -> None:
        """`options` are the worker's; each life may override them. `root` and `storage` may be another job's.

        Every one of the `nodes` has a root of its own, and as many ranks in a row as the others.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="moc-crash-"))
        self.size, self.options = size, options
        self.storage: Any = storage or self.folder / "repo"
        self.root = root or self.folder / "rt"
        self.roots = [self.root, *(self.folder / f"rt{node}" for node in range(1, nodes))]
        self.lives: list[Life] = []
        self._is_guest = root is not None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for life in self.lives:
            life.kill()
        if not self._is_guest:
            for pid in _agents_below(self.folder):
                _kill(pid)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        *,
        size: int | None = None,
        kill: Mapping[int, str] | None = None,
        logs_in: Mapping[int, Path] | None = None,
        only: Mapping[int, Mapping[str, object]] | None = None,
        **options: object,
    ) -> Life:
        """Start a life in this process's environment; `kill` maps ranks to the "span:event:count" at which they die,
        `logs_in` to other folders, `only` to options of their own.
        """
        size, number = size or self.size, len(self.lives) + 1
        folders = [(logs_in or {}).get(rank, self.folder) for rank in range(size)]
        logs = [folder / f"life{number}-{rank}.log" for rank, folder in enumerate(folders)]
        errors = [path.with_suffix(".err") for path in logs]
        common = {"steps": ENDLESS, **self.options, **options}
        common |= {"size": size, "rendezvous": self.folder / f"rv{number}", "storage": self.storage}
        processes: list[BaseProcess] = []
        for rank in range(size):
            fields = common | {"rank": rank, "log": logs[rank], "root": self.roots[self.node_of(rank, size)]}
            fields |= dict((only or {}).get(rank, {}))
            if kill and rank in kill:
                fields["kill"] = kill[rank]
            process = _context.Process(
                target=serve, args=(_arguments(fields), errors[rank], dict(os.environ)), daemon=True
            )
            process.start()
            processes.append(process)
        life = Life(job=self, number=number, logs=logs, errors=errors, processes=processes)
        self.lives.append(life)
        return life

    # The agent

    @property
    def run(self) -> str:
        """The run id, once a life has attached."""
        return next(path.parent.name for root in self.roots for path in root.glob(f"*/{LOG_NAME}"))

    @property
    def runtime(self) -> Path:
        return runtime_folder(self.run, self.root)

    def node_of(self, rank: int, size: int | None = None) -> int:
        return rank * len(self.roots) // (size or self.size)

    def ranks_of(self, node: int, size: int | None = None) -> list[int]:
        return [rank for rank in range(size or self.size) if self.node_of(rank, size) == node]

    def destroy_node(self, life: Life, node: int) -> None:
        """Lose a node: its trainers, its agent and everything in its runtime root, all at once."""
        life.kill(*self.ranks_of(node, life.size))
        for pid in _agents_below(self.roots[node]):
            _kill(pid)
        shutil.rmtree(self.roots[node], ignore_errors=True)

    def replace_node(self, node: int) -> Path:
        """Have later lives run on another machine in this one's place; return the former root."""
        former, self.roots[node] = self.roots[node], self.folder / f"new{len(self.lives)}-{node}"
        return former

    def agent_pid(self, node: int = 0) -> int | None:
        """Return the pid of the agent that listens, None if none does."""
        for path in self.roots[node].glob(f"*/{SOCKET_NAME}"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                if probe.connect_ex(str(path)) == 0:
                    pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                    return int(pid)
        return None

    def kill_agent(self, node: int = 0) -> int:
        """SIGKILL the agent, wait until it is gone, and return its pid."""
        pid = self.agent_pid(node)
        assert pid is not None, "no agent listens"
        _kill(pid)
        return pid

    def ask_agent(
        self, verb: str, fields: Mapping[str, object] | None = None, *, node: int = 0
    ) -> tuple[dict[str, Any], list[int]]:
        """Send the agent one request on a connection of its own."""
        client = AgentClient.connect(runtime_folder(self.run, self.roots[node]), timeout_s=DEADLINE_S)
        try:
            return client.request(verb, fields)
        finally:
            client.close()

    # The repository

    def repository(self) -> Repository:
        return Repository(open_store(str(self.storage)))

    def committed_steps(self) -> list[int]:
        return [checkpoint.name.step for checkpoint in self.repository().checkpoints()]

    def sound(self) -> None:
        """Check that every listed manifest is a checkpoint, with all its bytes, that grew from an earlier one.

        An agent that is alive may drop one meanwhile: what is not listed any more need not be whole.
        """
        repository = self.repository()
        for checkpoint in repository.checkpoints():
            report = verify_checkpoint(repository, checkpoint.name, read_data_fraction=1.0)
            try:
                manifest = repository.read_manifest(checkpoint.name)
            except ObjectMissingError:
                assert checkpoint.name not in {listed.name for listed in repository.checkpoints()}
                continue
            assert not report.findings, [str(finding) for finding in report.findings]
            if manifest.parent is not None:
                parent = (manifest.parent.incarnation, manifest.parent.step, manifest.parent.attempt or "")
                assert parent < (manifest.name.incarnation, manifest.name.step, manifest.name.attempt), str(manifest)
        repository.close()

    def listing(self) -> list[tuple[str, int, int]]:
        """Return (path, size, mtime in ns) of everything below the repository."""
        rows = []
        for path in sorted(self.storage.rglob("*")):
            status = path.lstat()
            rows.append((str(path.relative_to(self.storage)), status.st_size, status.st_mtime_ns))
        return rows


def _arguments(fields: Mapping[str, object]) -> list[str]:
    words: list[str] = []
    for name, value in fields.items():
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        for single in value if isinstance(value, list) else [value]:
            words += [flag] if single is True else [flag, str(single)]
    return words


def _agents_below(root: Path) -> list[int]:
    """Return the agents of a root, those that do not listen yet included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if any(word.startswith(f"{root}/".encode()) for word in words):
            found.append(int(path.parent.name))
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
        return
    finally:
        os.close(pidfd)


def until(condition: Callable[[], Any], what: str, *, deadline_s: float = DEADLINE_S) -> Any:
    """Return the condition's first true value; fail when the time is over. For what no process of a life can tell."""
    ends_s = time.monotonic() + deadline_s
    poller = select.poll()
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < ends_s, f"{what} did not happen within {deadline_s} s"
        poller.poll(POLL_MS)


def lineage_steps(lives: Sequence[Life]) -> list[int]:
    """Return the steps of rank 0 that led to the last life's state: of every life those that its successor kept."""
    steps: list[int] = []
    for life in lives:
        attached = life.last(0, "attached")
        if attached is None:
            continue
        steps = [step for step in steps if step <= attached["step"]]
        steps += [event["step"] for event in life.events(0, "step")]
    return steps


def start_agent(
    job: Job,
    run: str,
    kill: str | None = None,
    *,
    node: int = 0,
    edition: Path | None = None,
    is_awaited: bool = True,
) -> subprocess.Popen[bytes]:
    """Start an agent, perhaps one that dies at a span, perhaps of another version, and wait until it listens."""
    folder = runtime_folder(run, job.roots[node])
    program = [str(AGENT_WORKER)] if edition is None else [str(EDITION), str(edition), "crash/agent_worker.py"]
    command = [sys.executable, *program, "--folder", str(folder), "--run", run]
    with (folder / LOG_NAME).open("ab") as log:
        agent = subprocess.Popen(command if kill is None else [*command, "--kill", kill], stdout=log, stderr=log)
    if is_awaited:
        until(lambda: job.agent_pid(node) == agent.pid, "the agent listens")
    return agent


def wait_killed(agent: subprocess.Popen[bytes], life: Life) -> None:
    life.until(lambda: agent.poll() is not None, "the death of the agent")
    assert agent.returncode == -9, f"the agent's exit code: {agent.returncode}\n{life.story()}"
