"""One torch-free trainer on the production attach → snapshot → commit path; the crash tests start, kill and restart it.

Writes one JSON line per event to its log: attached (with the recovery), step (with the digest of the state), global,
committed, saved, save_failed, terminated, done (with the counters), refused (a MocError at attach), failed (else).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moc._native import crc32c
from moc.agent.stacks import StackDump
from moc.clock import SystemClock
from moc.config import Config
from moc.errors import MocError, SaveFailedError, WaitTimeoutError
from moc.host import SystemHost
from moc.session import Session
from moc.survey import Request
from moc.trace import JsonLinesSink, Sink, Trace
from tests.support.kill import KillAt
from tests.support.plain import EXPERTS, LAYERS, PlainState, SocketWorld
from tests.support.witness import MICRO_BATCHES, WitnessState, routes_of

ROOT = Path(__file__).resolve().parents[2]
EDITION = ROOT / "tests/support/edition.py"
WAIT_S, WAIT_POLL_S = 60.0, 0.005
REFUSED, FAILED = 3, 4  # exit codes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--node-address", default="127.0.0.1", help="where agents of other nodes reach this one's")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--persist-every", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--snapshot-every", type=int, default=1)
    parser.add_argument("--mode", default="full")
    parser.add_argument("--k-snapshot", type=int, default=None)
    parser.add_argument("--k-persist", type=int, default=None)
    parser.add_argument("--plt-limit", type=float, default=0.0375)
    parser.add_argument("--keep-last", type=int, default=3)
    parser.add_argument("--versions", type=int, default=3)
    parser.add_argument("--log-shards", action="store_true", help="log the checksum of every shard at every step")
    parser.add_argument("--budget-bytes", type=int, default=None)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--model", default="plain", help="goes into the fingerprint")
    parser.add_argument("--run-id", default=None)
    parser.add_argument("--take-over", action="store_true")
    parser.add_argument("--restore", default="auto")
    parser.add_argument("--save-at", type=int, default=None, help="an explicit save at this step")
    parser.add_argument("--renew-at", type=int, default=None, help="a new life without parent at this step")
    parser.add_argument("--defect-at", type=int, default=None, help="the capture of this step fails")
    parser.add_argument("--copy-defect-at", type=int, default=None, help="the copy of this step's snapshot fails")
    parser.add_argument("--hold-at", type=int, default=None, help="stay at this step once its snapshot is global")
    parser.add_argument(
        "--calm-until", type=int, default=0, help="wait for every snapshot and checkpoint, to this step"
    )
    parser.add_argument("--boundaries", type=int, default=1, help="ends of micro-batches and of the step, per step")
    parser.add_argument("--wait-s", type=float, default=60.0, help="how long a save is waited for")
    parser.add_argument("--step-s", type=float, default=0.0, help="how long a forward pass takes")
    parser.add_argument("--routes", action="store_true", help="route tokens in every micro-batch, and log how many")
    parser.add_argument("--witness", action="store_true", help="route tokens, with experts that say what they learned")
    parser.add_argument("--kill", default=None, help="span:event:count")
    parser.add_argument("--edition", default=None, help="folder of another version of moc: be a worker of that one")
    parser.add_argument("--cgroup", type=Path, default=None, help="enter this one first")
    parser.add_argument("--limit", action="append", default=[], help="NAME=VALUE of a resource limit, without RLIMIT_")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.edition not in (None, str(ROOT)):
        words = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, str(EDITION), options.edition, "crash/worker.py", *words])
    if options.cgroup is not None:
        (options.cgroup / "cgroup.procs").write_text(str(os.getpid()))
    log = options.log.open("a", buffering=1)

    def note(event: str, **fields: object) -> None:
        log.write(json.dumps({"event": event, "rank": options.rank, "pid": os.getpid(), **fields}) + "\n")

    sinks: list[Sink] = [] if options.kill is None else [KillAt.parse(options.kill)]
    trace_dir = Path(os.environ["MOC_TRACE"]) if "MOC_TRACE" in os.environ else None
    if trace_dir is not None:
        sinks.append(JsonLinesSink(trace_dir / f"rank{options.rank:05d}.jsonl"))
    trace = Trace(*sinks)
    state = PlainState(options.rank, options.size, scale=options.scale, model=options.model)
    if options.witness:
        state = WitnessState(options.rank, options.size)
    state.defect_at, state.copy_defect_at = options.defect_at, options.copy_defect_at
    world = SocketWorld(options.rank, options.size, options.rendezvous)
    for name, _, value in (word.partition("=") for word in options.limit):
        number = int(getattr(resource, f"RLIMIT_{name}"))
        resource.setrlimit(number, (int(value), resource.getrlimit(number)[1]))
    try:
        request = _request(options, state)
        host = SystemHost() if trace_dir is None else SystemHost(trace_dir=trace_dir)  # an older edition has no traces
        session = Session(state, world, request, ep_sizes=(), software={"worker": "1"}, host=host, trace=trace)
    except MocError as error:
        note("refused", error=type(error).__name__, words=str(error))
        raise SystemExit(REFUSED) from error
    except OSError as error:  # another rank is gone
        note("failed", error=type(error).__name__, words=str(error))
        raise SystemExit(FAILED) from error
    signal.signal(signal.SIGTERM, lambda *_: session.ask_to_terminate())
    stacks = StackDump(session.folder, f"rank{options.rank:05d}")
    try:
        train(options, session, state, trace, note)
        stacks.close()
    except (MocError, OSError) as error:
        note("failed", error=type(error).__name__, words=str(error))
        raise SystemExit(FAILED) from error


def train(options: argparse.Namespace, session: Session, state: PlainState, trace: Trace, note: Any) -> None:
    report = session.recovery
    if isinstance(state, WitnessState):
        state.life = session.incarnation
    note(
        "attached",
        incarnation=session.incarnation,
        run=session.run,
        step=state.step,
        digest=state.digest(),
        tensors=state.tensor_digest(),
        source=None if report is None else report.source,
        rejected=[] if report is None else [f"{r.candidate}: {r.reason}" for r in report.rejected],
        notes=[] if report is None else list(report.notes),
        shards=_checksums(state) if options.log_shards else None,
        stale=[] if report is None else [[r.expert.layer, r.expert.index, r.step, r.source] for r in report.stale],
        experts=[
            [row.expert.layer, row.expert.index, row.level, row.step]
            for row in getattr(report, "experts", ())  # an older edition does not tell
        ],
        lost=[] if report is None else list(report.lost),
        plt=None if report is None else report.plt,
        plt_now=session.status().plt if options.witness else None,
        learned=state.learned() if isinstance(state, WitnessState) else None,
    )
    clock = SystemClock()
    seen: dict[str, int | None] = {"global": None, "committed": None}
    while state.step < options.steps:
        with trace.span("train.forward", step=state.step):
            if options.step_s:
                clock.sleep(options.step_s)
        session.before_update()
        with trace.span("train.update", step=state.step):
            state.advance()
        routes = _route(session, state) if options.routes else None
        if isinstance(state, WitnessState):
            _bear_witness(session, state)
        shards = _checksums(state) if options.log_shards else None
        note(
            "step",
            step=state.step,
            digest=state.digest(),
            incarnation=session.incarnation,
            routes=routes,
            shards=shards,
        )
        is_terminating = session.boundary()
        state.is_between = True
        for _ in range(1, options.boundaries):
            is_terminating |= session.boundary()
        state.is_between = False
        if options.renew_at == state.step:
            session.begin_life("load_checkpoint")
        if options.save_at == state.step or is_terminating:
            _save(session, state, note, options.wait_s)
        status = session.status()
        for event, step in (("global", status.last_global_step), ("committed", status.last_committed_step)):
            if step is not None and step != seen[event]:
                seen[event] = step
                note(event, step=step, incarnation=session.incarnation)
        if state.step <= options.calm_until:
            _wait_until(lambda: session.status().last_global_step == state.step)
            if options.persist_every and state.step % options.persist_every == 0:
                _wait_until(lambda: session.status().last_committed_step == state.step)
        if options.hold_at == state.step:
            _wait_until(lambda: session.status().last_global_step == state.step)
            note("held", step=state.step)
            signal.pause()  # until somebody ends this process
        if is_terminating:
            note("terminated", step=state.step)
            break
    counters = asdict(session.status().snapshots)
    replaced = session.status().agents_replaced
    session.close(is_collective=True)
    note("done", step=state.step, tensors=state.tensor_digest(), agents_replaced=replaced, **counters)


def _checksums(state: PlainState) -> dict[str, int]:
    """Return the crc32c of each of the rank's shards, by its name."""
    values = zip(state.needed, state.values, strict=True)
    return {shard.name: crc32c(memoryview(value).cast("B")) for shard, value in values}


