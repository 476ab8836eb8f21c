"""Say what looks wrong with a job, and collect what it takes to judge it from
afar into one file.

Looks at this machine, at every agent and its trainers (their stacks too, also
while they hang), and at the repository: -r, else $MOC_STORAGE, else where the
only live job stores. Credentials, weights and training data stay out.

JSON: {"bundle": path, "epoch_s", "symptoms": [{"severity": "problem",
"warning" or "note", "text", "hint"}], "versions": {...}, "agents": [{"run",
"folder", "pid", "is_answering", "silence", "incarnation", "global_step",
"last_committed_step", "last_error", "ranks", "stacks"}], "repository":
{"url", "exists", "checkpoints", "newest"}, "troubles": {part: why it is not
whole}}

Exit codes: 0 nothing looks wrong, 1 something does, 2 the bundle exists
already, 5 the bundle cannot be written.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from moc.cli.exits import FAILURE, OK
from moc.cli.live import add_runtime_root
from moc.cli.options import STORAGE_VARIABLE, add_json, add_repository
from moc.cli.output import print_json, printable, say
from moc.doctor.judge import NOTE

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: moc-doctor-TIME.tar.gz here")
    parser.add_argument("--run-id", metavar="ID", help="only the job with this run id")
    parser.add_argument("--timeout", metavar="S", type=float, default=15.0, help="for each part (15)")
    add_runtime_root(parser)
    add_repository(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moc.clock import SystemClock
    from moc.doctor.bundle import Bundle
    from moc.doctor.collect import collect
    from moc.doctor.judge import judge
    from moc.doctor.report import secrets_to_hide, summarize, write_bundle
    from moc.store.redact import scrub, scrub_value

    storage = args.repo if args.repo is not None else os.environ.get(STORAGE_VARIABLE)
    facts = collect(
        storage=storage, run_id=args.run_id, root=args.runtime_root, clock=SystemClock(), timeout_s=args.timeout
    )
    symptoms = judge(facts)
    folder = f"moc-doctor-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(facts.epoch_s))}"
    path = (args.output or Path(f"{folder}.tar.gz")).absolute()
    secrets = secrets_to_hide(facts)
    with Bundle(path, folder=folder, secrets=secrets, epoch_s=facts.epoch_s) as bundle:
        write_bundle(bundle, facts, symptoms)
    if args.json:
        print_json(scrub_value({"bundle": str(path), **summarize(facts, symptoms)}, secrets))
    else:
        for symptom in symptoms:
            print(printable(scrub(f"{symptom.severity}: {symptom.text} (hint: {symptom.hint})", secrets)))
        print(f"bundle: {printable(str(path))}")
        say("moc doctor: look into the bundle before you send it to somebody")
    return FAILURE if any(symptom.severity != NOTE for symptom in symptoms) else OK
