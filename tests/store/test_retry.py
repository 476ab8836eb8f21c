"""Bounded repetition, under a clock that the test owns."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from moc.errors import ConfigError, MocError, ObjectMissingError, StoreDeniedError, StoreUnavailableError
from moc.store.memory import MemoryStore
from moc.store.port import Entry, Segment, StoreProperties
from moc.store.retry import RetryingStore
from moc.trace import Trace
from tests.support.clock import FakeClock


class FlakyStore:
    """A memory store whose calls first raise the given errors, one each; a put may have worked before its error."""

    def __init__(self, *errors: MocError, works_before_error: bool = False) -> None:
        self.inner = MemoryStore()
        self.errors = list(errors)
        self.calls = 0
        self._works_before_error = works_before_error

    def _answer(self) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)

    @property
    def properties(self) -> StoreProperties:
        return self.inner.properties

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        if self._works_before_error:
            self.inner.put(key, segments, create_only=create_only)
        self._answer()
        self.inner.put(key, segments, create_only=create_only)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        self._answer()
        return self.inner.read(key, limit_bytes=limit_bytes)

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        self._answer()
        self.inner.read_into(key, offset, view)

    def size_bytes(self, key: str) -> int:
        self._answer()
        return self.inner.size_bytes(key)

    def list(self, prefix: str) -> list[Entry]:
        self._answer()
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self._answer()
        self.inner.delete(key)

    def sync(self, prefix: str) -> None:
        self._answer()
        self.inner.sync(prefix)

    def free_bytes(self) -> int | None:
        self._answer()
        return self.inner.free_bytes()

    def close(self) -> None:
        self.inner.close()


def unavailable(count: int) -> list[MocError]:
    return [StoreUnavailableError(f"no answer number={number}") for number in range(count)]


def test_a_call_succeeds_after_a_few_retryable_errors() -> None:
    clock = FakeClock()
    flaky = FlakyStore(*unavailable(4))

    RetryingStore(flaky, clock, attempts=5).put("a", [memoryview(b"x")])

    assert flaky.calls == 5
    assert len(clock.sleeps) == 4
    assert flaky.inner.read("a", limit_bytes=1) == b"x"


def test_every_call_is_repeated() -> None:
    clock = FakeClock()
    flaky = FlakyStore()
    store = RetryingStore(flaky, clock, attempts=2)
    flaky.inner.put("a", [memoryview(b"x")])
    target = bytearray(1)

    for call in (
        lambda: store.put("a", [memoryview(b"x")]),
        lambda: store.read("a", limit_bytes=1),
        lambda: store.read_into("a", 0, memoryview(target)),
        lambda: store.size_bytes("a"),
        lambda: store.list(""),
        store.free_bytes,
        lambda: store.sync("a"),
        lambda: store.delete("a"),
    ):
        flaky.errors = unavailable(1)
        call()

    assert len(clock.sleeps) == 8
    assert target == b"x"
    assert flaky.inner.list("") == []


def test_the_last_error_is_raised_when_the_attempts_are_used_up() -> None:
    clock = FakeClock()
    flaky = FlakyStore(*unavailable(10))

    with pytest.raises(StoreUnavailableError, match="number=2"):
        RetryingStore(flaky, clock, attempts=3).size_bytes("a")

    assert flaky.calls == 3
    assert len(clock.sleeps) == 2


@pytest.mark.parametrize("error", [StoreDeniedError("no rights"), ObjectMissingError("gone")])
def test_an_error_that_stays_is_raised_at_once(error: MocError) -> None:
    clock = FakeClock()
    flaky = FlakyStore(error)

    with pytest.raises(type(error)):
        RetryingStore(flaky, clock).read("a", limit_bytes=1)

    assert flaky.calls == 1
    assert clock.sleeps == []


def test_delays_double_up_to_a_limit_and_are_random_within_half() -> None:
    clock = FakeClock()
    store = RetryingStore(
        FlakyStore(*unavailable(7)), clock, attempts=8, first_delay_s=1.0, longest_delay_s=8.0, chance=random.Random(3)
    )

    store.free_bytes()

    for delay_s, ceiling_s in zip(clock.sleeps, [1, 2, 4, 8, 8, 8, 8], strict=True):
        assert ceiling_s / 2 <= delay_s <= ceiling_s
    assert len({round(delay_s, 6) for delay_s in clock.sleeps[3:]}) == 4


def test_the_same_chance_gives_the_same_delays() -> None:
    runs = []
    for _ in range(2):
        clock = FakeClock()
        RetryingStore(FlakyStore(*unavailable(4)), clock, chance=random.Random(11)).free_bytes()
        runs.append(clock.sleeps)

    assert runs[0] == runs[1]


def test_the_deadline_ends_the_repetition_before_the_attempts_do() -> None:
    clock = FakeClock()
    flaky = FlakyStore(*unavailable(100))

    with pytest.raises(StoreUnavailableError):
        RetryingStore(flaky, clock, attempts=100, first_delay_s=1.0, longest_delay_s=1.0, deadline_s=5.0).free_bytes()

    assert clock.now_s() <= 5.0
    assert 5 <= flaky.calls <= 11


def test_a_creation_that_worked_without_an_answer_is_not_fenced_by_itself() -> None:
    flaky = FlakyStore(*unavailable(1), works_before_error=True)

    RetryingStore(flaky, FakeClock()).put("a", [memoryview(b"x")], create_only=True)

    assert flaky.inner.read("a", limit_bytes=1) == b"x"


def test_every_wait_is_traced_with_its_reason() -> None:
    waits: list[dict[str, object]] = []
    trace = Trace(lambda event, _, fields: waits.append(fields) if event == "begin" else None)

    RetryingStore(FlakyStore(*unavailable(2)), FakeClock(), trace=trace).free_bytes()

    assert [fields["attempt"] for fields in waits] == [1, 2]
    assert waits[0]["reason"] == "no answer number=0"


@pytest.mark.parametrize(
    "limits",
    [
        {"attempts": 0},
        {"first_delay_s": -1.0},
        {"first_delay_s": 2.0, "longest_delay_s": 1.0},
        {"deadline_s": 0.0},
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="allowed=attempts>=1"):
        RetryingStore(MemoryStore(), FakeClock(), **limits)  # type: ignore[arg-type]
