"""The paper's equations, its published sizes, and the advice that follows from them."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.errors import UsageError
from moc.plan.balance import balanced_rotation
from moc.plan.burden import Checkpoint, bytes_bound, plan_level, rank_bytes
from moc.plan.cost import (
    Rates,
    advise,
    arena_bytes,
    checkpoint_cost,
    full_bytes,
    is_better,
    largest_k,
    lost_tokens,
    partial_bytes,
    save_stall,
    size_ratio,
    two_level_lost_tokens,
    young_interval,
)
from moc.plan.ownership import zero2_ownership
from moc.plan.presets import PRESETS, preset
from moc.plan.rotation import even_rotation
from moc.plan.scope import LAYOUTS, MOC_LAYOUT, PAPER_LAYOUT, PARTS, SIZES, Scope
from moc.plan.select import Sequential, commit_selection, fresh_history, select
from moc.plan.shapes import ModelShape, shape_from_fields
from tests.plan.values import shapes

RATES = Rates(
    link=25e9, storage=5e8, storage_total=2e12, pass_s=2.0, mtbf_s=11160.0, restart_s=300.0, failed_share=1 / 2048
)


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("gpt-125m-8e", 0.323, 0.001),
        ("gpt-350m-16e", 1.7 * 1.0737, 0.03),  # the paper prints 1.7 G, which fits in units of 2^30
        ("mixtral-8x7b", 46.7, 0.001),
        ("qwen3-30b-a3b", 30.5, 0.002),
        ("deepseek-v3", 671.0, 0.001),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float, tolerance: float) -> None:
    assert PRESETS[name].elements / 1e9 == pytest.approx(billions, rel=tolerance)


@pytest.mark.parametrize(
    ("parts", "size", "published"),
    [
        ("w", "master_full", "0.88"),
        ("o", "master_full", "0.54"),
        ("wo", "master_full", "0.42"),
        ("w", "strict", "0.884"),
        ("o", "strict", "0.306"),
        ("wo", "strict", "0.191"),
    ],
)
def test_sizes_of_the_paper_are_reproduced(parts: str, size: str, published: str) -> None:
    ratio = size_ratio(preset("gpt-350m-16e"), PAPER_LAYOUT, Scope(parts=parts, size=size), 1)

    assert f"{ratio:.{len(published) - 2}f}" == published


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from(PARTS), st.sampled_from(SIZES), st.sampled_from(sorted(LAYOUTS)), st.data())
def test_the_size_formula_is_the_sum_over_ranks(
    drawn: tuple[ModelShape, int, int], parts: str, size: str, layout: str, data: st.DataObject
) -> None:
    shape, dp, ep = drawn
    own, k = zero2_ownership(shape, dp, ep), data.draw(st.integers(1, shape.experts))
    job = Checkpoint(
        shape=shape, ownership=own, layout=LAYOUTS[layout], scope=Scope(parts=parts, size=size), is_cut=True
    )

    level = plan_level(job, balanced_rotation(own, k), k, "adaptive")

    assert level.total == partial_bytes(shape, job.layout, job.scope, k)
    assert partial_bytes(shape, job.layout, job.scope, shape.experts) == full_bytes(shape, job.layout)
    assert bytes_bound(job, k) <= level.bottleneck


@pytest.mark.parametrize(("experts", "k", "every"), [(8, 2, 32), (16, 1, 10), (9, 3, 4)])
def test_the_closed_form_is_what_a_run_with_faults_anywhere_loses(experts: int, k: int, every: int) -> None:
    """Equation 7 by hand: one fault at a random commit; an expert loses the steps since its last commit."""
    policy, history = Sequential(k), fresh_history(1, experts)
    rotation = even_rotation(1, experts, 1)
    lost = []
    for commit in range(3 * experts):
        history = commit_selection(history, select(policy, history, rotation))
        if commit >= experts:
            lost.append(float(np.mean([(history.commits - last) * every for last in history.last[0]])))

    steps = 1280
    assert lost_tokens(faults=1, experts=experts, k=k, interval=every, steps=steps) == pytest.approx(
        np.mean(lost) / steps
    )


def test_the_papers_threshold_is_reproduced() -> None:
    assert lost_tokens(faults=1, experts=8, k=2, interval=32, steps=1280) == pytest.approx(0.0375)


def test_one_expert_of_256_is_too_few_even_at_every_step() -> None:
    rate = 10 / (54 * 86400 / 419)  # Llama 3: 419 faults in 54 days; steps of 10 s

    plain = lost_tokens(faults=rate, experts=256, k=1, interval=1, steps=1)
    levels = two_level_lost_tokens(rate=rate, failed_share=1 / 2048, experts=256, snapshot=(256, 1), persist=(32, 10))

    assert plain == pytest.approx(0.115, abs=0.001)
    assert levels == pytest.approx(1.5e-5, rel=0.1)


def test_equations_4_10_and_16() -> None:
    assert save_stall(3.0, 2.0) == 1.0
    assert save_stall(1.0, 2.0) == 0.0
    assert checkpoint_cost(save_s=2, interval=10, steps=100, faults=3, restart_s=50, step_s=1) == 20 + 3 * 55
    assert is_better((0.0, 10), (5.0, 100), rate=1e-3, step_s=1.0)
    assert not is_better((5.0, 10), (0.0, 10), rate=1e-3, step_s=1.0)
    assert largest_k((1.0, 1.5, 2.5), 2.0) == 2
    assert largest_k((3.0, 4.0), 2.0) == 1
    assert arena_bytes(full=100, snapshot=100, versions=4) == 400
    assert arena_bytes(full=100, snapshot=40, versions=4) == 220


@given(st.floats(0.01, 100), st.floats(1e-6, 1e-2), st.floats(0.1, 20))
def test_youngs_interval_minimises_equation_4(save_s: float, rate: float, step_s: float) -> None:
    def cost(interval: float) -> float:
        return checkpoint_cost(
            save_s=save_s, interval=interval, steps=1e6, faults=rate * 1e6, restart_s=0, step_s=step_s
        )

    best = young_interval(save_s=save_s, rate=rate, step_s=step_s)

    assert cost(best) <= min(cost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0)) * (1 + 1e-9)
    assert young_interval(save_s=save_s, rate=0, step_s=step_s) == inf


def test_advice_snapshots_everything_that_hides_and_persists_the_least_that_the_limit_allows() -> None:
    fast = advise(
        RATES, experts=8, snapshot_s=(0.1,) * 8, persist_s=tuple(k * 4.0 for k in range(1, 9)), plt_limit=0.0375
    )
    slow = advise(
        RATES, experts=8, snapshot_s=tuple(k * 1.0 for k in range(1, 9)), persist_s=(1.0,) * 8, plt_limit=0.0375
    )
    blocked = advise(RATES, experts=2, snapshot_s=(9.0, 9.5), persist_s=(1.0, 1.0), plt_limit=0.0375)
    least = advise(RATES, experts=2, snapshot_s=(0.5, 1.0), persist_s=(3.0, 6.0), plt_limit=0.9, k_least=2)
    strict = advise(RATES, experts=8, snapshot_s=(0.1,) * 8, persist_s=(2.0,) * 8, plt_limit=0.0)

    assert (fast.k_snapshot, fast.k_persist, fast.snapshot_every, fast.persist_every) == (8, 1, 1, 2)
    assert (slow.k_snapshot, slow.stall_s) == (2, 0.0)
    assert (blocked.k_snapshot, blocked.stall_s) == (1, 7.0)
    assert blocked.snapshot_every == blocked.persist_every > 100
    assert (strict.k_persist, strict.plt) == (8, 0.0)
    assert least.k_persist == 2


@pytest.mark.parametrize("field", ["link", "storage", "storage_total", "pass_s", "mtbf_s"])
def test_rates_must_be_positive(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field}=0 allowed="):
        replace(RATES, **{field: 0.0})


def test_shares_and_restarts_must_be_possible() -> None:
    with pytest.raises(UsageError, match=r"failed_share=1\.5"):
        replace(RATES, failed_share=1.5)
    with pytest.raises(UsageError, match="restart_s=-1"):
        replace(RATES, restart_s=-1.0)
    with pytest.raises(UsageError, match="parts=x allowed=w,o,wo"):
        Scope(parts="x")


FIELDS = {
    "name": "m",
    "layers": 2,
    "hidden": 8,
    "heads": 2,
    "vocabulary": 16,
    "ffn": 8,
    "moe_layers": 1,
    "experts": 4,
    "expert_ffn": 8,
    "top_k": 2,
}


def test_a_model_is_read_from_fields() -> None:
    shape = shape_from_fields(FIELDS, source="f")

    attention, ffn, router = 4 * 8 * 8 + 8, 3 * 8 * 8 + 8, 4 * 8 + 8
    assert shape.dense_elements == 16 * 8 * 2 + 2 * attention + ffn + router + 8
    assert shape.all_expert_elements == 4 * 3 * 8 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "field=layer allowed=name,layers"),
        ({"layers": None}, "field=layers given=None allowed=int"),
        ({"layers": True}, "allowed=int"),
        ({"gated": 1}, "field=gated given=1 allowed=bool"),
        ({"experts": 0}, r"field=experts given=0 allowed=1\.\.4096"),
        (
            dict.fromkeys(("hidden", "expert_ffn"), 1 << 20) | {"experts": 4096, "layers": 4096, "moe_layers": 4096},
            "parameters",
        ),
        ({"moe_layers": 3}, r"field=moe_layers given=3 allowed=1\.\.2"),
        ({"top_k": 5}, r"field=top_k given=5 allowed=1\.\.4"),
        ({"ffn": 0}, "field=ffn given=0"),
        ({"heads": 3}, "field=heads given=3 allowed=a divisor of 8"),
        ({"latent": {"q_rank": 1}}, "field=latent"),
        ({"latent": 3}, "field=latent"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shape_from_fields(FIELDS | change, source="f")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UsageError, match="field=vocabulary"):
        shape_from_fields({name: value for name, value in FIELDS.items() if name != "vocabulary"}, source="f")
    with pytest.raises(UsageError, match="allowed=gpt-125m-8e,"):
        preset("gpt-5")


def test_unselected_experts_cost_nothing_in_strict_scope() -> None:
    shape = preset("gpt-125m-8e")
    own = zero2_ownership(shape, 4, 4)
    job = Checkpoint(shape=shape, ownership=own, layout=MOC_LAYOUT, scope=Scope(), is_cut=True)

    load = rank_bytes(job, np.zeros((own.layers, own.experts), dtype=np.bool_), "equal")

    assert int(load.sum()) == shape.dense_elements * 12
