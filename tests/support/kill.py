"""A trace sink that kills (or stops) its own process at a chosen span, so that the product needs no hooks for tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from moc.errors import MocError

__all__ = ["KillAt", "died_within", "run_apart"]

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


def died_within(work: Callable[[Callable[..., None]], None], *, count: int, is_counted: Callable[[str], bool]) -> bool:
    """Run `work(sink)` in a child that kills itself at trace event `count`; return whether it came to that.

    `is_counted` chooses among "begin" and "end".
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            seen = [0]

            def kill_at(event: str, *_: object) -> None:
                seen[0] += is_counted(event)
                if seen[0] == count:
                    os.kill(os.getpid(), signal.SIGKILL)

            work(kill_at)
            code = 0
        except MocError as error:
            os.write(2, f"{error}\n".encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False
