"""Run a training command, and restart it when it fails.

  moc run -- deepspeed train.py

The command gets a session of its own, MOC_STORAGE if -r is given, and MOC_TRACE
with --trace, which are for its attach(storage=..., trace_dir=...). SIGTERM,
SIGINT and SIGHUP are passed on to all its processes, which then have
--grace seconds for a last durable save; SIGUSR1 and SIGUSR2 are passed on
without meaning anything to moc. A command that fails is started again,
after a growing delay, until --max-restarts is used up, or until three lives in
a row have not got any further than the one before.

At the end the node agent stays, with the snapshots, for the next launch. Where
it would die with this command (the first process of a container, a Slurm step)
it is drained instead: it persists the newest snapshot and leaves. That is done
by itself for process number 1, elsewhere with --drain.

Exit codes: the command's own (128 + N when signal N killed it, 124 when it
hung), 126 or 127 when it cannot be started, 2 wrong command line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.cli.live import ANSWER_TIMEOUT_S, add_runtime_root, adopted_agents, serving_agents
from moc.cli.options import STORAGE_VARIABLE, TRACE_VARIABLE, add_repository, opened, repository_url
from moc.cli.output import say
from moc.clock import SystemClock
from moc.errors import MocError, NoCheckpointError, UsageError
from moc.plan.lineage import is_on_chain
from moc.supervise import Limits, supervise
from moc.trace import open_trace, trace_name

__all__ = ["configure", "run"]

DRAIN_S = 120.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "moc run [options] -- COMMAND [ARGUMENT ...]"
    parser.add_argument("--max-restarts", metavar="N", type=int, default=10, help="default: 10; 0: never restart")
    parser.add_argument("--hang-timeout", metavar="S", type=float, help="restart when a rank is silent for S seconds")
    parser.add_argument(
        "--grace", metavar="S", type=float, default=120.0, help="time to save when ended (default: 120)"
    )
    parser.add_argument("--delay", metavar="S", type=float, default=1.0, help="before the first restart (default: 1)")
    parser.add_argument(
        "--drain",
        metavar="S",
        type=float,
        help=f"drain the agent at the end, within S seconds; 0: leave it (default: {DRAIN_S:.0f} as PID 1, else 0)",
    )
    parser.add_argument("--trace", metavar="DIR", type=Path, help="trace supervisor, ranks and agent into this folder")
    add_runtime_root(parser)
    add_repository(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("no command given allowed=moc run [options] -- COMMAND [ARGUMENT ...]")
    limits = Limits(
        max_restarts=args.max_restarts, grace_s=args.grace, hang_timeout_s=args.hang_timeout, delay_s=args.delay
    )
    env = dict(os.environ)
    if args.repo is not None:
        env[STORAGE_VARIABLE] = args.repo
    trace_dir = None if args.trace is None else args.trace.absolute()
    if trace_dir is not None:
        env[TRACE_VARIABLE] = str(trace_dir)
    code = supervise(
        command,
        limits=limits,
        newest_step=lambda: newest_step(args),
        last_beat_s=lambda: last_beat_s(args),
        say=lambda text: say(f"moc run: {text}"),
        env=env,
        trace=open_trace(trace_dir, trace_name("run")),
    )
    drain_s = args.drain if args.drain is not None else DRAIN_S if os.getpid() == 1 else 0.0
    if drain_s > 0:
        _drain_agents(args.runtime_root, drain_s)
    return code


def newest_step(args: argparse.Namespace) -> int | None:
    """Return the newest step that a restart could resume from: committed on the lineage, or in an agent's memory."""
    steps: list[int] = []
    try:
        with opened(args) as repository:
            links = repository.lineage()
            names = [stored.name for stored in repository.checkpoints()]
            steps += [name.step for name in names if is_on_chain(links, name.incarnation, name.step, name.attempt)]
    except NoCheckpointError:
        pass  # the command will create it
    except MocError as error:
        say(f"moc run: cannot look at the repository: {error}")
    steps += [int(status["global_step"]) for _, status in _statuses(args) if status.get("global_step") is not None]
    return max(steps, default=None)


def last_beat_s(args: argparse.Namespace) -> float | None:
    """Return how long the most silent living rank has given no sign of life."""
    ages = [
        float(row["beat_age_s"])
        for _, status in _statuses(args)
        for row in status["ranks"]
        if row.get("alive") and row.get("beat_age_s") is not None
    ]
    return max(ages, default=None)


def _statuses(args: argparse.Namespace) -> list[tuple[Path, dict[str, Any]]]:
    return serving_agents(repository_url(args), args.runtime_root)


def _drain_agents(root: Path | None, drain_s: float) -> None:
    """Let the agents that end with this process persist what is only in memory; what fails is said, not raised."""
    clock = SystemClock()
    end_s = clock.now_s() + drain_s
    for folder in adopted_agents(root):
        say(f"moc run: draining the agent, for at most {drain_s:.0f} s: folder={folder}")
        try:
            with contextlib.closing(AgentClient.connect(folder, timeout_s=ANSWER_TIMEOUT_S)) as agent:
                reply = agent.drain(timeout_s=max(end_s - clock.now_s(), 1.0))
        except MocError as error:
            say(f"moc run: the agent was not drained, what is only in memory is lost: {error}")
            continue
        if reply.get("last_error"):
            say(f"moc run: the newest snapshot was not saved: {reply['last_error']}")
        else:
            say(f"moc run: drained: last_committed_step={reply.get('last_committed_step')}")
