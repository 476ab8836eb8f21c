"""The log of a run: one JSONL file per rank, appended by every incarnation, and its reader.

    {"event": "start", "incarnation": 2, "resume_step": 48, ...}
    {"event": "step", "incarnation": 2, "step": 49, "loss": 4.73, "loss_hex": "0x1.2eb...p+2", ...}

A line is one write, so a SIGKILL can tear at most the last one; a later incarnation cuts a torn line off before it
appends. The surviving lineage is what is left when every start record takes back the steps after its `resume_step`.
"""

import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["RunLog", "log_path", "rank_paths", "read_records", "surviving_steps"]

Record = dict[str, Any]


def log_path(folder: Path, rank: int) -> Path:
    """Return the file of this rank."""
    return folder / f"rank{rank:05d}.jsonl"


def rank_paths(folder: Path) -> tuple[Path, ...]:
    """Return the files of all ranks in the folder, sorted by rank."""
    return tuple(sorted(path for path in folder.glob("rank*.jsonl") if re.fullmatch(r"rank\d+\.jsonl", path.name)))


class RunLog:
    """Appends records to one rank's file; every record is in the kernel's hands when `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        _cut_torn_line(self._descriptor)

    def write(self, record: Record) -> None:
        """Append one record as one line, in one system call."""
        data = (json.dumps(record) + "\n").encode()
        written = os.write(self._descriptor, data)
        if written != len(data):
            raise OSError(f"log line was cut short written={written} bytes={len(data)}")

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path) -> list[Record]:
    """Return the records of one file; a torn last line is left out, any other broken line is an error."""
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1]  # what follows the last newline is torn, or nothing
    records: list[Record] = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
        except ValueError as e:
            raise ValueError(f"log line is not JSON path={path} line={number}") from e
        if not isinstance(record, dict):
            raise ValueError(f"log line is not a record path={path} line={number}")
        records.append(record)
    return records


def surviving_steps(records: list[Record]) -> dict[int, Record]:
    """Return the step records that led to the newest state, by step in ascending order."""
    surviving: dict[int, Record] = {}
    for record in records:
        event = record.get("event")
        if event == "start":
            resume = record["resume_step"]
            surviving = {step: kept for step, kept in surviving.items() if step <= resume}
        elif event == "step":
            surviving[record["step"]] = record
    return dict(sorted(surviving.items()))


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, size, 0) if size else b""
    whole = data.rfind(b"\n") + 1
    if whole != size:
        os.ftruncate(descriptor, whole)
