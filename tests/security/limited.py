"""Runs command lines of `moc` one after the other in a process with little memory; prints what each cost as JSON.

Started by the tests with the limit in bytes; reads one JSON list of arguments per line.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moc.cli.main import main


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(arguments: list[str]) -> dict[str, object]:
    """Run one command line; say how it ended, what it printed, how long it took and how much memory it had at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, began_s = peak_bytes(), time.monotonic()
    printed, said = io.StringIO(), io.StringIO()
    code: object
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = leaving.code
        except Exception as error:  # noqa: BLE001 - the caller judges
            code = f"{type(error).__name__}: {str(error)[:300]}"
    return {
        "code": code,
        "stdout": printed.getvalue()[-20_000:],
        "stderr": said.getvalue()[-20_000:],
        "seconds": time.monotonic() - began_s,
        "grown_bytes": peak_bytes() - before,
    }


if __name__ == "__main__":
    limit_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)
