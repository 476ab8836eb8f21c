"""Check checkpoints: manifests, object headers, coverage, state, checksums.

Without STEP every checkpoint of the repository is checked, together with the
records of the job's lives; files that belong to nothing are reported as notes.
Without --read-data the tensors' bytes are not read; with --read-data=5% a part
of the shards, which --seed chooses: the same seed, the same part.

JSON: {"repository", "is_sound": bool, "read_data_fraction": float, "seed":
int, "seconds": float, "checkpoints": [{"name", "run", "incarnation", "step",
"attempt", "is_sound", "objects", "shards_read", "bytes_read", "findings":
[FINDING]}], "findings": [FINDING], "notes": [str]} with FINDING {"key", "kind":
class of the error, "message"}

Exit codes: 0 everything checked is sound, 3 no such checkpoint, 4 something is
wrong, 5 storage unavailable, 6 other format.
"""

from __future__ import annotations

import argparse
import re
import time

from moc.cli.choose import choose, read_catalogue
from moc.cli.exits import FORMAT, INTEGRITY, OK
from moc.cli.options import add_json, add_repository, opened
from moc.cli.output import describe_bytes, finding_json, name_json, print_json, printable, progress_bar, say
from moc.errors import FormatUnsupportedError
from moc.format.keys import CheckpointName
from moc.readback import WRONG
from moc.repository import Repository
from moc.verify import RepositoryReport, VerifyReport, data_bytes, verify_checkpoint, verify_repository

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", metavar="STEP", nargs="?", help="step, STEP-ATTEMPT or name (default: all)")
    parser.add_argument(
        "--read-data",
        metavar="PERCENT",
        type=parse_fraction,
        default=0.0,
        help="read the tensors too, or a part of them: --read-data=5%%",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="which part to read (default: 0)")
    add_repository(parser)
    add_json(parser)


def parse_fraction(text: str) -> float:
    """Return "5%" as 0.05."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)%?", text)
    if match is None or not 0 < float(match[1]) <= 100:
        raise argparse.ArgumentTypeError(f"not a percentage: given={text!r} allowed=more than 0% up to 100%")
    return float(match[1]) / 100


def run(args: argparse.Namespace) -> int:
    fraction: float = args.read_data
    began_s = time.monotonic()
    with opened(args) as repository:
        if args.step is None:
            names = [stored.name for stored in repository.checkpoints()]
        else:
            names = [choose(read_catalogue(repository), args.step).name]
        with progress_bar("verify", _total_bytes(repository, names, fraction)) as progress:
            if args.step is None:
                report = verify_repository(repository, read_data_fraction=fraction, seed=args.seed, progress=progress)
            else:
                single = verify_checkpoint(
                    repository, names[0], read_data_fraction=fraction, seed=args.seed, progress=progress
                )
                report = RepositoryReport(checkpoints=(single,), findings=(), notes=())
        url = repository.url
    seconds = time.monotonic() - began_s
    if args.json:
        print_json({**_to_json(url, report, fraction), "seed": args.seed, "seconds": seconds})
    else:
        _print_report(report)
        if fraction:
            say(_describe_rate(report, fraction, args.seed, seconds))
        if not report.checkpoints:
            say(f"moc verify: no checkpoints yet: repository={url}")
    return _exit_code(report)


def _exit_code(report: RepositoryReport) -> int:
    """Return FORMAT only if nothing worse was found: what another version wrote need not be damaged."""
    if not report.all_findings:
        return OK
    is_other = all(isinstance(finding.error, FormatUnsupportedError) for finding in report.all_findings)
    return FORMAT if is_other else INTEGRITY


def _describe_rate(report: RepositoryReport, fraction: float, seed: int, seconds: float) -> str:
    bytes_read = sum(checkpoint.bytes_read for checkpoint in report.checkpoints)
    rate = describe_bytes(int(bytes_read / max(seconds, 1e-9)))
    part = "" if fraction == 1 else f", {fraction * 100:g} % of the shards, seed {seed}"
    return f"moc verify: read {describe_bytes(bytes_read)} in {seconds:.1f} s, {rate}/s{part}"


def _total_bytes(repository: Repository, names: list[CheckpointName], fraction: float) -> int:
    total = 0
    for name in names if fraction else ():
        try:
            total += data_bytes(repository.read_manifest(name))
        except WRONG:
            continue  # the verification itself reports it
    return int(total * fraction)


def _print_report(report: RepositoryReport) -> None:
    for checkpoint in report.checkpoints:
        name = checkpoint.name
        verdict = "ok" if checkpoint.is_sound else f"{len(checkpoint.findings)} wrong"
        read = f"{checkpoint.shards} shards read, {describe_bytes(checkpoint.bytes_read)}"
        print(f"step {name.step} ({name.incarnation}, {name.attempt}): {verdict}; {checkpoint.objects} objects, {read}")
        for finding in checkpoint.findings:
            print(printable(f"  {finding}"))
    for finding in report.findings:
        print(printable(f"wrong: {finding}"))
    for note in report.notes:
        say(f"note: {note}")


def _to_json(url: str, report: RepositoryReport, fraction: float) -> dict[str, object]:
    def checkpoint_json(checkpoint: VerifyReport) -> dict[str, object]:
        return {
            **name_json(checkpoint.name),
            "is_sound": checkpoint.is_sound,
            "objects": checkpoint.objects,
            "shards_read": checkpoint.shards,
            "bytes_read": checkpoint.bytes_read,
            "findings": [finding_json(finding) for finding in checkpoint.findings],
        }

    return {
        "repository": url,
        "is_sound": not report.all_findings,
        "read_data_fraction": fraction,
        "checkpoints": [checkpoint_json(checkpoint) for checkpoint in report.checkpoints],
        "findings": [finding_json(finding) for finding in report.findings],
        "notes": list(report.notes),
    }
