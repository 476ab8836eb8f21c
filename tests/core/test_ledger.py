"""The ledger of routes: what ranks register is what their snapshots carry; nothing that goes wrong ends training."""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moc.errors import CoordinationError, UsageError
from moc.ledger import Ledger
from moc.routing import BEFORE_DROPS, KEPT, ROUTING_KEY, Capture, Routing
from moc.training import World
from tests.support.plain import SocketWorld

T = TypeVar("T")
ONES = Routing(basis=KEPT, routed=((9, 8), (7, 6)), learned=((9, 0), (7, 6)))


class BrokenWorld(SocketWorld):
    """A world whose other ranks are gone."""

    def sum_up(self, values: array[int]) -> array[int]:
        raise CoordinationError(f"a rank is gone: rank=1 values={len(values)}")


class Device:
    """A source of counts as an accelerator is one: they come when they are asked for."""

    def __init__(self, rows: Sequence[tuple[int, object]], basis: str = KEPT) -> None:
        self.rows, self.basis = list(rows), basis

    def take(self) -> Sequence[tuple[int, object]]:
        rows, self.rows = self.rows, []
        return rows


@pytest.fixture
def alone(tmp_path: Path) -> World:
    return SocketWorld(0, 1, tmp_path / "world")


def on_ranks(folder: Path, size: int, act: Callable[[World], T]) -> list[T]:
    """Run `act` on every rank of a real world; return the results by rank."""
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        world = SocketWorld(rank, size, folder / "world")
        results[rank] = act(world)
        world.close()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[rank] for rank in range(size)]


def capture_of(extra: object) -> Capture:
    assert isinstance(extra, dict)
    return Capture.from_tree(extra[ROUTING_KEY])


def test_counts_are_the_sum_over_ranks_and_micro_batches(tmp_path: Path) -> None:
    def act(world: World) -> list[Capture]:
        ledger, captures = Ledger([2, 3], world, step=0), []
        for step in (1, 2):
            for _ in range(2):
                ledger.register(0, [world.rank, 1])
                ledger.register(1, np.array([1, 10 * world.rank, step], dtype=np.int32))
            captures.append(capture_of(ledger.settle(step)))
        return captures

    rows = on_ranks(tmp_path, 3, act)
    first, second = [row[0] for row in rows], [row[1] for row in rows]

    assert first[0].routing.routed == ((6, 6), (6, 60, 6))
    assert second[0].routing.routed == ((12, 12), (12, 120, 18))
    assert second[0].captured == second[0].routing.learned == second[0].routing.routed
    assert first[0] == first[1] == first[2]
    assert second[0] == second[1] == second[2]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_captured_is_what_an_expert_had_learned_at_its_last_snapshot_that_was_copied(
    alone: World, data: st.DataObject
) -> None:
    ledger, total = Ledger([2, 3], alone, step=0), np.zeros(5, dtype=np.int64)
    captured, steps = np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64)
    failed, before, is_under_way = 0, (captured, steps), False
    for step in range(1, 6):
        if is_under_way and data.draw(st.booleans()):
            failed, (captured, steps) = failed + 1, before
        counts = np.array(data.draw(st.lists(st.integers(0, 9), min_size=5, max_size=5)))
        chosen = np.array(data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))
        is_begun = data.draw(st.booleans())
        ledger.register(0, counts[:2])
        ledger.register(1, counts[2:])
        total += counts

        found = capture_of(ledger.settle(step, chosen, failed=failed))
        ledger.note(is_begun=is_begun)

        expected, at = np.where(chosen, total, captured), np.where(chosen, step, steps)
        assert [count for row in found.captured for count in row] == expected.tolist()
        assert [count for row in found.steps for count in row] == at.tolist()
        is_under_way = is_begun
        if is_begun:
            before, (captured, steps) = (captured, steps), (expected, at)


def test_where_nobody_registers_there_is_no_key_and_one_sum(tmp_path: Path) -> None:
    class Counting(SocketWorld):
        sums = 0

        def sum_up(self, values: array[int]) -> array[int]:
            self.sums += 1
            return super().sum_up(values)

    world = Counting(0, 1, tmp_path / "world")
    moe, dense = Ledger([4], world, step=7), Ledger([], world, step=7)

    assert [dict(ledger.settle(step)) for ledger in (moe, dense) for step in (7, 8, 9)] == [{}] * 6
    assert world.sums == 1
    assert moe.plt is None


def test_a_rank_that_registers_nothing_is_named_and_counts_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def act(world: World) -> Capture:
        ledger = Ledger([2], world, step=0)
        if world.rank:
            ledger.register(0, [3, 4])
        return capture_of(ledger.settle(1))

    captures = on_ranks(tmp_path, 2, act)

    assert [capture.routing.routed for capture in captures] == [((3, 4),)] * 2
    assert [r.message for r in caplog.records] == ["routes are registered by some ranks only: ranks=1 expected=2"]


def test_a_restored_state_is_counted_on(alone: World) -> None:
    ledger = Ledger([2, 2], alone, step=10, restored=ONES)
    before = capture_of(ledger.settle(10))
    ledger.register(0, [1, 1])

    after = capture_of(ledger.settle(11))

    assert before.routing == ONES
    assert after.routing == Routing(basis=KEPT, routed=((10, 9), (7, 6)), learned=((10, 1), (7, 6)))
    assert ledger.plt == pytest.approx(after.routing.plt)


