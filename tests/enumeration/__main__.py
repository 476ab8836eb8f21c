"""Enumerate crash points and print how many cases there were: `python -m tests.enumeration [--all] [--keep-going]`.

Exit codes: 0 every case kept every promise, 1 at least one did not.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.enumeration.catalogue import run_all
from tests.enumeration.tally import CaseError, Tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.enumeration", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every error at every operation")
    parser.add_argument("--keep-going", action="store_true", help="name every failing case, not only the first")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # saves fail here by the thousand
    tally = Tally(keep_going=arguments.keep_going)
    began_s = time.perf_counter()
    try:
        run_all(tally, is_whole=arguments.all)
    except CaseError as error:
        print(error)
        return 1
    print(tally.table())
    print(f"{tally.total} cases, {tally.judged} different outcomes, {time.perf_counter() - began_s:.0f} s")
    for failure in tally.failures:
        print(failure)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