def _bear_witness(session: Session, state: WitnessState) -> None:
    """Register what this rank has routed in the step that has just been made, as its experts have learned it."""
    for turn in range(MICRO_BATCHES):
        for layer, counts in enumerate(routes_of(state.life, state.step, state.rank, turn)):
            session.register_routing(layer, counts)


def _route(session: Session, state: PlainState) -> list[list[int]]:
    """Register the routes of two micro-batches, which no two steps, ranks or lives have alike; return their sum."""
    chance = random.Random(f"{session.incarnation} {state.step} {state.rank}")
    total = [[0] * EXPERTS for _ in range(LAYERS)]
    for _ in range(2):
        for layer in range(LAYERS):
            counts = [chance.choice([0, 1, 5, 40]) for _ in range(EXPERTS)]
            session.register_routing(layer, counts)
            total[layer] = [known + count for known, count in zip(total[layer], counts, strict=True)]
    return total


def _wait_until(condition: Callable[[], bool]) -> None:
    clock = SystemClock()
    ends_s = clock.now_s() + WAIT_S
    while not condition():
        assert clock.now_s() < ends_s, "what this worker waits for does not happen"
        clock.sleep(WAIT_POLL_S)


def _save(session: Session, state: PlainState, note: Any, wait_s: float) -> None:
    handle = session.save()
    try:
        handle.wait_committed(wait_s)
    except (SaveFailedError, WaitTimeoutError) as error:
        note("save_failed", step=state.step, words=str(error))
        return
    note("saved", step=state.step, incarnation=session.incarnation)


