"""`python -m tests.sim --seeds 0..999` runs many seeds, `--seed 123 --trace` replays one with its log."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.simulation import Report, simulate

PROGRESS_EVERY = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", default=None, metavar="A..B", help="run these seeds, both ends included")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", action="store_true", help="stop at the first seed that fails")
    parser.add_argument("--partial", action="store_true", help="checkpoints of some experts only")
    parser.add_argument("--nodes", action="store_true", help="two or three nodes, with and without replicas")
    parser.add_argument("--trace", action="store_true", help="print the whole log of the seed")
    options = parser.parse_args()
    if options.seed is not None:
        report = simulate(options.seed, is_partial=options.partial, has_nodes=options.nodes, keep_log=options.trace)
        print("\n".join(report.log))
        print(_line(report))
        return 1 if report.violations else 0
    first, _, last = (options.seeds or "0..99").partition("..")
    seeds = range(int(first), int(last or first) + 1)
    return run_many(seeds, is_partial=options.partial, has_nodes=options.nodes, is_first_enough=options.first)


def run_many(seeds: range, *, is_partial: bool, has_nodes: bool, is_first_enough: bool) -> int:
    """Run the seeds; print the failing ones as they come, and what happened in all."""
    began_s, counts, failed = time.monotonic(), Counter[str](), 0
    for done, seed in enumerate(seeds, start=1):
        report = simulate(seed, is_partial=is_partial, has_nodes=has_nodes)
        counts.update(report.counts)
        if report.violations:
            failed += 1
            print(_line(report), flush=True)
            if is_first_enough:
                return 1
        if done % PROGRESS_EVERY == 0:
            print(f"{done} seeds, {failed} failed, {time.monotonic() - began_s:.1f} s", file=sys.stderr, flush=True)
    print(f"{len(seeds)} seeds, {failed} failed, {time.monotonic() - began_s:.1f} s, {dict(counts)}")
    return 1 if failed else 0


def _line(report: Report) -> str:
    return f"seed={report.seed} digest={report.digest[:16]} turns={report.turns} virtual_s={report.virtual_s:.0f} " + (
        "; ".join(report.violations) or f"ok {dict(report.counts)}"
    )


if __name__ == "__main__":
    sys.exit(main())
