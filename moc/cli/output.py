"""What commands print: results on stdout, talk on stderr, 80 columns."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence

from moc.format.keys import CheckpointName
from moc.repository import Finding
from moc.store.port import Progress

__all__ = [
    "describe_age",
    "describe_bytes",
    "finding_json",
    "name_json",
    "print_facts",
    "print_json",
    "print_map",
    "print_table",
    "printable",
    "progress_bar",
    "say",
]


def printable(text: str) -> str:
    """Return the text with everything escaped that a terminal would act upon: what a repository or an agent says is
    shown, never obeyed.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def say(text: str) -> None:
    """Print talk."""
    print(printable(text), file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print one JSON value, the only thing on stdout."""
    print(json.dumps(value, indent=2, sort_keys=False))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: frozenset[str] = frozenset()) -> None:
    """Print aligned columns; those in `left` to the left, the others, numbers, to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    for row in (titles, *rows):
        cells = [
            cell.ljust(width) if title in left else cell.rjust(width)
            for title, cell, width in zip(titles, row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print one name and value per line; an empty name continues the value above."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(printable(f"{name.ljust(width)}  {value}").rstrip())


def print_map(lines: Sequence[str]) -> None:
    """Print a map of lines that are ready, after a blank one; nothing where there is none."""
    if lines:
        print("", *lines, sep="\n")


def describe_bytes(count: int) -> str:
    """Return a size for people, three digits and a binary unit."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def describe_age(seconds: float) -> str:
    """Return an age for people, in one unit."""
    if seconds < 0:
        return "0s"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def name_json(name: CheckpointName) -> dict[str, object]:
    """Return the five fields by which every command names a checkpoint."""
    return {
        "name": str(name),
        "run": name.run,
        "incarnation": name.incarnation,
        "step": name.step,
        "attempt": name.attempt,
    }


def finding_json(finding: Finding) -> dict[str, object]:
    """Return a finding: the key, the class of the error and its message."""
    return {"key": finding.key, "kind": type(finding.error).__name__, "message": str(finding.error)}


@contextlib.contextmanager
def progress_bar(label: str, total_bytes: int) -> Iterator[Progress]:
    """Show a bar on stderr while bytes are reported, if somebody is looking. Thread of the reports: any."""
    if not sys.stderr.isatty() or total_bytes <= 0:
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(True), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total_bytes)
        yield lambda count: bars.advance(task, count)


def _ignore(_: int) -> None:
    """Report to nobody."""
