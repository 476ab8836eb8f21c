"""Merge trace files of ranks and agents into one file for a timeline viewer.

  moc run --trace DIR -- deepspeed train.py    # or attach(..., trace_dir=DIR)
  moc trace merge DIR -o trace.json.gz         # then open ui.perfetto.dev

FILE is a file of JSON lines, or a folder of *.jsonl files. The result is in the
Trace Event Format: one process per rank and agent, its threads, its spans with
their fields. What was open when a process was killed ends there, marked as
"killed or cut off". Times are wall clocks; on several nodes they are as exact
as the nodes' clocks are.

JSON: {"output", "events": int, "bad_lines": int, "lost_ends": int, "processes":
[{"name", "file", "pid", "events": int, "seconds": float, "is_cut_off": bool}]}

Exit codes: 0 ok, 2 no events found, 5 the output cannot be written.
"""

from __future__ import annotations

import argparse
import gzip
import os
import resource
from pathlib import Path
from typing import TextIO, cast

from moc.cli.exits import OK
from moc.cli.options import add_json
from moc.cli.output import print_json, print_table, say
from moc.errors import UsageError
from moc.store.translate import translate_os_error
from moc.timeline import MergeReport, merge_traces

__all__ = ["configure", "run"]

FAST = 3  # three quarters of the best compression in a quarter of the time


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "moc trace merge [options] FILE [FILE ...]"
    parser.add_argument("action", choices=("merge",), metavar="merge", help="the only action")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="trace file, or a folder of them")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("trace.json"), help="default: trace.json; .gz packs"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    paths = _files(args.files)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # all files are open at once, one per rank
    output: Path = args.output
    staged = output.with_name(f".{output.name}~{os.getpid()}")
    try:
        with _opened_for_writing(staged, is_packed=output.suffix == ".gz") as target:
            report = merge_traces(paths, target)
        staged.replace(output)
    except OSError as error:
        raise translate_os_error(error, action="merge", subject=f"output={output}") from error
    finally:
        staged.unlink(missing_ok=True)
    if args.json:
        print_json(_to_json(output, report))
        return OK
    rows = [
        (
            lane.name,
            str(lane.rows),
            f"{lane.seconds:.1f}",
            "cut off" if lane.is_cut_off else "",
        )
        for lane in report.lanes
    ]
    print_table(("PROCESS", "EVENTS", "SECONDS", "END"), rows, left=frozenset({"PROCESS", "END"}))
    ignored = f", {report.bad_lines} torn lines, {report.lost_ends} lost ends" if _is_damaged(report) else ""
    say(f"moc trace: {output}: {report.events} events{ignored}; open it in https://ui.perfetto.dev")
    return OK


def _files(given: list[Path]) -> list[Path]:
    """Return the files that the arguments name, each once."""
    found: dict[Path, None] = {}
    for path in given:
        members = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        for member in members:
            if not member.is_file():
                raise UsageError(f"no such trace file: path={member} allowed=a file of JSON lines or a folder of them")
            found[member] = None
    if not found:
        raise UsageError(f"no trace files here: given={','.join(map(str, given))} allowed=a folder with *.jsonl files")
    return list(found)


def _opened_for_writing(path: Path, *, is_packed: bool) -> TextIO:
    if is_packed:
        return cast("TextIO", gzip.open(path, "wt", compresslevel=FAST, encoding="utf-8"))
    return path.open("w", encoding="utf-8")


def _is_damaged(report: MergeReport) -> bool:
    return bool(report.bad_lines or report.lost_ends)


def _to_json(output: Path, report: MergeReport) -> dict[str, object]:
    return {
        "output": str(output),
        "events": report.events,
        "bad_lines": report.bad_lines,
        "lost_ends": report.lost_ends,
        "processes": [
            {
                "name": lane.name,
                "file": str(lane.path),
                "pid": lane.pid,
                "events": lane.rows,
                "seconds": lane.seconds,
                "is_cut_off": lane.is_cut_off,
            }
            for lane in report.lanes
        ],
    }
