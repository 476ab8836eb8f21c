"""Compare the surviving lineages of two runs: losses bit for bit, and samples one by one.

    python -m moc_train.compare RUN_A RUN_B

RUN_A and RUN_B are log folders. Prints one line on stdout, and one per difference on stderr; exits with 1 when there
is any, with 2 when a folder cannot be compared.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc_train.data.order import digest_ids
from moc_train.runlog import rank_paths, read_records, surviving_steps

__all__ = ["Comparison", "Lineage", "compare", "main", "read_lineage"]

SHOWN_DIFFERENCES = 5
Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a run's logs say about the steps that survived; keys are steps in ascending order."""

    folder: Path
    losses: dict[int, str]  # float.hex()
    samples: dict[int, tuple[int, str]]  # position of the first sample, digest of the step's sample ids
    ids: dict[int, tuple[int, ...]]  # sample ids of the step, as the ranks consumed them, in the global order
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    steps: int
    equal_steps: int
    differences: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        return self.steps > 0 and not self.differences

    def __str__(self) -> str:
        verdict = "equal" if self.is_equal else "different"
        samples = "samples once each and in the same order" if self.is_equal else "see the differences"
        return f"losses {verdict}: {self.equal_steps} of {self.steps} steps bit-equal, {samples}"


def main(words: list[str] | None = None) -> int:
    """Run the comparison that these command-line words ask for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moc_train.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="log folder")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="log folder")
    options = parser.parse_args(words)
    try:
        comparison = compare(read_lineage(options.run_a), read_lineage(options.run_b))
    except (OSError, ValueError) as e:
        print(f"compare: {e}", file=sys.stderr)
        return 2
    for difference in comparison.differences[:SHOWN_DIFFERENCES]:
        print(difference, file=sys.stderr)
    if len(comparison.differences) > SHOWN_DIFFERENCES:
        print(f"and {len(comparison.differences) - SHOWN_DIFFERENCES} more", file=sys.stderr)
    print(comparison)
    return 0 if comparison.is_equal else 1


def read_lineage(folder: Path) -> Lineage:
    """Return the surviving lineage of the run that logged to `folder`; raise ValueError when there are no logs."""
    paths = rank_paths(folder)
    if not paths:
        raise ValueError(f"no rank*.jsonl in the log folder folder={folder}")
    ranks = [surviving_steps(read_records(path)) for path in paths]
    first = ranks[0]
    problems: list[str] = []
    for number, steps in enumerate(ranks[1:], 1):
        for step in sorted(first.keys() & steps.keys()):
            own, other = first[step], steps[step]
            # A rank that an incarnation runs without may have a line of an older one, which does not count.
            if own["incarnation"] == other["incarnation"] and own["loss_hex"] != other["loss_hex"]:
                problems += [f"{folder}: step {step}: ranks 0 and {number} logged different losses"]
    ids = {step: _step_ids(step, ranks) for step in first}
    problems += _check_stream(folder, first) + _check_ids(folder, first, ids)
    return Lineage(
        folder=folder,
        losses={step: record["loss_hex"] for step, record in first.items()},
        samples={step: (record["samples"]["first"], record["samples"]["digest"]) for step, record in first.items()},
        ids=ids,
        problems=tuple(problems),
    )


def compare(a: Lineage, b: Lineage) -> Comparison:
    """Return how two lineages differ: nothing, if every step has the same loss bits and the same samples."""
    differences = [*a.problems, *b.problems]
    steps = sorted(a.losses.keys() | b.losses.keys())
    equal = 0
    for step in steps:
        if step not in a.losses or step not in b.losses:
            missing = a if step not in a.losses else b
            differences.append(f"step {step}: not in {missing.folder}")
            continue
        if a.losses[step] != b.losses[step]:
            differences.append(
                f"step {step}: loss {float.fromhex(a.losses[step])!r} in {a.folder},"
                f" {float.fromhex(b.losses[step])!r} in {b.folder}"
            )
        else:
            equal += 1
        if a.samples[step] != b.samples[step] or a.ids[step] != b.ids[step]:
            differences.append(f"step {step}: different samples")
    return Comparison(steps=len(steps), equal_steps=equal, differences=tuple(differences))


def _check_stream(folder: Path, steps: dict[int, Record]) -> list[str]:
    """Return where the steps do not follow each other, or leave out or repeat positions of the sample stream."""
    problems: list[str] = []
    expected_step, expected_first = 1, 0
    for step, record in steps.items():
        samples = record["samples"]
        if step != expected_step:
            problems.append(f"{folder}: steps {expected_step}..{step - 1} have no line")
        elif samples["first"] != expected_first:
            problems.append(f"{folder}: step {step}: samples from {samples['first']}, expected {expected_first}")
        expected_step, expected_first = step + 1, samples["first"] + samples["count"]
    return problems


def _check_ids(folder: Path, steps: dict[int, Record], ids: dict[int, tuple[int, ...]]) -> list[str]:
    """Return where the ranks' samples are not those of the step, or where one came too often for the epochs begun."""
    problems: list[str] = []
    uses: Counter[int] = Counter()
    for step, record in steps.items():
        if digest_ids(ids[step]) != record["samples"]["digest"]:
            problems.append(f"{folder}: step {step}: the ranks did not consume the samples of the step once each")
        uses.update(ids[step])
    if not steps:
        return problems
    last = steps[max(steps)]["samples"]
    epochs_begun = -(-(last["first"] + last["count"]) // last["epoch_size"])
    repeated = sorted(index for index, count in uses.items() if count > epochs_begun)
    if repeated:
        problems.append(f"{folder}: samples used more often than once per epoch: {repeated[:SHOWN_DIFFERENCES]}")
    return problems


def _step_ids(step: int, ranks: list[dict[int, Record]]) -> tuple[int, ...]:
    """Return the sample ids of a step: micro-batch after micro-batch, rank after rank."""
    lines = [steps[step] for steps in ranks if step in steps]
    newest = max(line["incarnation"] for line in lines)
    # A rank that this incarnation runs without may have a line of an older one.
    by_rank = [line["samples"]["rank_ids"] for line in lines if line["incarnation"] == newest]
    return tuple(index for micro_batches in zip(*by_rank, strict=True) for own in micro_batches for index in own)


if __name__ == "__main__":
    sys.exit(main())
