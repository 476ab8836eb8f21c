"""A store that repeats what another store may well manage a moment later."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from moc.clock import Clock
from moc.errors import ConfigError, StorageError
from moc.store.port import Entry, Segment, Store, StoreProperties
from moc.trace import Trace

__all__ = ["RetryingStore"]

T = TypeVar("T")


class RetryingStore:
    """Repeat calls whose error is retryable, with growing random delays; the last error is raised as it is.

    Thread: any. Blocks: up to `deadline_s` plus the time of one call. A repeated put sends the same bytes to the same
    key, and a create-only put that had succeeded without an answer finds its own bytes, so every call may be repeated.
    """

    def __init__(
        self,
        inner: Store,
        clock: Clock,
        *,
        attempts: int = 5,
        first_delay_s: float = 0.2,
        longest_delay_s: float = 10.0,
        deadline_s: float = 120.0,
        chance: random.Random | None = None,
        trace: Trace | None = None,
    ) -> None:
        if attempts < 1 or first_delay_s < 0 or longest_delay_s < first_delay_s or deadline_s <= 0:
            raise ConfigError(
                f"impossible retry limits {attempts=} {first_delay_s=} {longest_delay_s=} {deadline_s=} "
                "allowed=attempts>=1, 0<=first_delay_s<=longest_delay_s, deadline_s>0"
            )
        self._inner = inner
        self._clock = clock
        self._attempts = attempts
        self._first_delay_s = first_delay_s
        self._longest_delay_s = longest_delay_s
        self._deadline_s = deadline_s
        self._chance = chance or random.Random()
        self._trace = trace or Trace()

    @property
    def properties(self) -> StoreProperties:
        return self._inner.properties

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        self._repeat(lambda: self._inner.put(key, segments, create_only=create_only))

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        return self._repeat(lambda: self._inner.read(key, limit_bytes=limit_bytes))

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        self._repeat(lambda: self._inner.read_into(key, offset, view))

    def size_bytes(self, key: str) -> int:
        return self._repeat(lambda: self._inner.size_bytes(key))

    def list(self, prefix: str) -> list[Entry]:
        return self._repeat(lambda: self._inner.list(prefix))

    def delete(self, key: str) -> None:
        self._repeat(lambda: self._inner.delete(key))

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        return self._repeat(lambda: self._inner.sweep(older_than_s=older_than_s, is_dry_run=is_dry_run))

    def sync(self, prefix: str) -> None:
        self._repeat(lambda: self._inner.sync(prefix))

    def free_bytes(self) -> int | None:
        return self._repeat(self._inner.free_bytes)

    def close(self) -> None:
        self._inner.close()

    def _repeat(self, call: Callable[[], T]) -> T:
        end_s = self._clock.now_s() + self._deadline_s
        for attempt in range(1, self._attempts):
            try:
                return call()
            except StorageError as error:
                delay_s = self._delay_s(attempt)
                if not error.retryable or self._clock.now_s() + delay_s > end_s:
                    raise
                reason = str(error)
            with self._trace.span("store.wait_retry", attempt=attempt, delay_s=delay_s, reason=reason):
                self._clock.sleep(delay_s)
        return call()

    def _delay_s(self, attempt: int) -> float:
        """Return half of the doubled delay plus a random part, so that many ranks do not come back together."""
        ceiling_s = min(self._longest_delay_s, self._first_delay_s * 2.0 ** (attempt - 1))
        return ceiling_s * self._chance.uniform(0.5, 1.0)
