"""Show the live jobs of this machine, as their node agents see them.

JSON: {"agents": [{"folder": path, "run", "pid", "version", "incarnation",
"storage", "ranks": [{"rank", "pid", "alive", "incarnation", "version",
"sealed_step", "beat_step", "beat_age_s"}], "global_step",
"last_committed_step", "persisting", "arena_bytes", "versions",
"routing": {"step", "plt", "plt_limit", "basis", "routed": [by MoE layer],
"lost": [by MoE layer]}, "counters": {"saves", "failed"}, "last_error",
"advice": {"experts", "present": {"k_snapshot", "k_persist", "snapshot_every",
"persist_every"}, "advised": the same, "present_cost_s", "advised_cost_s",
"present_stall_s", "advised_stall_s", "plt", "full_copy_s", "pass_s",
"storage_rate", "faults", "steps"}}]}; null stands for what is not known yet.
The counters begin with the agent. With several nodes there is "company":
{"node", "urls", "silent"}, and where snapshots have replicas in it
"replication": {"replicas", "away", "replicated_step", "sent_bytes",
"failures", "guest_bytes", "last_error"}.

--prometheus prints the same as metrics moc_*, for a textfile collector; it
needs the extra 'metrics'. Without an agent moc_agents is 0.

Exit codes: 0 an agent answers, 1 none does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moc.cli.exits import FAILURE, OK
from moc.cli.live import add_runtime_root, read_statuses
from moc.cli.options import add_json
from moc.cli.output import describe_bytes, print_facts, print_json
from moc.errors import CoordinationError, UsageError
from moc.plan.tuning import describe_tuning

__all__ = ["configure", "run", "show_agents"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-id", metavar="ID", help="only the job with this run id")
    parser.add_argument("--prometheus", action="store_true", help="print metrics in Prometheus' text format")
    add_runtime_root(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if not args.prometheus:
        return show_agents(args)
    if args.json:
        raise UsageError("two formats asked for: given=--json,--prometheus allowed=one of them")
    from moc.cli.metrics import render_metrics

    found = read_statuses(args.run_id, args.runtime_root)
    print(render_metrics(found), end="")
    return OK if found else FAILURE


def show_agents(args: argparse.Namespace) -> int:
    """Print every agent that answers; raises CoordinationError when there is none."""
    found = read_statuses(args.run_id, args.runtime_root)
    if not found:
        which = "" if args.run_id is None else f" run={args.run_id}"
        raise CoordinationError(f"no agent answers on this machine{which}")
    if args.json:
        print_json({"agents": [{"folder": str(folder), **status} for folder, status in found]})
        return OK
    for index, (folder, status) in enumerate(found):
        if index:
            print()
        print_facts(_facts(folder, status))
    return OK


def _facts(folder: Path, status: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("run", str(status["run"])),
        ("agent", f"pid {status['pid']}, version {status.get('version', '?')}, {folder}"),
        ("incarnation", _known(status.get("incarnation"))),
        ("storage", _known(status.get("storage"))),
        ("in memory", _step(status.get("global_step"))),
        ("committed", _step(status.get("last_committed_step")) + (", saving" if status.get("persisting") else "")),
        ("memory", f"{describe_bytes(status.get('arena_bytes') or 0)}, {_known(status.get('versions'))} versions"),
        ("counters", ", ".join(f"{name} {count}" for name, count in sorted(status.get("counters", {}).items()))),
    ]
    if status.get("routing"):
        facts.append(("lost tokens", _describe_losses(status["routing"])))
    if status.get("advice"):
        facts += [("advice" if not index else "", line) for index, line in enumerate(describe_tuning(status["advice"]))]
    replication = status.get("company", {}).get("replication")
    if replication is not None:
        facts.append(("replicas", _describe_replication(replication)))
    if status.get("last_error"):
        facts.append(("last error", str(status["last_error"])))
    facts += [(f"rank {row['rank']}", _describe_rank(row)) for row in status.get("ranks", [])]
    return facts


def _describe_losses(routing: dict[str, Any]) -> str:
    text = f"{routing['plt']:.3%} of those {routing['basis']}, allowed {routing['plt_limit']:.3%}"
    return f"{text}: TOO MANY" if routing["plt"] > routing["plt_limit"] else text


def _describe_replication(row: dict[str, Any]) -> str:
    text = f"{_known(row.get('replicas'))}, newest {_step(row.get('replicated_step'))}"
    if row.get("away"):
        nodes = ", ".join(map(str, row["away"]))
        text += f"; NODE {nodes} DOES NOT TAKE THEM: memory may be lost with this node"
    return text


def _describe_rank(row: dict[str, Any]) -> str:
    state = "alive" if row.get("alive") else "ended"
    text = f"pid {row.get('pid')}, {state}, sealed step {_known(row.get('sealed_step'))}"
    if row.get("beat_age_s") is not None:
        text += f", at step {_known(row.get('beat_step'))} {row['beat_age_s']:.1f} s ago"
    return text


def _step(value: object) -> str:
    return "none yet" if value is None else f"step {value}"


def _known(value: object) -> str:
    return "?" if value is None else str(value)
