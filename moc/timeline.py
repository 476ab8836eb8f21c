"""Merge the spans of many processes into one file in the Trace Event Format, which Perfetto and chrome://tracing show.

Each input has one JSON line per event, as `moc.trace.JsonLinesSink` writes them; one file may hold several processes
(the lives of a rank), one after the other or mixed. Memory does not grow with the files: each is read twice, first for
what processes it has, then merged by time. In the result times never go back, and every span that begins also ends: one
that was open when its process wrote no more ends there, with an instant "killed or cut off".

Times are wall clocks (`time.time_ns`), so several nodes line up as well as their clocks do.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from moc.errors import UsageError

__all__ = ["Lane", "MergeReport", "merge_traces"]

REORDER_LIMIT = 1024  # threads of a process take the time before they take turns to write
COMMON = ("t_ns", "pid", "thread", "event", "span")
CUT_OFF = "killed or cut off"

Event = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Lane:
    """One process in one file; `is_cut_off` says that spans were open when it wrote no more."""

    path: Path
    pid: int
    number: int
    rows: int = 0
    first_ns: int = 0
    last_ns: int = 0
    is_cut_off: bool = False
    threads: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return (self.last_ns - self.first_ns) / 1e9

    @property
    def name(self) -> str:
        stem = self.path.stem
        label = f"rank {int(stem[4:])}" if stem[:4] == "rank" and stem[4:].isdecimal() else stem
        return f"{label} (pid {self.pid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What was merged; `bad_lines` are those that are not whole events, `lost_ends` ends without a begin."""

    lanes: tuple[Lane, ...]
    events: int
    bad_lines: int
    lost_ends: int


@dataclass(slots=True)
class _File:
    """One input and what its first reading found; only its first `size` bytes are read, for it may be growing."""

    path: Path
    size: int
    lanes: dict[int, Lane]
    bad_lines: int = 0
    lost_ends: int = 0


def merge_traces(paths: Sequence[Path], target: TextIO) -> MergeReport:
    """Write one trace. Blocks: for two readings of every file. Raises: UsageError if none has an event, OSError."""
    files = []
    count = 0
    for path in paths:
        files.append(_scan(path, first_number=count + 1))
        count += len(files[-1].lanes)
    lanes = [lane for file in files for lane in file.lanes.values()]
    if not lanes:
        raise UsageError(f"no events in these files: files={len(paths)} allowed=files written by --trace or trace_dir")
    begin_ns = min(lane.first_ns for lane in lanes)
    target.write('{"traceEvents":[\n')
    events = 0
    for event in _all_events(files, lanes, begin_ns):
        target.write((",\n" if events else "") + json.dumps(event, separators=(",", ":")))
        events += 1
    other = json.dumps({"begin_unix_ns": begin_ns, "clock": "time.time_ns"})
    target.write(f'\n],"displayTimeUnit":"ms","otherData":{other}}}\n')
    return MergeReport(
        lanes=tuple(lanes),
        events=events,
        bad_lines=sum(file.bad_lines for file in files),
        lost_ends=sum(file.lost_ends for file in files),
    )


def _scan(path: Path, *, first_number: int) -> _File:
    """Find the processes of a file, and how long each writes."""
    lanes: dict[int, Lane] = {}
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        file = _File(path, size, lanes)
        for row in _rows(stream, file):
            lane = lanes.get(row["pid"])
            if lane is None:
                lane = Lane(path=path, pid=row["pid"], number=first_number + len(lanes), first_ns=row["t_ns"])
                lanes[row["pid"]] = lane
            lane.rows += 1
            lane.first_ns = min(lane.first_ns, row["t_ns"])
            lane.last_ns = max(lane.last_ns, row["t_ns"])
            lane.threads.setdefault(row["thread"], len(lane.threads) + 1)
    return file


def _rows(stream: BinaryIO, file: _File) -> Iterator[Event]:
    """Yield the events of a file up to its scanned size; the others are counted: a kill may tear the last line."""
    stream.seek(0)
    left, bad = file.size, 0
    while left > 0 and (line := stream.readline(left)):
        left -= len(line)
        try:
            row = json.loads(line)
            is_event = isinstance(row, dict) and all(name in row for name in COMMON)
        except ValueError:
            is_event = False
        if is_event and type(row["t_ns"]) is int and type(row["pid"]) is int and type(row["thread"]) is str:
            yield row
        else:
            bad += 1
    file.bad_lines = bad


