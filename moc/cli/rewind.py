"""Let the next launch of the job resume from an earlier step.

A record of a new life is written, which grows from that checkpoint; nothing is
deleted, and what came after it is off-chain from now on. A bare step must be
on the lineage; STEP-ATTEMPT may name an off-chain checkpoint, which is how a
rewind is undone. A job that runs on this machine must stop first: its saves
would be refused from now on. Jobs on other machines are not seen.

JSON: {"repository", "name", "run", "incarnation", "step", "attempt" of the
checkpoint, "new_incarnation": int, "is_written": bool, false when the last
life already was this rewind}

Exit codes: 0 rewound, 1 a live job answers, 3 no such checkpoint, 4 the
checkpoint is not sound, 5 storage unavailable, 6 other format.
"""

from __future__ import annotations

import argparse
import secrets

from moc.cli.choose import choose_on_lineage, read_catalogue
from moc.cli.exits import OK
from moc.cli.live import add_runtime_root, living_ranks
from moc.cli.options import add_json, add_repository, opened
from moc.cli.output import name_json, print_json, say
from moc.errors import CoordinationError
from moc.format.manifest import Incarnation, Manifest, Parent
from moc.repository import Repository
from moc.trace import Trace
from moc.verify import check_structure

__all__ = ["configure", "run", "write_rewind"]

REASON = "rewind"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", metavar="STEP", required=True, help="step, STEP-ATTEMPT or name")
    parser.add_argument("--force", action="store_true", help="even though a live job answers")
    add_runtime_root(parser)
    add_repository(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with opened(args) as repository:
        stored = choose_on_lineage(read_catalogue(repository), args.step)
        manifest = repository.read_manifest(stored.name)
        _, findings = check_structure(repository, manifest)
        if findings:
            raise findings[0].error
        _refuse_if_live(args, manifest.name.run)
        record, is_written = write_rewind(repository, manifest)
        url = repository.url
    if args.json:
        print_json(
            {
                "repository": url,
                **name_json(manifest.name),
                "new_incarnation": record.number,
                "is_written": is_written,
            }
        )
        return OK
    verb = "rewound" if is_written else "already rewound"
    print(f"{verb} to step {manifest.name.step}: incarnation {record.number} grows from {manifest.name}")
    say("moc rewind: the next launch resumes from there")
    return OK


def write_rewind(
    repository: Repository, manifest: Manifest, *, token: str | None = None, trace: Trace | None = None
) -> tuple[Incarnation, bool]:
    """Write the record unless the newest life is this very rewind; returns the record and whether it was written."""
    name = manifest.name
    parent = Parent(incarnation=name.incarnation, step=name.step, attempt=name.attempt)
    numbers = repository.incarnation_numbers()
    newest = max((number for _, number in numbers), default=0)
    for record in repository.incarnations()[0]:
        if record.number == newest and record.reason == REASON and record.parent == parent:
            repository.sync_names()  # the process that wrote it may have died before that was durable
            return record, False
    listed = max((stored.name.incarnation for stored in repository.checkpoints()), default=0)
    record = Incarnation(
        run=name.run,
        number=max(newest, listed) + 1,  # above checkpoints too, in case a life's record was lost
        token=token or secrets.token_hex(4),
        parent=parent,
        reason=REASON,
        fingerprint=manifest.fingerprint,
    )
    with (trace or Trace()).span("rewind.record", incarnation=record.number):
        repository.put_incarnation(record)
    repository.read_manifest(name)  # a collection may have dropped it since it was checked: then say so
    return record, True


def _refuse_if_live(args: argparse.Namespace, run_id: str) -> None:
    ranks = living_ranks(run_id, args.runtime_root)
    if not ranks:
        return
    text = f"a live job uses this repository: run={run_id} ranks={','.join(map(str, ranks))}"
    if not args.force:
        raise CoordinationError(f"{text} allowed=stop it first, or --force")
    say(f"moc rewind: {text}; going on because of --force")
