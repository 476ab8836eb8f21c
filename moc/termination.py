"""SIGTERM as a request: the ranks agree on a durable save at a boundary, and only then does the process end.

A Python signal handler runs only when the main thread comes back from C code, which a rank whose peer has died may
never do. The wake-up descriptor is written by the C handler at once, so a small thread hears of the signal in any case
and ends the process if no boundary comes in time: the agent keeps what is sealed.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Termination"]

log = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


class Termination:
    """From construction to `restore`, SIGTERM asks instead of ending. Main thread only; elsewhere it does nothing."""

    def __init__(self, *, ask: Callable[[], None], patience_s: Callable[[], float]) -> None:
        """`ask` asks for the agreement, in a signal handler: it may set a flag and no more. Without `heard` within
        `patience_s()` after the signal the process ends with exit code 143.
        """
        self._ask, self._patience_s = ask, patience_s
        self._pid = os.getpid()
        self._former: Any = None
        self._former_wakeup = -1
        self.is_installed = threading.current_thread() is threading.main_thread()
        if not self.is_installed:
            return
        self._heard_read, self._heard_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._woken_read, self._woken_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            os.close(self._heard_read)
            os.close(self._heard_write)
            raise
        self._thread = threading.Thread(target=self._watch, name="moc-termination", daemon=True)
        self._thread.start()
        self._former = signal.signal(signal.SIGTERM, self._note)
        self._former_wakeup = signal.set_wakeup_fd(self._woken_write, warn_on_full_buffer=False)

    def heard(self) -> None:
        """Say that the ranks have agreed to end: from here on the save has its own deadline."""
        if not self.is_installed:
            return
        os.write(self._heard_write, b"x")

    def restore(self) -> None:
        """Give SIGTERM back to whoever had it; again is harmless."""
        if not self.is_installed or threading.current_thread() is not threading.main_thread():
            return
        # None: the handler was not installed from Python, and cannot be put back from here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._former is None else self._former)
        signal.set_wakeup_fd(self._former_wakeup)
        self.heard()
        self.is_installed = False
        self._thread.join()
        for descriptor in (self._heard_read, self._heard_write, self._woken_read, self._woken_write):
            os.close(descriptor)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child: it is not a rank, and must end as if nothing were installed
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._ask()

    def _watch(self) -> None:
        """Wait for the signal, then for the agreement. Thread: its own."""
        while True:
            ready, _, _ = select.select([self._heard_read, self._woken_read], [], [])
            if self._heard_read in ready:
                return
            if signal.SIGTERM not in os.read(self._woken_read, 4096):
                continue
            patience_s = self._patience_s()
            heard, _, _ = select.select([self._heard_read], [], [], patience_s)
            if not heard:
                os.write(2, f"moc: SIGTERM, but no boundary within {patience_s:.0f} s: ending\n".encode())
                os._exit(EXIT_CODE)
            return