def _all_events(files: Sequence[_File], lanes: Sequence[Lane], begin_ns: int) -> Iterator[Event]:
    """Yield names first, then every event by time."""
    for lane in lanes:
        yield {"ph": "M", "name": "process_name", "pid": lane.number, "tid": 0, "args": {"name": lane.name}}
        order = {"sort_index": lane.number}
        yield {"ph": "M", "name": "process_sort_index", "pid": lane.number, "tid": 0, "args": order}
        for thread, tid in lane.threads.items():
            yield {"ph": "M", "name": "thread_name", "pid": lane.number, "tid": tid, "args": {"name": thread}}
    for t_ns, event in heapq.merge(*(_in_order(file) for file in files), key=lambda item: item[0]):
        yield {**event, "ts": (t_ns - begin_ns) / 1000}


def _in_order(file: _File) -> Iterator[tuple[int, Event]]:
    """Yield a file's events by time: what is slightly out of order is sorted, what is more so is moved."""
    heap: list[tuple[int, int, Event]] = []
    reached = 0
    for number, (t_ns, event) in enumerate(_events(file)):
        heapq.heappush(heap, (t_ns, number, event))
        if len(heap) > REORDER_LIMIT:
            t_ns, _, event = heapq.heappop(heap)
            reached = max(reached, t_ns)
            yield reached, event
    while heap:
        t_ns, _, event = heapq.heappop(heap)
        reached = max(reached, t_ns)
        yield reached, event


def _events(file: _File) -> Iterator[tuple[int, Event]]:
    """Yield a file's events as they were written, each thread's by time, with an end for every begin."""
    open_spans: dict[tuple[int, str], list[str]] = {}
    reached: dict[tuple[int, str], int] = {}
    left = {pid: lane.rows for pid, lane in file.lanes.items()}
    file.lost_ends = 0
    with file.path.open("rb") as stream:
        for row in _rows(stream, file):
            pid, thread = row["pid"], row["thread"]
            lane = file.lanes[pid]
            place = (pid, thread)
            t_ns = reached[place] = max(row["t_ns"], reached.get(place, 0))
            stack = open_spans.setdefault(place, [])
            base: Event = {"pid": lane.number, "tid": lane.threads[thread]}
            if row["event"] == "begin":
                stack.append(row["span"])
                yield t_ns, {"ph": "B", "name": row["span"], "cat": _area(row["span"]), **base, "args": _fields(row)}
            elif row["span"] in stack:
                while (span := stack.pop()) != row["span"]:  # its own end was never written
                    yield t_ns, {"ph": "E", "name": span, **base}
                args = {"error": row.get("error")} if row["event"] == "error" else {}
                yield t_ns, {"ph": "E", "name": span, **base, "args": args}
            else:
                file.lost_ends += 1
            left[pid] -= 1
            if left[pid] == 0:
                last_ns = max(time for (owner, _), time in reached.items() if owner == pid)
                yield from _close(lane, {t: s for (owner, t), s in open_spans.items() if owner == pid and s}, last_ns)


def _close(lane: Lane, open_spans: dict[str, list[str]], last_ns: int) -> Iterator[tuple[int, Event]]:
    """End what was open when a process wrote no more."""
    if not open_spans:
        return
    lane.is_cut_off = True
    spans = [span for _, stack in sorted(open_spans.items()) for span in stack]
    base: Event = {"pid": lane.number, "tid": 0}
    yield last_ns, {"ph": "i", "s": "p", "name": CUT_OFF, "cat": "process", **base, "args": {"open": spans}}
    for thread, stack in sorted(open_spans.items()):
        for span in reversed(stack):
            yield last_ns, {"ph": "E", "name": span, "pid": lane.number, "tid": lane.threads[thread]}


def _fields(row: Event) -> Event:
    return {name: value for name, value in row.items() if name not in COMMON}


def _area(span: str) -> str:
    return span.partition(".")[0]
