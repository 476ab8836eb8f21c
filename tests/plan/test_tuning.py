"""Advice from what a job has measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.plan.tuning import RankTimes, Settings, describe_tuning, tune

NOW = Settings(k_snapshot=8, k_persist=8, snapshot_every=1, persist_every=100)


def advise(*, copy_rate: float, storage_rate: float = 100e6, steps: int = 9_999, **changes: float):
    """Return advice for two ranks of 0.1 GB dense and 0.8 GB experts, 8 per layer, behind passes of 1 s."""
    rank = RankTimes(dense_bytes=100_000_000, expert_bytes=800_000_000, copy_rate=copy_rate, pass_s=1.0)
    options = {"restarts": 9, "failed_share": 1.0, "plt_limit": 0.0375} | changes
    return tune([rank, rank], experts=8, storage_rate=storage_rate, steps=steps, present=NOW, **options)  # type: ignore[arg-type]


def test_copies_that_hide_behind_the_passes_take_all_experts_every_step() -> None:
    tuning = advise(copy_rate=1e9)

    assert (tuning.advised.k_snapshot, tuning.advised.snapshot_every) == (8, 1)
    assert tuning.full_copy_s == pytest.approx(0.9)
    assert tuning.advised_stall_s == tuning.present_stall_s == 0.0
    assert tuning.faults == 10
    # 10 faults in 9,999 steps, each costs half a step of 1 s on the average.
    assert tuning.advised_cost_s == pytest.approx(10 / 9_999 / 2)


def test_slow_copies_take_as_many_experts_as_hide() -> None:
    tuning = advise(copy_rate=0.5e9)

    assert tuning.advised.k_snapshot == 4, "0.1 + 4/8 * 0.8 = 0.5 GB in 1 s"
    assert tuning.present_stall_s == pytest.approx(0.8)
    assert tuning.advised_stall_s == 0.0
    assert tuning.advised_cost_s < tuning.present_cost_s


def test_where_not_even_one_expert_hides_the_interval_is_youngs() -> None:
    tuning = advise(copy_rate=0.1e9)

    assert tuning.advised.k_snapshot == 1
    assert tuning.advised_stall_s == pytest.approx(1.0)
    assert tuning.advised.snapshot_every == math.ceil(math.sqrt(2 * 1.0 / (10 / 9_999)))


def test_storage_bounds_the_interval_and_lost_tokens_the_number_of_experts() -> None:
    cheap = advise(copy_rate=1e9, storage_rate=100e6)
    strict = advise(copy_rate=1e9, storage_rate=100e6, plt_limit=1e-9)

    assert (cheap.advised.k_persist, cheap.advised.persist_every) == (1, 4), "2 * (0.1 + 0.1) GB at 0.1 GB/s"
    assert (strict.advised.k_persist, strict.advised.persist_every) == (8, 18)


@given(
    dense=st.integers(0, 1 << 40),
    experts=st.integers(0, 1 << 40),
    rate=st.integers(1, (1 << 64) - 1),
    pass_ns=st.integers(1, (1 << 64) - 1),
    storage=st.floats(0, 1e18),
    restarts=st.integers(0, 1000),
    steps=st.integers(0, 1 << 62),
)
def test_whatever_was_measured_there_is_advice(
    dense: int, experts: int, rate: int, pass_ns: int, storage: float, restarts: int, steps: int
) -> None:
    rank = RankTimes(dense_bytes=dense, expert_bytes=experts, copy_rate=rate, pass_s=pass_ns / 1e9)

    tuning = tune(
        [rank],
        experts=8,
        storage_rate=storage,
        restarts=restarts,
        steps=steps,
        failed_share=0.5,
        plt_limit=0.1,
        present=NOW,
    )

    assert 1 <= tuning.advised.k_persist <= tuning.advised.k_snapshot <= 8
    assert tuning.advised.snapshot_every >= 1
    assert tuning.advised.persist_every % tuning.advised.snapshot_every == 0
    assert all(len(line) <= 120 and "nan" not in line for line in describe_tuning(tuning.to_json()))
