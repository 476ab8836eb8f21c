"""What a soak looks at from outside: the job's processes in /proc, its files, and how both grow."""

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["AGENT", "LIMITS", "RANK", "Growth", "Sample", "Watch", "agent_pids", "growth_of", "processes", "rank_pids"]

AGENT, RANK = "agent", "rank"
SETTLED_S = 5.0  # since a process has mapped an arena: before, it still takes the memory that it will keep
LEAST_SAMPLES = 12  # fewer say nothing about growth
ARENAS_ALLOWED = 2  # of the present life, and of the one it was recovered from
LIMITS = {  # what the last third of a soak may have more than the first: noise, not a leak
    "anon_mb": 24.0,
    "arena_mb": 1.0,
    "arenas": 0.0,
    "descriptors": 4.0,
    "threads": 4.0,
    "repository_files": 4.0,
    "runtime_files": 2.0,  # the log turns over
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process, or with the pid 0 the files, at one time; `age_s` since it has mapped an arena."""

    at_s: float
    kind: str
    pid: int
    age_s: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How one value changed: medians of the first and the last third, and the slope of a line through all."""

    kind: str
    name: str
    first: float
    last: float
    per_hour: float

    @property
    def is_leak(self) -> bool:
        return self.last - self.first > LIMITS[self.name]


@dataclass(slots=True)
class Watch:
    """Samples of the processes of one run and of its folders."""

    run: str
    storage: Path
    runtime: Path
    samples: list[Sample] = field(default_factory=list)
    arenas_most: int = 0
    _mapped_s: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """Take one sample of everything."""
        now_s = time.monotonic()
        found = [(AGENT, pid) for pid in agent_pids(self.runtime)] + [(RANK, pid) for pid in rank_pids(self.run)]
        for kind, pid in found:
            values = _process_values(pid)
            if values is None:
                continue  # it has ended
            self.arenas_most = max(self.arenas_most, int(values["arenas"]))
            age_s = now_s - self._mapped_s.setdefault(pid, now_s) if values["arenas"] else 0.0
            self.samples.append(Sample(at_s=now_s, kind=kind, pid=pid, age_s=age_s, values=values))
        files = {
            # A life's record stays for ever, by design.
            "repository_files": sum(1 for path in _files(self.storage) if path.parent.name != "incarnations"),
            "runtime_files": sum(1 for _ in _files(self.runtime)),
        }
        self.samples.append(Sample(at_s=now_s, kind="files", pid=0, age_s=SETTLED_S, values=files))


def growth_of(samples: Sequence[Sample]) -> list[Growth]:
    """Return the growth of every value of settled processes and of the files, where there are enough samples."""
    rows = []
    for kind in (AGENT, RANK, "files"):
        settled = [sample for sample in samples if sample.kind == kind and sample.age_s >= SETTLED_S]
        if len(settled) < LEAST_SAMPLES:
            continue
        third = len(settled) // 3
        for name in settled[0].values:
            values = [sample.values[name] for sample in settled]
            slope = statistics.linear_regression([sample.at_s for sample in settled], values).slope
            rows.append(
                Growth(
                    kind=kind,
                    name=name,
                    first=statistics.median(values[:third]),
                    last=statistics.median(values[-third:]),
                    per_hour=3600 * slope,
                )
            )
    return rows


def agent_pids(runtime: Path) -> list[int]:
    """Return the processes of the agent of a runtime folder."""
    return [pid for pid, words in processes() if "moc.agent" in words and str(runtime) in words]


def rank_pids(run: str) -> list[int]:
    """Return the ranks of a run, which a launcher has given their numbers."""
    named = [pid for pid, words in processes() if f"checkpoint.run_id={run}" in words]
    return [pid for pid in named if re.search(rb"(^|\0)RANK=\d", _read(pid, "environ"))]


def processes() -> Iterator[tuple[int, list[str]]]:
    """Yield pid and command line of every process."""
    for path in Path("/proc").glob("[0-9]*"):
        words = _read(int(path.name), "cmdline").decode(errors="replace").split("\0")
        yield int(path.name), words


def _process_values(pid: int) -> dict[str, float] | None:
    status = dict(re.findall(r"(?m)^(\w+):\s+(\d+)", _read(pid, "status").decode()))
    try:
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
    if "RssAnon" not in status:
        return None
    mapped = set(re.findall(r"(\d+)\s+/memfd:moc-(?!message)", _read(pid, "maps").decode(errors="replace")))
    return {
        "anon_mb": int(status["RssAnon"]) / 1024,
        "arena_mb": int(status["RssShmem"]) / 1024,
        "arenas": float(len(mapped)),
        "descriptors": float(descriptors),
        "threads": float(status["Threads"]),
    }


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""  # it has ended


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that others write to and delete from meanwhile."""
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry
