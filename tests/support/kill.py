"""A trace sink that kills its own process at a chosen span, so that the product needs no hooks for the crash tests."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

__all__ = ["KillAt"]


@dataclass(slots=True)
class KillAt:
    """SIGKILL this process at the `left`-th given event ("begin" or "end") of a span."""

    span: str
    event: str
    left: int

    @staticmethod
    def parse(text: str) -> KillAt:
        """Read "span:event:count"."""
        span, event, count = text.split(":")
        return KillAt(span, event, int(count))

    def __call__(self, event: str, span: str, fields: dict[str, object]) -> None:
        if (event, span) == (self.event, self.span):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
