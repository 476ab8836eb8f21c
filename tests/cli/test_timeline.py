"""Merged traces are what viewers expect: every begin ends, time never goes back, processes and threads have names."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.errors import UsageError
from moc.timeline import CUT_OFF, MergeReport, merge_traces
from moc.trace import JsonLinesSink, Trace
from tests.cli.console import moc, moc_json

REPOSITORY = Path(__file__).parents[2]
WORKER = REPOSITORY / "tests" / "crash" / "worker.py"


def _line(t_ns: int, event: str, span: str, *, pid: int = 7, thread: str = "main", **fields: object) -> str:
    return json.dumps({"t_ns": t_ns, "pid": pid, "thread": thread, "event": event, "span": span, **fields}) + "\n"


def _merge(*paths: Path) -> tuple[list[dict[str, Any]], MergeReport]:
    target = io.StringIO()
    report = merge_traces(paths, target)
    document = json.loads(target.getvalue())
    assert set(document) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert len(document["traceEvents"]) == report.events
    return document["traceEvents"], report


def check_format(events: list[dict[str, Any]]) -> None:
    """Assert what the Trace Event Format asks for."""
    named = {(e["pid"], e["name"]) for e in events if e["ph"] == "M"}
    threads = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    reached = 0.0
    stacks: dict[tuple[int, int], list[str]] = {}
    for event in events:
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        if event["ph"] == "M":
            assert event["args"], event
            continue
        assert (event["pid"], "process_name") in named
        assert event["ts"] >= reached >= 0
        reached = event["ts"]
        stack = stacks.setdefault((event["pid"], event["tid"]), [])
        match event["ph"]:
            case "B":
                assert (event["pid"], event["tid"]) in threads
                stack.append(event["name"])
            case "E":
                assert stack.pop() == event["name"]
            case "i":
                assert event["s"] in "gpt"
            case other:
                raise AssertionError(f"unknown phase {other}")
    assert not any(stacks.values())


@given(st.integers(0, 2**32))
def test_whatever_processes_write_the_result_is_a_sound_trace(seed: int) -> None:
    chance = random.Random(seed)
    begun: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(chance.randint(1, 3)):
            rows: list[tuple[int, str]] = []
            for pid in range(chance.randint(1, 3)):  # the lives of a rank, mixed with each other
                for thread in ("main", "copy"):
                    rows += _random_rows(chance, pid, thread, begun)
            # As several threads write them: by time, but not exactly. A thread's own lines never change places.
            jitter = {thread: chance.randint(0, 40) for thread in ("main", "copy")}
            rows.sort(key=lambda row: row[0] + jitter[json.loads(row[1])["thread"]])
            paths.append(Path(folder) / f"rank{number:05d}.jsonl")
            paths[-1].write_text("".join(line for _, line in rows) + chance.choice(["", '{"t_ns": 12, "pi']))
        if not begun:
            return
        events, report = _merge(*paths)

    check_format(events)
    assert Counter(e["name"] for e in events if e["ph"] == "B") == begun
    assert report.lost_ends == 0
    cut_off = {e["pid"] for e in events if e["name"] == CUT_OFF}
    assert cut_off == {lane.number for lane in report.lanes if lane.is_cut_off}


def _random_rows(chance: random.Random, pid: int, thread: str, begun: Counter[str]) -> list[tuple[int, str]]:
    """Return a thread's events up to a random kill."""
    t_ns = 1_700_000_000_000_000_000 + chance.randint(0, 100)
    stack: list[str] = []
    rows = []
    for _ in range(chance.randint(0, 12)):
        t_ns += chance.randint(0, 20)
        if stack and chance.random() < 0.5:
            rows.append((t_ns, _line(t_ns, chance.choice(["end", "error"]), stack.pop(), pid=pid, thread=thread)))
        else:
            stack.append(chance.choice(["save.persist", "store.write", "commit.put"]))
            begun[stack[-1]] += 1
            rows.append((t_ns, _line(t_ns, "begin", stack[-1], pid=pid, thread=thread, bytes=3)))
    return rows


