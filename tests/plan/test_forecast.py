"""The fault model: by hand on single faults, against the formulas on many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moc.errors import UsageError
from moc.plan.cost import checkpoint_cost
from moc.plan.forecast import Faults, Outcome, Scheme, forecast

PLAIN = Scheme(
    name="plain",
    save_s=0.0,
    copy_s=0.0,
    write_s=0.0,
    persist_every=10,
    snapshot_every=0,
    has_replica=False,
    load_memory_s=1.0,
    load_storage_s=5.0,
    stale_steps=(2.0, 4.0),
    commit_bytes=100,
)


def one_fault(at_s: float, *, takes_node: bool) -> Faults:
    return Faults(between_s=np.array([[at_s, 1e6]]), takes_node=np.array([[takes_node, False]]))


def run(scheme: Scheme, faults: Faults, *, horizon_s: float = 200.0) -> Outcome:
    return forecast(scheme, faults, horizon_s=horizon_s, pass_s=1.0, restart_s=20.0)


def test_a_fault_costs_the_restart_the_load_and_the_steps_since_the_last_save() -> None:
    outcome = run(PLAIN, one_fault(57.5, takes_node=False))

    # 57 steps, 50 kept; then 200 - 57.5 - 20 - 5 seconds of work.
    assert outcome.goodput == pytest.approx((50 + 117) / 200)
    assert outcome.lost_steps_per_fault == 7
    assert outcome.faults == 1
    assert outcome.plt == pytest.approx(2 / 167)
    assert outcome.bytes_per_hour == pytest.approx((5 + 11) * 100 * 18)


def test_a_state_that_is_not_yet_written_is_lost() -> None:
    slow = replace(PLAIN, write_s=8.0)

    assert run(slow, one_fault(57.5, takes_node=False)).lost_steps_per_fault == 17
    assert run(slow, one_fault(58.5, takes_node=False)).lost_steps_per_fault == 8


@pytest.mark.parametrize(
    ("takes_node", "has_replica", "lost", "load_s"),
    [(False, False, 0, 1.0), (True, False, 7, 5.0), (True, True, 0, 1.0)],
)
def test_memory_helps_where_it_survives(takes_node: bool, has_replica: bool, lost: int, load_s: float) -> None:
    scheme = replace(PLAIN, snapshot_every=1, has_replica=has_replica)

    outcome = run(scheme, one_fault(57.5, takes_node=takes_node))

    assert outcome.lost_steps_per_fault == lost
    assert outcome.goodput == pytest.approx((57 - lost + np.floor(200 - 57.5 - 20 - load_s)) / 200)


def test_what_is_newer_in_storage_than_in_memory_is_taken_from_there() -> None:
    scheme = replace(PLAIN, snapshot_every=40)

    assert run(scheme, one_fault(57.5, takes_node=False)).lost_steps_per_fault == 7


def test_a_lost_node_also_takes_the_steps_of_earlier_lives_that_were_never_stored() -> None:
    scheme = replace(PLAIN, snapshot_every=1, persist_every=100)
    faults = Faults(between_s=np.array([[57.5, 40.5, 1e6]]), takes_node=np.array([[False, True, False]]))

    outcome = run(scheme, faults)

    # Recovered at 57 from memory, 19 steps more, and nothing of it was stored: 200 - 98 - 20 - 5 seconds from step 0.
    assert outcome.goodput == pytest.approx(77 / 200)
    assert outcome.lost_steps_per_fault == (0 + 57 + 19) / 2


def test_intervals_count_the_steps_of_the_run_not_of_a_life() -> None:
    scheme = replace(PLAIN, snapshot_every=4, persist_every=12, load_memory_s=0.0)
    faults = Faults(between_s=np.array([[30.5, 24.5, 1e6]]), takes_node=np.array([[False, True, False]]))

    outcome = run(scheme, faults)

    # Step 28 is in memory; 4 steps more make 32, and 24 is the newest in storage.
    assert outcome.lost_steps_per_fault == (2 + 8) / 2


def test_what_a_persist_adds_is_paid_once_per_persist() -> None:
    assert replace(PLAIN, snapshot_every=2, save_s=0.5, persist_s=3.0).step_s(1.0) == pytest.approx(1 + 0.25 + 0.3)


def test_a_fault_during_the_restart_costs_its_time_and_no_tokens() -> None:
    faults = Faults(between_s=np.array([[50.5, 10.0, 1e6]]), takes_node=np.zeros((1, 3), dtype=np.bool_))

    outcome = run(PLAIN, faults)

    assert outcome.faults == 2
    assert outcome.goodput == pytest.approx((50 + np.floor(200 - 60.5 - 25)) / 200)
    assert outcome.plt == pytest.approx(2 / (50 + 114))


def test_without_faults_and_cost_every_second_counts() -> None:
    faults = Faults(between_s=np.array([[1e6]]), takes_node=np.array([[False]]))

    assert run(PLAIN, faults).goodput == 1.0
    assert run(replace(PLAIN, save_s=10.0), faults).goodput == pytest.approx(0.5)
    assert run(PLAIN, faults).goodput_half_width == 0.0


def test_many_faults_cost_what_equation_4_says() -> None:
    mtbf_s, horizon_s, restart_s = 5000.0, 2e6, 60.0
    chance = np.random.default_rng(7)
    between = chance.exponential(mtbf_s, (50, 700))
    scheme = replace(PLAIN, save_s=3.0, persist_every=100, load_storage_s=0.0)

    outcome = forecast(
        scheme,
        Faults(between_s=between, takes_node=np.zeros_like(between, dtype=np.bool_)),
        horizon_s=horizon_s,
        pass_s=1.0,
        restart_s=restart_s,
    )

    cost = checkpoint_cost(
        save_s=3.0, interval=100, steps=horizon_s, faults=horizon_s / mtbf_s, restart_s=restart_s, step_s=1.0
    )
    assert 1 - outcome.goodput == pytest.approx(cost / horizon_s, rel=0.05)
    assert outcome.goodput_half_width < 0.002


def test_faults_must_reach_the_horizon_and_intervals_must_be_possible() -> None:
    with pytest.raises(UsageError, match="too few faults"):
        run(PLAIN, Faults(between_s=np.array([[10.0]]), takes_node=np.array([[False]])))
    with pytest.raises(UsageError, match="persist_every=0"):
        replace(PLAIN, persist_every=0)
