"""Spans around every step of a workflow: timings, a per-process trace file, and the kill points of the crash tests.

A span is named ``area.verb``. A `Trace` calls its sinks at the beginning and at the end of each span; a test passes a
sink that kills the process at a chosen span, which is why production code contains no test hooks.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moc.errors import UsageError

__all__ = ["JsonLinesSink", "RingSink", "Sink", "Trace", "open_trace", "trace_name"]

Sink = Callable[[str, str, dict[str, object]], None]
"""Called as ``sink(event, span, fields)`` with event ``"begin"``, ``"end"`` or ``"error"``.

Thread: any. Must not block for long.
"""


class Trace:
    """Report spans to sinks. Thread: any. A `Trace` without sinks costs two attribute reads per span."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def joined_by(self, sink: Sink) -> Trace:
        """Return a trace that reports to one more sink, after the others."""
        return Trace(*self._sinks, sink)

    @contextmanager
    def span(self, name: str, **fields: object) -> Iterator[None]:
        """Report the beginning and the end of the enclosed work."""
        self._emit("begin", name, fields)
        try:
            yield
        except BaseException as error:
            self._emit("error", name, fields | {"error": f"{type(error).__name__}: {error}"})
            raise
        self._emit("end", name, fields)

    def _emit(self, event: str, name: str, fields: dict[str, object]) -> None:
        for sink in self._sinks:
            sink(event, name, fields)


def open_trace(folder: Path | None, name: str) -> Trace:
    """Return a trace that appends to the file of this name in a folder, which is made; without a folder, a silent one.

    Raises: UsageError where it cannot be written.
    """
    if folder is None:
        return Trace()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Trace(JsonLinesSink(folder / f"{name}.jsonl"))
    except OSError as error:
        raise UsageError(f"no trace can be written there: trace_dir={folder} reason={error.strerror}") from error


def trace_name(kind: str) -> str:
    """Return a name for the trace file of this process, which no other one has: kind, host and process number."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}"


class RingSink:
    """Keep the last events in memory. Thread: any."""

    def __init__(self, limit: int, *, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._rows: deque[dict[str, object]] = deque(maxlen=limit)

    def __call__(self, event: str, name: str, fields: dict[str, object]) -> None:
        thread = threading.current_thread().name
        self._rows.append({"t_s": self._now_s(), "thread": thread, "event": event, "span": name} | fields)

    def rows(self) -> list[dict[str, object]]:
        """Return the events, oldest first, with values as JSON has them."""
        return [json.loads(json.dumps(row, default=str)) for row in list(self._rows)]


class JsonLinesSink:
    """Append one JSON line per event to a file. Thread: any. Blocks: for one buffered line write.

    A line that cannot be written is dropped and counted in `dropped`: a full disk under the traces must not stop
    training.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._lock = threading.Lock()
        self.dropped = 0

    def __call__(self, event: str, name: str, fields: dict[str, object]) -> None:
        row = {
            "t_ns": time.time_ns(),
            "pid": os.getpid(),
            "thread": threading.current_thread().name,
            "event": event,
            "span": name,
        } | fields
        with self._lock:
            try:
                self._file.write(json.dumps(row, default=str) + "\n")
            except OSError:
                self.dropped += 1

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()
