"""What rank 0 shows while it trains: one live line in a terminal, else a plain line every few steps."""

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["ProgressView"]


class ProgressView:
    """Shows step records on stdout; silent where `is_shown` is false. A context manager."""

    def __init__(self, *, steps: int, every: int, is_shown: bool) -> None:
        self._steps, self._every, self._is_shown = steps, every, is_shown
        self._first: int | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if is_shown and sys.stdout.isatty():
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stdout))

    def __enter__(self) -> "ProgressView":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._is_shown:
            print(text, flush=True)

    def show(self, record: dict[str, Any]) -> None:
        """Show the record of a finished step."""
        if not self._is_shown:
            return
        step = record["step"]
        facts = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}"
            f"  {record['tokens_per_s']:,.0f} tok/s  load {record['load_max_over_mean']:.2f}"
            f"  stall {record['stall_ms']:.1f} ms"
        )
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(facts, total=self._steps, completed=step - 1)
            self._bar.update(self._task, completed=step, description=facts)
            return
        if self._first is None:
            self._first = step
        if step in (self._first, self._steps) or step % self._every == 0:
            print(f"step {step:>6}/{self._steps}  {facts}", flush=True)
