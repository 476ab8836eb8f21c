"""One rank that runs a script as its launcher would, in a process that has imported what the script imports."""

from __future__ import annotations

import runpy
import sys
from typing import Any


def main(spec: dict[str, Any]) -> None:
    sys.argv = [spec["script"], *spec["arguments"]]
    runpy.run_path(spec["script"], run_name="__main__")
