"""List what nothing references, and with --apply delete it.

  leftover     objects of saves that failed or were cut off, or that a
               retention left behind; deleted
  off-lineage  checkpoints that recovery never takes; deleted if --off-lineage
  held         the same as leftover, of the newest life of the job, which may
               still be saving: kept. If that job has ended, --fence writes a
               record after which its saves fail, and they are deleted too;
               the next launch resumes all the same, from memory or storage

Nothing is deleted while a manifest or a record of a life is unreadable, and
not before the record that fenced a life is --settle seconds old: a commit may
be under way on another machine. Old temporary files go too.

JSON: {"repository", "is_applied": bool, "off_lineage": [{"name", "run",
"incarnation", "step", "attempt"}], "objects": [{"key", "size_bytes",
"modified_s"}] deleted or to be deleted, "held": [the same], "bytes": int,
"temporary_files": int, "fence": number of the record written or null}

Exit codes: 0 ok, 1 a job is alive or began meanwhile, 3 not a repository, or
nothing on the lineage, 4 something is unreadable, 5 storage unavailable, 6
other format.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence

from moc.cli.exits import OK
from moc.cli.live import add_runtime_root, serving_agents
from moc.cli.options import add_json, add_repository, opened, repository_url
from moc.cli.output import describe_age, describe_bytes, name_json, print_json, print_table, say
from moc.collect import SETTLE_S, CollectReport, Garbage, collect, fence, find_garbage, temporary_age_s
from moc.errors import CoordinationError
from moc.format.keys import parse_object_key
from moc.gc import TEMPORARY_AGE_S
from moc.host import SystemHost
from moc.repository import Repository
from moc.store.port import Entry
from moc.trace import Trace

__all__ = ["configure", "run"]

ALIVE_S = 3600.0  # a life that wrote so recently is taken for alive


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--apply", action="store_true", help="delete; without it nothing is changed")
    parser.add_argument("--off-lineage", action="store_true", help="also checkpoints off the lineage")
    parser.add_argument("--fence", action="store_true", help="the newest life has ended: collect its leftovers too")
    parser.add_argument("--force", action="store_true", help="--fence even if that life wrote within the last hour")
    parser.add_argument(
        "--settle", metavar="S", type=_seconds, default=SETTLE_S, help=f"wait for commits under way ({SETTLE_S:.0f})"
    )
    add_runtime_root(parser)
    add_repository(parser)
    add_json(parser)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"not a time to wait: given={text} allowed=0 or more seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    trace = Trace()
    with opened(args) as repository:
        garbage = find_garbage(repository, with_off_lineage=args.off_lineage, trace=trace)
        is_fencing = args.fence and garbage.has_agent
        if is_fencing:
            _refuse_if_alive(args, repository, garbage)
        if not args.apply:
            age_s = TEMPORARY_AGE_S if is_fencing and garbage.held else temporary_age_s(repository, garbage)
            temporary = repository.store.sweep(older_than_s=age_s, is_dry_run=True)
            _show_plan(args, repository.url, garbage, temporary, is_fencing=is_fencing)
            return OK
        record = fence(repository, garbage, trace=trace) if is_fencing and garbage.held else None
        report = collect(
            repository,
            with_off_lineage=args.off_lineage,
            settle_s=args.settle,
            host=SystemHost(),
            trace=trace,
            on_wait=lambda seconds: say(f"moc gc: waiting {seconds:.0f} s for commits that may be under way"),
        )
        _show_report(args, repository.url, garbage, report, None if record is None else record.number)
    return OK


def _refuse_if_alive(args: argparse.Namespace, repository: Repository, garbage: Garbage) -> None:
    """Raise CoordinationError while the newest life may still save: a fence would make its saves fail."""
    assert garbage.newest is not None, "a life without agent is not fenced"
    run_id, number = garbage.newest.run, garbage.newest.number
    for folder, status in serving_agents(repository_url(args), args.runtime_root):
        if status.get("incarnation") == number:
            raise CoordinationError(
                f"an agent of the newest life answers: run={run_id} incarnation={number} folder={folder} "
                "allowed=moc agent stop, once the job has ended"
            )
    manifests = [c.modified_s for c in repository.checkpoints() if c.name.incarnation == number]
    written_s = max([garbage.fenced_s, *manifests, *(entry.modified_s for entry in garbage.held)])
    age_s = time.time() - written_s
    if age_s < ALIVE_S and not args.force:
        raise CoordinationError(
            f"the newest life may be alive on another machine: run={run_id} incarnation={number} "
            f"last_write={max(age_s, 0.0):.0f}s ago allowed=wait for an hour of silence, or --force if it has ended"
        )


def _show_plan(args: argparse.Namespace, url: str, garbage: Garbage, temporary_files: int, *, is_fencing: bool) -> None:
    held = () if is_fencing else garbage.held
    objects = garbage.victims + (garbage.held if is_fencing else ())
    if args.json:
        print_json(
            {
                "repository": url,
                "is_applied": False,
                "off_lineage": [name_json(name) for name in garbage.off_lineage],
                "objects": [_entry_json(entry) for entry in objects],
                "held": [_entry_json(entry) for entry in held],
                "bytes": sum(entry.size_bytes for entry in objects),
                "temporary_files": temporary_files,
                "fence": None,
            }
        )
        return
    leftover = garbage.objects + (garbage.held if is_fencing else ())
    _print_objects([("leftover", leftover), ("off-lineage", garbage.dropped_objects), ("held", held)])
    total = f"{len(objects)} objects, {describe_bytes(sum(entry.size_bytes for entry in objects))}"
    say(f"moc gc: would delete {total}, {temporary_files} temporary files; nothing was changed, --apply deletes")


def _show_report(
    args: argparse.Namespace, url: str, garbage: Garbage, report: CollectReport, fence_number: int | None
) -> None:
    deleted = {entry.key for entry in report.objects}
    held = tuple(entry for entry in garbage.held if entry.key not in deleted)
    size_bytes = sum(entry.size_bytes for entry in report.objects)
    if args.json:
        print_json(
            {
                "repository": url,
                "is_applied": True,
                "off_lineage": [name_json(name) for name in report.dropped],
                "objects": [_entry_json(entry) for entry in report.objects],
                "held": [_entry_json(entry) for entry in held],
                "bytes": size_bytes,
                "temporary_files": report.temporary_files,
                "fence": fence_number,
            }
        )
        return
    _print_objects([("deleted", report.objects), ("held", held)])
    for name in report.dropped:
        say(f"moc gc: dropped the checkpoint {name}")
    fenced = "" if fence_number is None else f"; incarnation {fence_number} fences the life before it"
    total = f"{len(report.objects)} objects, {describe_bytes(size_bytes)}"
    say(f"moc gc: deleted {total}, {report.temporary_files} temporary files{fenced}")


def _print_objects(groups: Iterable[tuple[str, Sequence[Entry]]]) -> None:
    """Print one line per attempt and kind."""
    now_s = time.time()
    rows = []
    for kind, entries in groups:
        attempts: dict[tuple[int, int, str], list[Entry]] = {}
        for entry in entries:
            name = parse_object_key(entry.key)[0]
            attempts.setdefault((name.incarnation, name.step, name.attempt), []).append(entry)
        for (incarnation, step, attempt), members in sorted(attempts.items()):
            newest_s = max(entry.modified_s for entry in members)
            age = describe_age(now_s - newest_s) if newest_s else "?"
            size = describe_bytes(sum(entry.size_bytes for entry in members))
            rows.append((str(step), str(incarnation), attempt, str(len(members)), size, age, kind))
    if rows:
        titles = ("STEP", "INCARNATION", "ATTEMPT", "OBJECTS", "SIZE", "AGE", "IS")
        print_table(titles, rows, left=frozenset({"IS"}))


def _entry_json(entry: Entry) -> dict[str, object]:
    return {"key": entry.key, "size_bytes": entry.size_bytes, "modified_s": entry.modified_s or None}
