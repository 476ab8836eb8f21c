"""Supervision: run a command, restart it when it fails, and give up when restarting leads nowhere.

The command runs in a session of its own. This process forwards termination signals to it, adopts and reaps what it
leaves behind (so it can be PID 1 of a container), and never polls: it sleeps until a signal or a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

from moc.clock import Clock, SystemClock
from moc.errors import UsageError
from moc.trace import Trace

__all__ = ["GiveUp", "Limits", "Restart", "decide", "supervise"]

LOOP_LIVES = 3  # lives in a row without progress: the third failure in the same place is not chance
DELAY_LIMIT_S = 60.0
HANG_GRACE_S = 10.0  # for a launcher to end workers that it put into sessions of their own
HANG_LOOK_LIMIT_S = 30.0
KILL_WAIT_S = 30.0  # a killed process that is not gone by then sits in the kernel; waiting longer helps nobody
POLL_S = 1.0  # where orphans cannot be adopted, the end of a group raises no signal
COMMAND_HUNG = 124  # as timeout(1) has it
COMMAND_NOT_EXECUTABLE = 126  # as shells have it
COMMAND_NOT_FOUND = 127
PR_SET_CHILD_SUBREAPER = 36
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)  # batch systems announce things by them; only the command knows which

LIFE_VARIABLE = "MOC_LIFE"
"""Tells the command how often it was started, from 1: what the first start alone asks for must not be done again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop. `grace_s` is what a terminated command gets for its last save; no `hang_timeout_s`: never hung."""

    max_restarts: int
    grace_s: float = 120.0
    hang_timeout_s: float | None = None
    delay_s: float = 1.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.grace_s <= 0 or self.delay_s < 0:
            raise UsageError(
                f"limit is out of range: max_restarts={self.max_restarts} grace_s={self.grace_s} allowed=>= 0, > 0"
            )
        if self.hang_timeout_s is not None and self.hang_timeout_s <= 0:
            raise UsageError(f"limit is out of range: hang_timeout_s={self.hang_timeout_s} allowed=> 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Start the command again after a delay."""

    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Do not start the command again."""

    reason: str


def decide(advanced: Sequence[bool], limits: Limits) -> Restart | GiveUp:
    """Return what to do after these failed lives; `advanced` says of each whether its newest step grew. Pure."""
    idle = next((i for i, moved in enumerate(reversed(advanced)) if moved), len(advanced))
    if idle >= LOOP_LIVES:
        return GiveUp(reason=f"crash loop: {idle} lives in a row made no progress")
    if len(advanced) > limits.max_restarts:
        return GiveUp(reason=f"restarts used up: max_restarts={limits.max_restarts}")
    return Restart(delay_s=min(limits.delay_s * 2**idle, DELAY_LIMIT_S))


def supervise(
    command: Sequence[str],
    *,
    limits: Limits,
    newest_step: Callable[[], int | None],
    last_beat_s: Callable[[], float | None],
    say: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    trace: Trace | None = None,
    clock: Clock | None = None,
) -> int:
    """Run the command until it succeeds, is told to stop, or restarts are pointless; return its last exit code.

    `newest_step` returns the newest step that a restart could resume from, `last_beat_s` how long the most silent rank
    has given no sign of life; None: unknown. Death by signal N counts as exit code 128 + N. Thread: the main thread.
    """
    if not command:
        raise UsageError("no command given allowed=a program and its arguments")
    with _Signals() as signals:
        is_adopting = _adopt_orphans()
        supervisor = _Supervisor(
            limits, signals, last_beat_s, say, trace or Trace(), clock or SystemClock(), is_adopting=is_adopting
        )
        advanced: list[bool] = []
        while True:
            before = newest_step()
            try:
                code = supervisor.live(command, env, number=len(advanced) + 1)
            except OSError as error:
                say(f"cannot start the command: command={command[0]} reason={error.strerror}")
                return COMMAND_NOT_FOUND if isinstance(error, FileNotFoundError) else COMMAND_NOT_EXECUTABLE
            if code == 0 or supervisor.is_stopping:
                return code
            after = newest_step()
            advanced.append(after is not None and (before is None or after > before))
            verdict = decide(advanced, limits)
            steps = f"exit_code={code} step_before={before} step_after={after}"
            if isinstance(verdict, GiveUp):
                say(f"giving up: {verdict.reason} {steps}")
                return code
            say(f"restart {len(advanced)} of {limits.max_restarts} in {verdict.delay_s:.0f} s: {steps}")
            if supervisor.is_stopped_within(verdict.delay_s):
                return code


class _Signals:
    """Signals as values: handlers only write to a pipe, and `wait` reads it. Use: once, as a context manager."""

    WANTED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *PASSED_ON)

    def __enter__(self) -> _Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # What the caller ignores (nohup, a shell's background jobs) stays ignored, here and in the command.
        self._caught = [n for n in self.WANTED if n == signal.SIGCHLD or signal.getsignal(n) != signal.SIG_IGN]
        self._old = {number: signal.signal(number, _note) for number in self._caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)

    def wait(self, timeout_s: float | None) -> set[int]:
        """Return the signals that came since the last call, at the latest after `timeout_s`."""
        readable, _, _ = select.select([self._read], [], [], None if timeout_s is None else max(timeout_s, 0.0))
        return set(os.read(self._read, 4096)) if readable else set()


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: the interpreter has already written the number to the wake-up pipe."""


