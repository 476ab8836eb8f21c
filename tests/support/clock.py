"""A clock that the test owns."""

from __future__ import annotations

__all__ = ["FakeClock"]


class FakeClock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []

    def now_s(self) -> float:
        return sum(self.sleeps)

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