def test_a_killed_process_ends_where_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "rank00003.jsonl"
    first = _line(1000, "begin", "save.persist", step=4) + _line(3000, "begin", "persist.put", key="k")
    path.write_text(first + _line(9000, "begin", "attach.begin", pid=8) + _line(9500, "end", "attach.begin", pid=8))

    events, report = _merge(path)

    check_format(events)
    assert [lane.name for lane in report.lanes] == ["rank 3 (pid 7)", "rank 3 (pid 8)"]
    assert [lane.is_cut_off for lane in report.lanes] == [True, False]
    (mark,) = [e for e in events if e["name"] == CUT_OFF]
    assert (mark["ts"], mark["args"]["open"]) == (2.0, ["save.persist", "persist.put"])
    ends = [(e["name"], e["ts"]) for e in events if e["ph"] == "E"]
    assert ends == [("persist.put", 2.0), ("save.persist", 2.0), ("attach.begin", 8.5)]
    begin = next(e for e in events if e["ph"] == "B")
    assert (begin["ts"], begin["cat"], begin["args"]) == (0.0, "save", {"step": 4})


def test_torn_lines_and_lost_ends_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        _line(1, "end", "never.begun")
        + _line(2, "begin", "outer.span")
        + _line(3, "begin", "inner.span")
        + '{"t_ns": 4, "pid": 7}\nnot json\n[1]\n'
        + _line(5, "end", "outer.span")
        + _line(6, "begin", "torn.span")[:20]
    )

    events, report = _merge(path)

    check_format(events)
    assert (report.bad_lines, report.lost_ends) == (4, 1)
    assert [e["name"] for e in events if e["ph"] == "E"] == ["inner.span", "outer.span"]


def test_files_without_events_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("nothing\n")

    with pytest.raises(UsageError, match="no events"):
        _merge(tmp_path / "x.jsonl")
    assert moc("trace", "merge", tmp_path / "x.jsonl", cwd=tmp_path).returncode == 2
    assert moc("trace", "merge", tmp_path / "absent", cwd=tmp_path).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Only a window of events is held: an unbounded generator of lines would not fit otherwise."""
    trace = Trace(JsonLinesSink(tmp_path / "agent.jsonl"))
    for step in range(2000):
        with trace.span("save.persist", step=step), trace.span("persist.put", bytes=1):
            pass

    code = (
        "import sys, tracemalloc; from pathlib import Path; from moc.timeline import merge_traces\n"
        "tracemalloc.start(); out = open(sys.argv[2], 'w'); merge_traces([Path(sys.argv[1])], out)\n"
        "print(tracemalloc.get_traced_memory()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "agent.jsonl", tmp_path / "out.json"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )

    assert int(done.stdout) < 2 * 2**20, "8000 events held at once are 8 MiB"
    check_format(json.loads((tmp_path / "out.json").read_text())["traceEvents"])


def test_a_job_under_moc_run_is_traced_from_supervisor_to_agent(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="moc-") as folder:
        root = Path(folder) / "rt"
        worker = ("--rank", "0", "--size", "1", "--rendezvous", tmp_path / "rv", "--steps", "6", "--persist-every", "2")
        places = ("--storage", tmp_path / "repo", "--root", root, "--log", tmp_path / "worker.log")
        run = moc(
            *("run", "--trace", "traces", "--runtime-root", root, "--", sys.executable, WORKER, *worker, *places),
            cwd=tmp_path,
        )
        merged = moc_json("trace", "merge", "traces", "-o", "all.json.gz", cwd=tmp_path)
        text = moc("trace", "merge", *sorted((tmp_path / "traces").iterdir()), cwd=tmp_path)

    assert run.returncode == 0, run.stderr
    kinds = [row["name"].split("-")[0].split(" ")[0] for row in merged["processes"]]
    assert sorted(kinds) == ["agent", "rank", "run"]
    with gzip.open(tmp_path / "all.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    check_format(events)
    by_process = {row["name"].split(" ")[0].split("-")[0]: number for number, row in enumerate(merged["processes"], 1)}
    spans = {kind: {e["name"] for e in events if e["pid"] == n and e["ph"] == "B"} for kind, n in by_process.items()}
    assert "supervise.live" in spans["run"]
    assert {"attach.record", "snapshot.copy", "train.update"} <= spans["rank"]
    assert {"save.persist", "commit.put"} <= spans["agent"]
    assert not any(row["is_cut_off"] for row in merged["processes"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == events
    assert "ui.perfetto.dev" in text.stderr
