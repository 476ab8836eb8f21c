"""One torch-free trainer that runs the production attach → snapshot → commit path; the crash tests start, kill and restart it.

Writes one JSON line per event to its log: attached (with the recovery), step (with the digest of the state), committed, done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moc.attach import Request
from moc.clock import SystemClock
from moc.config import Config
from moc.session import Session
from moc.trace import Trace
from tests.support.plain import PlainState, SocketWorld


class KillAt:
    """Trace sink: SIGKILL this process at the n-th given event of a span."""

    def __init__(self, span: str, event: str, count: int) -> None:
        self._span, self._event, self._left = span, event, count

    def __call__(self, event: str, span: str, fields: dict[str, object]) -> None:
        if (event, span) == (self._event, self._span):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--persist-every", type=int, default=5)
    parser.add_argument("--snapshot-every", type=int, default=1)
    parser.add_argument("--keep-last", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--restore", default="auto")
    parser.add_argument("--save-at", type=int, default=None, help="an explicit save at this step")
    parser.add_argument("--kill", default=None, help="span:event:count")
    options = parser.parse_args()
    log = options.log.open("a", buffering=1)

    def note(event: str, **fields: object) -> None:
        log.write(json.dumps({"event": event, "rank": options.rank, "pid": os.getpid(), **fields}) + "\n")

    sinks = [] if options.kill is None else [KillAt(*options.kill.split(":")[:2], int(options.kill.split(":")[2]))]
    trace = Trace(*sinks)
    state = PlainState(options.rank, options.size, scale=options.scale)
    world = SocketWorld(options.rank, options.size, options.rendezvous)
    config = Config(
        snapshot_every=options.snapshot_every,
        persist_every=options.persist_every,
        keep_last=options.keep_last,
        timeout_s=60.0,
    )
    request = Request(
        storage=options.storage,
        config=config,
        restore=int(options.restore) if options.restore.isdigit() else options.restore,
        run_id=None,
        take_over=False,
        on_mismatch=(),
        runtime_root=options.root,
        agent_idle_s=60.0,
        fingerprint=state.fingerprint,
    )
    session = Session(state, world, request, ep_sizes=(), software={"worker": "1"}, clock=SystemClock(), trace=trace)
    report = session.recovery
    note(
        "attached",
        incarnation=session.incarnation,
        step=state.step,
        digest=state.digest(),
        source=None if report is None else report.source,
        rejected=[] if report is None else [r.reason for r in report.rejected],
    )
    committed: int | None = None
    while state.step < options.steps:
        with trace.span("train.forward", step=state.step):
            pass
        session.before_update()
        with trace.span("train.update", step=state.step):
            state.advance()
        note("step", step=state.step, digest=state.digest(), incarnation=session.incarnation)
        session.boundary()
        if options.save_at == state.step:
            session.save().wait_committed(30.0)
            note("saved", step=state.step)
        newest = session.status().last_committed_step
        if newest is not None and newest != committed:
            committed = newest
            note("committed", step=newest, incarnation=session.incarnation)
    session.close(is_collective=True)
    note("done", step=state.step)


if __name__ == "__main__":
    main()