def _request(options: argparse.Namespace, state: PlainState) -> Request:
    config = Config(
        snapshot_every=options.snapshot_every,
        persist_every=options.persist_every,
        mode=options.mode,
        k_snapshot=options.k_snapshot,
        k_persist=options.k_persist,
        keep_last=options.keep_last,
        versions=options.versions,
        memory_budget_bytes=options.budget_bytes,
        timeout_s=options.timeout_s,
        plt_limit=options.plt_limit,
        replicas=options.replicas,
    )
    return Request(
        storage=options.storage,
        config=config,
        restore=int(options.restore) if options.restore.isdigit() else options.restore,
        run_id=options.run_id,
        take_over=options.take_over,
        on_mismatch=(),
        runtime_root=options.root,
        agent_idle_s=options.idle_s,
        fingerprint=state.fingerprint,
        **({} if options.edition else {"node_address": options.node_address}),  # an older one knows no nodes
    )


def serve(argv: Sequence[str], errors: Path, environment: Mapping[str, str]) -> None:
    """Be a worker in a fresh process: standard error goes to a file."""
    os.environ.clear()
    os.environ.update(environment)
    with errors.open("ab") as stream:
        os.dup2(stream.fileno(), 2)
    code: object = 0
    try:
        main(argv)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # as after a real failure: nothing is detached, no thread is joined


if __name__ == "__main__":
    main()