def test_counts_of_another_kind_are_not_counted_on(alone: World, caplog: pytest.LogCaptureFixture) -> None:
    for source, experts in ((Device([(0, [1, 1])], BEFORE_DROPS), [2, 2]), (Device([(0, [1, 1])]), [2, 3])):
        ledger = Ledger(experts, alone, step=10, restored=ONES, source=source)
        assert capture_of(ledger.settle(11)).routing.routed[0] == (1, 1)

    assert [r.message.startswith("lost tokens are counted anew") for r in caplog.records] == [True, True]


def test_what_was_counted_on_a_device_is_read_where_a_snapshot_is_taken(alone: World) -> None:
    device = Device([(1, np.array([5, 6])), (0, np.array([1, 2]))])
    ledger = Ledger([2, 2], alone, step=0, source=device)
    ledger.register(0, [10, 10])

    assert capture_of(ledger.settle(1)).routing.routed == ((11, 12), (5, 6))
    assert device.rows == []


@pytest.mark.parametrize(
    ("layer", "counts", "words"),
    [
        (2, [1, 2], "layer=2 layers=2"),
        (-1, [1, 2], "layer=-1"),
        ("0", [1, 2], "layer='0'"),
        (True, [1, 2], "layer=True"),
        (0, [1, 2, 3], r"shape=\(3,\) allowed=\(2,\)"),
        (0, [[1, 2]], r"shape=\(1, 2\)"),
        (0, 7, r"shape=\(\)"),
        (0, [[1], [2, 3]], "type=list"),
        (0, [1.0, 2.0], "dtype=float64"),
        (0, [float("nan"), 1.0], "dtype=float64"),
        (0, [True, False], "dtype=bool"),
        (0, ["1", "2"], "dtype=<U1"),
        (0, [1, None], "dtype=object"),
        (0, [1, -2], "count=-2"),
        (0, np.array([1, 2**63], dtype=np.uint64), "count=9223372036854775808"),
    ],
)
def test_counts_that_cannot_be_are_refused_at_the_call(alone: World, layer: int, counts: object, words: str) -> None:
    ledger = Ledger([2, 2], alone, step=0)

    with pytest.raises(UsageError, match=words):
        ledger.register(layer, counts)

    ledger.register(0, [1, 1])
    assert capture_of(ledger.settle(1)).routing.routed == ((1, 1), (0, 0))


def test_counts_beyond_int64_are_refused_before_the_sum_could_overflow(alone: World) -> None:
    ledger = Ledger([2], alone, step=0)
    ledger.register(0, [2**62, 0])

    with pytest.raises(UsageError, match="too many routes"):
        ledger.register(0, [2**62, 0])

    ledger.settle(1)
    ledger.register(0, [2**62, 0])
    assert ledger.settle(2) == {}  # the total is too large: it is not counted on


@pytest.mark.parametrize("counts", [[1, -1], [1, 2, 3]])
def test_wrong_counts_of_a_device_end_the_counting_on_all_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, counts: list[int]
) -> None:
    def act(world: World) -> list[object]:
        ledger = Ledger([2], world, step=0, source=Device([(0, counts if world.rank else [1, 1])]))
        extras = [ledger.settle(1), ledger.settle(2)]
        ledger.register(0, [1, 1])
        return [*extras, ledger.plt]

    assert on_ranks(tmp_path, 2, act) == [[{}, {}, None]] * 2
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "lost tokens are not counted any more in this life: ranks=1 reason=wrong counts"
    ]
    assert [r.message.startswith("routes are wrong: rank=1") for r in caplog.records if r.levelno == logging.ERROR]


def test_a_world_that_breaks_ends_the_counting_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger([2], BrokenWorld(0, 1, tmp_path / "world"), step=0)
    ledger.register(0, [1, 1])

    assert [ledger.settle(1), ledger.settle(2)] == [{}, {}]
    ledger.register(0, [1, 1])
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_who_registers_too_late_is_told_once(alone: World, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger([2], alone, step=0)
    ledger.settle(1)

    for step in (2, 3):
        ledger.register(0, [1, 1])
        assert ledger.settle(step) == {}

    assert [r.message for r in caplog.records] == [
        "routes are ignored: rank=0 allowed=from the first step of a life on"
    ]


def test_at_the_limit_there_is_no_alarm(alone: World, caplog: pytest.LogCaptureFixture) -> None:
    half = Routing(basis=KEPT, routed=((8, 8), (7, 9)), learned=((8, 0), (7, 9)))
    ledger = Ledger([2, 2], alone, step=10, plt_limit=0.25, restored=half)
    ledger.settle(10)

    assert ledger.plt == 0.25
    assert caplog.records == []


def test_the_alarm_is_one_line_in_a_life(alone: World, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger([2, 2], alone, step=10, plt_limit=0.2, restored=ONES)
    ledger.settle(10)
    ledger.settle(11)

    assert [r.message for r in caplog.records if "too many tokens are lost" in r.message] == [
        "too many tokens are lost: plt=23.5294% basis=kept allowed=plt_limit=20.0000%"
    ]
