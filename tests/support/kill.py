"""A trace sink that kills (or stops) its own process at a chosen span, so that the product needs no hooks for tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["KillAt", "run_apart"]

DEADLINE_S = 60.0


@dataclass(slots=True)
class KillAt:
    """Send this process a signal at the `left`-th given event ("begin" or "end") of a span."""

    span: str
    event: str
    left: int
    number: signal.Signals = signal.SIGKILL

    @staticmethod
    def parse(text: str) -> KillAt:
        """Read "span:event:count" or, for another signal than SIGKILL, "span:event:count:SIGNAL"."""
        span, event, count, *number = text.split(":")
        return KillAt(span, event, int(count), *(signal.Signals[name] for name in number))

    def __call__(self, event: str, span: str, fields: dict[str, object]) -> None:
        if (event, span) == (self.event, self.span):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)


def run_apart(call: Callable[..., object], *arguments: object) -> int:
    """Run a function in a process of its own and return its exit code, negative for a signal."""
    process = multiprocessing.get_context("forkserver").Process(target=call, args=arguments, daemon=True)
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode is not None, f"{call} did not end"
    return process.exitcode
