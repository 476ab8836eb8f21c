"""The agent's process: `python -m moc.agent`. Started by the first trainer of a node, or by `moc agent start`."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from moc.agent.door import CONNECTION_LIMIT
from moc.agent.log import log_to_file, log_to_stderr
from moc.agent.runtime import LOG_NAME
from moc.agent.server import Agent
from moc.agent.stacks import StackDump
from moc.errors import UsageError
from moc.host import SystemHost
from moc.trace import Trace, open_trace, trace_name

AGENT_NICE = 10  # training goes first on the cores they share


def main() -> int:
    parser = argparse.ArgumentParser(prog="moc.agent", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--idle-s", type=float, required=True)
    parser.add_argument("--ready-fd", type=int, default=None, help="a pipe that is closed once the agent listens")
    parser.add_argument("--foreground", action="store_true", help="stay in this process, for a sidecar container")
    parser.add_argument("--trace", metavar="DIR", type=Path, default=None, help="write spans to a file in this folder")
    options = parser.parse_args()
    if not options.foreground and os.fork():
        os._exit(0)  # the parent: the agent is now nobody's child and survives a kill of the trainer's process tree
    log_to_stderr() if options.foreground else log_to_file(options.folder / LOG_NAME)
    _raise_descriptor_limit()
    os.nice(AGENT_NICE)
    agent = Agent(
        options.folder, run=options.run, idle_s=options.idle_s, host=SystemHost(), trace=_trace(options.trace)
    )
    signal.signal(signal.SIGTERM, agent.ask_to_leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole foreground group; the trainers decide
    if not agent.listen():
        return 0  # another agent has the lock
    stacks = StackDump(options.folder, "agent")
    if options.ready_fd is not None:
        os.close(options.ready_fd)
    agent.serve()
    stacks.close()
    return 0


def _trace(folder: Path | None) -> Trace:
    try:
        return open_trace(folder, trace_name("agent"))
    except UsageError as error:
        logging.getLogger(__name__).warning("%s", error)
        return Trace()


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as connections may need: the usual soft limit is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * CONNECTION_LIMIT
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


if __name__ == "__main__":
    sys.exit(main())