class _Supervisor:
    """Lives of one command, one after the other. `is_stopping` turns true when somebody asked this process to end."""

    def __init__(
        self,
        limits: Limits,
        signals: _Signals,
        last_beat_s: Callable[[], float | None],
        say: Callable[[str], None],
        trace: Trace,
        clock: Clock,
        *,
        is_adopting: bool,
    ) -> None:
        self._limits, self._signals, self._last_beat_s = limits, signals, last_beat_s
        self._say, self._trace, self._clock = say, trace, clock
        self._is_adopting = is_adopting
        self.is_stopping = False
        self._group = 0
        self._code: int | None = None
        self._kill_at_s: float | None = None

    def live(self, command: Sequence[str], env: Mapping[str, str] | None, *, number: int) -> int:
        """Run the command once; return its exit code when its group is gone. Raises OSError if it cannot start."""
        with self._trace.span("supervise.live", number=number):
            told = {**(os.environ if env is None else env), LIFE_VARIABLE: str(number)}
            process = subprocess.Popen(command, env=told, start_new_session=True)
            self._begin(process.pid)
            is_hung = self._wait_for_command()
            code = COMMAND_HUNG if is_hung and self._code == 0 else self._code or 0
            process.returncode = code  # reaped here, together with adopted orphans
            if code != 0 or self.is_stopping:
                self._end_group()
            self._group = 0
            return code

    def _begin(self, group: int) -> None:
        self._group, self._code, self._kill_at_s = group, None, None

    def is_stopped_within(self, seconds: float) -> bool:
        """Wait and reap; return whether a termination signal came meanwhile."""
        until_s = self._clock.now_s() + seconds
        while not self.is_stopping and self._clock.now_s() < until_s:
            self._note_signals(self._signals.wait(until_s - self._clock.now_s()))
        return self.is_stopping

    def _wait_for_command(self) -> bool:
        """Wait until the command itself has ended; return whether that was because it hung."""
        timeout_s = self._limits.hang_timeout_s
        look_at_s = None if timeout_s is None else self._clock.now_s() + timeout_s
        is_hung = False
        while not self._has_ended():
            deadlines = [moment for moment in (look_at_s, self._kill_at_s) if moment is not None]
            self._note_signals(self._signals.wait(min(deadlines) - self._clock.now_s() if deadlines else None))
            now_s = self._clock.now_s()
            if not self._has_ended() and self._kill_at_s is not None and now_s >= self._kill_at_s:
                self._kill("the command did not end in time")
                self._kill_at_s = now_s + KILL_WAIT_S
            if not self._has_ended() and timeout_s is not None and look_at_s is not None and now_s >= look_at_s:
                look_at_s = now_s + min(timeout_s / 4, HANG_LOOK_LIMIT_S)
                if not self.is_stopping and self._is_silent(timeout_s):
                    is_hung, look_at_s = True, None
                    self._signal(signal.SIGTERM)
                    self._kill_at_s = now_s + HANG_GRACE_S
        return is_hung

    def _has_ended(self) -> bool:
        return self._code is not None

    def _is_silent(self, timeout_s: float) -> bool:
        age_s = self._last_beat_s()
        if age_s is None or age_s <= timeout_s:
            return False
        self._say(f"the command hangs, ending it: last_beat_s={age_s:.0f} hang_timeout_s={timeout_s:.0f}")
        return True

    def _end_group(self) -> None:
        """Leave no process of the group: those that save because they were told to end get the rest of their time."""
        deadline_s = self._kill_at_s if self.is_stopping else None
        if deadline_s is None:
            self._signal(signal.SIGKILL)
        until_s = deadline_s or self._clock.now_s() + KILL_WAIT_S
        while self._has_group():
            left_s = until_s - self._clock.now_s()
            if left_s <= 0 and deadline_s is None:
                self._say(f"processes of the command cannot be killed: group={self._group}")
                return
            if left_s <= 0:
                self._kill("processes of the command did not end in time")
                deadline_s, until_s = None, self._clock.now_s() + KILL_WAIT_S
                continue
            self._note_signals(self._signals.wait(left_s if self._is_adopting else min(left_s, POLL_S)))

    def _note_signals(self, numbers: set[int]) -> None:
        """Reap what has ended; pass a termination signal on, and treat a second one as impatience."""
        self._reap()
        for number in sorted(numbers & set(PASSED_ON)):
            self._signal(number)
        for number in sorted(numbers - {signal.SIGCHLD, *PASSED_ON}):
            name = signal.Signals(number).name
            if self.is_stopping:
                self._kill(f"{name} again")
                continue
            self.is_stopping = True
            if self._group:
                self._say(f"{name}: passed on, waiting up to {self._limits.grace_s:.0f} s for the last save")
            self._signal(number)
            self._kill_at_s = self._clock.now_s() + self._limits.grace_s

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid == self._group:
                self._code = ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)

    def _has_group(self) -> bool:
        try:
            os.killpg(self._group, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def _kill(self, reason: str) -> None:
        if self._group:
            self._say(f"{reason}: killing it")
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, number)


def _adopt_orphans() -> bool:
    """Become the parent of every descendant whose own parent ends; return whether that is so."""
    if os.getpid() == 1:
        return True
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False
