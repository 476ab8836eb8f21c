"""Start, stop or look at the node agent, which holds the snapshots in memory.

Training starts an agent by itself; 'start' is for an agent that must outlive
the launcher's container. 'stop' drains: the newest snapshot that every rank
has sealed is persisted, then the agent ends. 'status' is 'moc status'.

JSON: for status that of 'moc status'; else {"run", "folder", "action":
"started" or "stopped", "reply": what the agent answered, {} if nothing}

Exit codes: 0 ok, 1 no agent answers or its last save failed, 2 wrong command
line, 5 the agent is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from moc.cli.exits import FAILURE, OK
from moc.cli.live import ANSWER_TIMEOUT_S, add_runtime_root
from moc.cli.options import add_json
from moc.cli.output import print_json, say
from moc.errors import CoordinationError, UsageError

__all__ = ["configure", "run"]

ACTIONS = ("start", "stop", "status")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "moc agent [options] {start,stop,status}"
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help="start, stop or status")
    parser.add_argument("--run-id", metavar="ID", help="the job's run id (start: required; else default: the only one)")
    parser.add_argument(
        "--idle", metavar="S", type=float, default=3600.0, help="start: end after S idle seconds (3600)"
    )
    parser.add_argument("--foreground", action="store_true", help="start: become the agent, for a sidecar container")
    parser.add_argument("--timeout", metavar="S", type=float, default=600.0, help="stop: wait at most S seconds (600)")
    parser.add_argument("--trace", metavar="DIR", type=Path, help="start: write the agent's spans to a file there")
    add_runtime_root(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    match args.action:
        case "start":
            return _start(args)
        case "stop":
            return _stop(args)
        case _:
            from moc.cli.status import show_agents

            return show_agents(args)


def _start(args: argparse.Namespace) -> int:
    from moc.agent.client import ensure_agent
    from moc.agent.runtime import runtime_folder
    from moc.host import SystemHost

    if args.run_id is None:
        raise UsageError("no run id given allowed=moc agent start --run-id ID")
    folder = runtime_folder(args.run_id, args.runtime_root)
    trace_dir = None if args.trace is None else args.trace.absolute()
    if args.foreground:
        command = [sys.executable, "-m", "moc.agent", "--foreground", "--folder", str(folder), "--run", args.run_id]
        tracing = [] if trace_dir is None else ["--trace", str(trace_dir)]
        os.execv(sys.executable, [*command, "--idle-s", str(args.idle), *tracing])
    host = SystemHost(trace_dir=trace_dir)
    client = ensure_agent(folder, run=args.run_id, idle_s=args.idle, timeout_s=ANSWER_TIMEOUT_S, host=host)
    client.close()
    _report(args, args.run_id, folder, "started", {})
    return OK


def _stop(args: argparse.Namespace) -> int:
    from moc.agent.client import AgentClient

    run_id, folder = _only_agent(args)
    with contextlib.closing(AgentClient.connect(folder, timeout_s=ANSWER_TIMEOUT_S)) as client:
        reply = dict(client.drain(timeout_s=args.timeout))
    _report(args, run_id, folder, "stopped", reply)
    if reply.get("last_error"):
        say(f"moc agent: the newest snapshot was not saved: {reply['last_error']}")
        return FAILURE
    return OK


def _only_agent(args: argparse.Namespace) -> tuple[str, Path]:
    from moc.agent.runtime import live_agents

    agents = [(run_id, folder) for run_id, folder in live_agents(args.runtime_root) if args.run_id in (None, run_id)]
    if not agents:
        raise CoordinationError("no agent answers on this machine" + (f" run={args.run_id}" if args.run_id else ""))
    if len(agents) > 1:
        runs = ",".join(run_id for run_id, _ in agents)
        raise UsageError(f"more than one agent answers: runs={runs} allowed=--run-id with one of them")
    return agents[0]


def _report(args: argparse.Namespace, run_id: str, folder: Path, action: str, reply: dict[str, object]) -> None:
    if args.json:
        print_json({"run": run_id, "folder": str(folder), "action": action, "reply": reply})
    else:
        print(f"agent of run {run_id} {action}: {folder}")
