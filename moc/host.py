"""What a process gets from its operating system, as one port: time, threads, waiting, other processes, chance, stores,
the network between nodes.

The workflows of trainers and agents reach for these through a `Host` alone, so that the simulator can run them all in
one process, on one thread at a time, under a clock and a seed of its own. What is not behind the port (sockets once
connected, memory, files of the runtime folder) never blocks and never asks for the time.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol, TypeVar

from moc.clock import Clock, SystemClock
from moc.network.port import Call, Network, Serve
from moc.store.open import open_store
from moc.store.port import Store
from moc.trace import Trace

__all__ = ["Event", "Host", "Semaphore", "SystemHost", "Task"]

T = TypeVar("T")
R = TypeVar("R")


class Task(Protocol):
    """A thread under way."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most `timeout` seconds."""

    def is_alive(self) -> bool: ...


class Event(Protocol):
    """A flag that threads wait for, as `threading.Event`."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; return whether it is."""


class Semaphore(Protocol):
    """A count of permits, as `threading.Semaphore` that begins at 0."""

    def release(self) -> None: ...

    def acquire(self) -> bool:
        """Wait for a permit and take it."""


class Host(Clock, Protocol):
    """The operating system as one process sees it. Thread: any."""

    @property
    def pid(self) -> int:
        """Return this process's number."""

    def token(self) -> str:
        """Return 8 hex digits that nobody can guess."""

    # Threads

    def spawn(self, target: Callable[[], None], *, name: str) -> Task:
        """Start a thread that does not keep the process alive."""

    def event(self) -> Event: ...

    def semaphore(self) -> Semaphore: ...

    def map(self, act: Callable[[T], R], items: Iterable[T], *, workers: int, name: str) -> list[R]:
        """Return the results in the order of the items, computed on this many threads.

        Blocks: until all have ended. Raises: the first item's error, if any failed.
        """

    # Waiting

    def wait_readable(self, handle: socket.socket | int, timeout_s: float | None) -> bool:
        """Wait until a read would not block, or the time is over; return whether it would not."""

    def select(self, selector: selectors.BaseSelector, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, waiting for it at most this long."""

    # Processes and what they share

    def pidfd(self) -> int:
        """Return a descriptor that becomes readable when this process ends; the caller closes it."""

    def kill(self, pidfd: int) -> None:
        """End a process at once, as SIGKILL does. Raises: ProcessLookupError if it has ended already."""

    def start_agent(self, folder: Path, *, run: str, idle_s: float, log: Path, timeout_s: float) -> None:
        """Start an agent that outlives this process and its process tree; return when it listens, or when it gave up.

        Blocks: at most `timeout_s` until it has left the process tree, and as long again. Raises: TimeoutError.
        """

    def connect(self, path: str, timeout_s: float) -> socket.socket:
        """Return a SEQPACKET connection whose operations have this timeout. Raises: OSError where nobody listens."""

    def lock(self, path: Path) -> IO[bytes] | None:
        """Return the open file with its lock held until it is closed or the process ends, None if another has it."""

    def open_store(self, url: str, *, trace: Trace) -> Store:
        """Return the store at a URL, to be closed by the caller."""

    # Other nodes

    def listen(self, serve: Serve, *, address: str, port: int) -> Network:
        """Answer requests at an address of this machine, on another port if that one is taken (0: any).

        Blocks: until it listens. Raises: OSError if it cannot.
        """

    def dial(self, url: str, *, stall_s: float, judge: Callable[[], None]) -> Call:
        """Return a request to be made of another node, closed by the caller.

        `stall_s` bounds each operation on the connection; `judge` is called before every read, and may raise.
        """


class SystemHost(SystemClock):
    """This process on Linux. Agents that it starts write their spans to `trace_dir`."""

    def __init__(self, *, trace_dir: Path | None = None) -> None:
        self._trace_dir = trace_dir

    @property
    def pid(self) -> int:
        return os.getpid()

    def token(self) -> str:
        return secrets.token_hex(4)

    def spawn(self, target: Callable[[], None], *, name: str) -> Task:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def event(self) -> Event:
        return threading.Event()

    def semaphore(self) -> Semaphore:
        return threading.Semaphore(0)

    def map(self, act: Callable[[T], R], items: Iterable[T], *, workers: int, name: str) -> list[R]:
        with ThreadPoolExecutor(workers, thread_name_prefix=name) as pool:
            return list(pool.map(act, items))

    def wait_readable(self, handle: socket.socket | int, timeout_s: float | None) -> bool:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else timeout_s * 1e3))

    def select(self, selector: selectors.BaseSelector, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        return selector.select(timeout_s)

    def pidfd(self) -> int:
        return os.pidfd_open(os.getpid())

    def kill(self, pidfd: int) -> None:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def start_agent(self, folder: Path, *, run: str, idle_s: float, log: Path, timeout_s: float) -> None:
        ready, ready_child = os.pipe()
        command = [sys.executable, "-m", "moc.agent", "--folder", str(folder), "--run", run, "--idle-s", str(idle_s)]
        if self._trace_dir is not None:
            command += ["--trace", str(self._trace_dir)]
        try:
            with _open_private(log) as log_file:
                starter = subprocess.Popen(
                    [*command, "--ready-fd", str(ready_child)],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    cwd=folder,
                    pass_fds=(ready_child,),
                    start_new_session=True,
                )
            os.close(ready_child)
            ready_child = -1
            starter.wait(timeout_s)  # it forks the agent and leaves, so that nobody finds the agent among our children
            if not self.wait_readable(ready, timeout_s):  # it is closed when the agent listens, or has died
                raise TimeoutError(f"not listening in time: timeout_s={timeout_s}")
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"not started in time: timeout_s={timeout_s}") from error
        finally:
            for descriptor in (ready, ready_child):
                if descriptor >= 0:
                    os.close(descriptor)

    def connect(self, path: str, timeout_s: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(timeout_s)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        return sock

    def lock(self, path: Path) -> IO[bytes] | None:
        file = _open_private(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def open_store(self, url: str, *, trace: Trace) -> Store:
        return open_store(url, trace=trace)

    def listen(self, serve: Serve, *, address: str, port: int) -> Network:
        from moc.network.http import HttpNetwork  # aiohttp takes a while, and one node does not need it

        return HttpNetwork(serve, address=address, port=port, spawn=lambda act, name: self.spawn(act, name=name))

    def dial(self, url: str, *, stall_s: float, judge: Callable[[], None]) -> Call:
        from moc.network.call import HttpCall  # http.client takes a while too

        return HttpCall(url, stall_s=stall_s, judge=judge)


def _open_private(path: Path) -> IO[bytes]:
    """Open a file for appending, readable by this user only where it is made; a link is refused."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600))
