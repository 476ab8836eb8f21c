"""A scheme of `moc simulate` that was measured instead of planned, and faults that were scheduled instead of drawn.

What a run has shown (`benchmarks/calibration.py` measures it) predicts another one: other intervals, other faults. The
options of a scheme come together or not at all.
"""

from __future__ import annotations

import argparse
import re

import numpy as np

from moc.errors import UsageError
from moc.plan.forecast import Faults, Scheme

__all__ = ["add_measured", "measured_scheme", "scheduled_faults"]

SECONDS = {
    "save_s": "what a snapshot adds to its step",
    "persist_s": "what a persist adds to the steps meanwhile",
    "copy_s": "step's end to the sealed snapshot",
    "write_s": "sealed snapshot to commit",
    "load_memory_s": "recovery from memory, on top of --restart-s",
    "load_storage_s": "the same from storage",
}
INTERVALS = {"snapshot_every": "steps between snapshots", "persist_every": "steps between persists"}
SECONDS_LIMIT = 1e7
STEPS_LIMIT = 10**9
FAULTS_LIMIT = 10_000
FAULT = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([pn])", re.ASCII)


def add_measured(parser: argparse.ArgumentParser) -> None:
    """Add the options of the scheme `measured` and of scheduled faults."""
    group = parser.add_argument_group("a scheme that was measured, all of these or none")
    for name, text in INTERVALS.items():
        group.add_argument(_option(name), type=int, metavar="N", help=text)
    for name, text in SECONDS.items():
        group.add_argument(_option(name), type=float, metavar="S", help=text)
    parser.add_argument(
        "--faults",
        metavar="LIST",
        help="instead of chance: 40p,90.5n = processes die 40 s after training began, a node's memory after 90.5 s",
    )


def measured_scheme(args: argparse.Namespace) -> Scheme | None:
    """Return the scheme that the options describe, None without them; raises UsageError."""
    names = [*INTERVALS, *SECONDS]
    missing = [_option(name) for name in names if getattr(args, name) is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise UsageError(f"options of a measured scheme are missing: {' '.join(missing)}")
    for name in names:
        least, most = (1, STEPS_LIMIT) if name in INTERVALS else (0, SECONDS_LIMIT)
        if not least <= getattr(args, name) <= most:
            raise UsageError(f"option is out of range: {name}={getattr(args, name)} allowed={least}..{most:g}")
    return Scheme(
        name="measured",
        has_replica=bool(args.replicas),
        stale_steps=(0.0, 0.0),
        commit_bytes=0,
        **{name: getattr(args, name) for name in names},
    )


def scheduled_faults(text: str, *, horizon_s: float) -> Faults:
    """Return the one trial that the list describes; raises UsageError unless times ascend."""
    words = text.split(",")
    matches = [FAULT.fullmatch(word.strip()) for word in words]
    found = [match for match in matches if match is not None]
    times_s = [float(match[1]) for match in found]
    is_ascending = all(first < second for first, second in zip([0.0, *times_s], times_s, strict=False))
    if len(found) != len(words) or len(words) > FAULTS_LIMIT or not is_ascending:
        raise UsageError(
            f"list of faults is wrong: faults={text[:80]} "
            f"allowed=up to {FAULTS_LIMIT} ascending seconds > 0, each followed by p (processes) or n (node)"
        )
    last_s = max(horizon_s, times_s[-1]) + 1.0  # a life that no fault ends
    return Faults(
        between_s=np.diff([0.0, *times_s, last_s])[None, :],
        takes_node=np.array([[match[2] == "n" for match in found] + [False]]),
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
