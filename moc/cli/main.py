"""The command `moc`: finds the verb, imports only its module, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from moc.cli.exits import EXIT_HELP, FAILURE, INTERRUPTED, OK, USAGE, exit_code, hint

__all__ = ["main"]

VERBS = {
    "ls": "list the checkpoints of a repository",
    "show": "show what one checkpoint holds",
    "diff": "compare two checkpoints",
    "verify": "check checkpoints against their checksums",
    "restore": "copy one checkpoint out, as files that stand alone",
    "rewind": "let the next launch resume from an earlier step",
    "gc": "delete what nothing references (without --apply: list it)",
    "trace": "merge the traces of ranks and agents into one timeline",
    "status": "show the live jobs of this machine",
    "doctor": "collect what is needed to judge a job from afar, and say what looks wrong",
    "agent": "start, stop or look at the node agent",
    "run": "run a training command and restart it when it fails",
    "plan": "plan partial-expert checkpoints: bytes, stalls, lost tokens",
    "simulate": "simulate failures at any scale: goodput and lost work",
}
OPTIONAL_VALUES = {"verify": {"--read-data": "--read-data=100%"}}
"""Options whose value must follow a "=": argparse would take the next argument, which is the step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; writes to stdout and stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        code = _run(verb, arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _drop_output()
        print("moc: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # whoever read it has seen enough
        return OK
    except MemoryError:
        print(f"moc {verb}: not enough memory for what is stored there", file=sys.stderr)
        return FAILURE
    return code


def _drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes it at exit and must not fail or wait there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(verb: str | None, arguments: list[str]) -> int:
    from moc.errors import MocError

    parser, subparsers = _parser()
    if verb in VERBS:
        module = importlib.import_module(f"moc.cli.{verb}")
        chosen = subparsers.add_parser(
            verb,
            help=VERBS[verb],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(chosen)
        arguments = _with_values(verb, arguments)
    for name, summary in VERBS.items():
        if name != verb:
            subparsers.add_parser(name, help=summary, add_help=False)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:  # said by the verb's own parser, so that its usage is shown
        (chosen if verb in VERBS else parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(module.run(args))
    except MocError as error:
        from moc.cli.output import print_json, printable

        code = exit_code(error)
        if getattr(args, "json", False):
            print_json({"error": {"kind": type(error).__name__, "message": str(error), "exit_code": code}})
        advice = hint(error)
        line = f"moc {verb}: {error}" + (f" (hint: {advice})" if advice else "")
        print(printable(line.replace("\n", " ")), file=sys.stderr)
        return code


def _parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="moc",
        description="Checkpoints of mixture-of-experts training: look at them, check them, use them.",
        epilog=EXIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    return parser, parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")


def _version() -> str:
    from moc import __version__

    return f"moc {__version__}"


def _with_values(verb: str, arguments: list[str]) -> list[str]:
    values = OPTIONAL_VALUES.get(verb, {})
    return [values.get(argument, argument) for argument in arguments]


assert USAGE == 2, "argparse exits with 2 for a wrong command line"
