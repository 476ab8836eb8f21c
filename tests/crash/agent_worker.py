"""The production agent in the foreground, with a sink that kills it at a chosen span."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moc.agent.server import Agent
from moc.host import SystemHost
from moc.trace import Trace
from tests.support.kill import KillAt


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--kill", default=None, help="span:event:count")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    trace = Trace(*([] if options.kill is None else [KillAt.parse(options.kill)]))
    agent = Agent(options.folder, run=options.run, idle_s=options.idle_s, host=SystemHost(), trace=trace)
    if not agent.listen():
        raise SystemExit(f"another agent has the lock: folder={options.folder}")
    agent.serve()


if __name__ == "__main__":
    main()
