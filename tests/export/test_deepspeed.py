"""DeepSpeed exports of small synthetic checkpoints: what needs no world to be seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from moc.adapters.export.deepspeed import export_deepspeed
from moc.errors import ManifestCorruptError, MismatchError, ShardCorruptError, StoreFullError
from tests.export.checkpoint import NATIVE, Checkpoint, array, file_size_limit, random_tensor

FINGERPRINT = {
    "dtype": ["float16", "float32"],
    "zero_optimizer": "DeepSpeedZeroOptimizer",
    "zero_stage": 2,
    "gradient_clipping": "0.5",
}
PARTS = ("master", "exp_avg", "exp_avg_sq")


def tree(rank: int, *groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "engine": {"global_steps": 7, "global_samples": 42, "skipped_steps": 1, "micro_steps": 7},
        "zero": {"overflow": False, "dynamic_loss_scale": True},
        "loss_scaler": {"dynamic": True, "cur_scale": 1024.0, "cur_iter": 9, "cur_hysteresis": 2, "min_scale": 1},
        "lr_scheduler": None,
        "groups": list(groups),
        "buffers": {},
        "stateful": {"loader": {"rank": rank}},
        "rng": {"torch": array(torch.arange(4))},
    }


def group(
    params: list[tuple[str, int, int]], *, start: int, length: int, flat: int, expert: bool = False
) -> dict[str, Any]:
    end = params[-1][2] + params[-1][1]
    padding = min(length, max(0, start + length - end))
    layout = {"start": start, "length": length, "padding": padding, "flat_length": flat, "params": params}
    return {
        "name": "ep_size_2" if expert else "all",
        "is_expert": expert,
        "hyper": {"lr": 0.1, "betas": (0.9, 0.99)},
        "state": {"step": array(torch.tensor(7.0))},
        "layout": layout,
    }


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def dense_checkpoint(size: int = 15) -> Checkpoint:
    """Return a checkpoint of `w` and `b` cut between the ranks, with a gap behind `w` and padding at the end."""
    flat = size + 1 + 5 + (2 if size % 2 else 1)
    params = [("w", size, 0), ("b", 5, size + 1)]
    checkpoint = Checkpoint(fingerprint=FINGERPRINT)
    for rank in (0, 1):
        checkpoint.trees[rank] = tree(rank, group(params, start=rank * (flat // 2), length=flat // 2, flat=flat))
    for number, part in enumerate(PARTS):
        checkpoint.add("w", part, random_tensor(size, seed=number), cut=min(size, flat // 2))
        checkpoint.add("b", part, random_tensor(5, seed=10 + number), cut=0)
    return checkpoint


def test_partitions_are_rebuilt_with_every_gap(tmp_path: Path) -> None:
    repository, manifest = dense_checkpoint().commit()

    export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    halves = [load(tmp_path / f"out/global_step7/zero_pp_rank_{r}_mp_rank_00_optim_states.pt") for r in (0, 1)]
    states = [half["optimizer_state_dict"] for half in halves]
    w, b = random_tensor(15), random_tensor(5, seed=10)
    whole = torch.cat([w, torch.zeros(1), b, torch.zeros(2)])[:22]
    masters = [state["single_partition_of_fp32_groups"][0] for state in states]
    assert torch.equal(masters[0], whole[:11])
    assert torch.equal(masters[1], whole[11:21])
    assert [state["group_paddings"] for state in states] == [[0], [1]]
    assert [state["param_alignment_paddings"] for state in states] == [[[1, 0]], [[1, 0]]]
    assert states[1]["base_optimizer_state"]["state"][0]["exp_avg"].numel() == 11
    assert states[0]["clip_grad"] == 0.5
    assert halves[1]["moc"]["stateful"] == {"loader": {"rank": 1}}


def test_the_dynamic_loss_scaler_comes_back_whole(tmp_path: Path) -> None:
    repository, manifest = dense_checkpoint().commit()

    export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    scaler = load(tmp_path / "out/global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"][
        "loss_scaler"
    ]
    assert type(scaler) is DynamicLossScaler
    assert (scaler.cur_scale, scaler.cur_iter, scaler.cur_hysteresis, scaler.dtype) == (1024.0, 9, 2, torch.float16)
    assert load(tmp_path / "out/global_step7/mp_rank_00_model_states.pt")["module"]["w"].dtype == torch.float16


def expert_checkpoint(order: tuple[int, int], *, seed: int = 0, indices: Sequence[int] = range(4)) -> Checkpoint:
    """Return a checkpoint of these experts of four, two to a rank."""
    checkpoint = Checkpoint(fingerprint=FINGERPRINT)
    names = [f"{NATIVE}{i}.w" for i in range(4)]
    for number, part in enumerate(PARTS):
        for index in indices:
            checkpoint.add(names[index], part, random_tensor(3, seed=seed + 10 * number + index))
    for place in (0, 1):
        params = [(names[0], 3, 0), (names[1], 3, 3)]
        checkpoint.trees[order[place]] = tree(place, group(params, start=0, length=6, flat=6, expert=True))
    checkpoint.contents = [checkpoint.contents[place] for place in order]
    return checkpoint


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_experts_of_several_attempts_are_exported_where_each_rank_had_them(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    """The second checkpoint writes expert 1 alone, so that the first must tell whose experts the other rank has."""
    whole = expert_checkpoint(order)
    _, base = whole.commit()
    partial = expert_checkpoint(order, seed=100, indices=[1])
    partial.store = whole.store
    repository, manifest = partial.commit(base=base, step=9)

    export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    seeds = [0, 101, 2, 3]
    for place in (0, 1):
        path = tmp_path / f"out/global_step7/zero_pp_rank_{order[place]}_mp_rank_00_optim_states.pt"
        (master,) = load(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        assert torch.equal(master, torch.cat([random_tensor(3, seed=s) for s in seeds[2 * place : 2 * place + 2]]))
    for index, seed in enumerate(seeds):
        stored = load(tmp_path / f"out/global_step7/layer_0_expert_{index}_mp_rank_00_model_states.pt")
        assert torch.equal(stored[f"{NATIVE}{index}.w"], random_tensor(3, seed=seed).half())


def test_where_experts_were_in_another_life_is_not_guessed(tmp_path: Path) -> None:
    """The second life has its ranks in an unusual order, and only one of them has written an expert."""
    whole = expert_checkpoint((0, 1))
    _, base = whole.commit()
    partial = expert_checkpoint((1, 0), seed=100, indices=[1])
    partial.store = whole.store
    repository, manifest = partial.commit(base=base, incarnation=2, step=9)

    with pytest.raises(MismatchError, match="not known, as it has written none in this life: rank=0"):
        export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_experts_are_found_by_what_a_rank_wrote(tmp_path: Path, order: tuple[int, int]) -> None:
    names = [f"{NATIVE}{i}.w" for i in range(4)]
    repository, manifest = expert_checkpoint(order).commit()

    export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    for place in (0, 1):
        path = tmp_path / f"out/global_step7/zero_pp_rank_{order[place]}_mp_rank_00_optim_states.pt"
        (master,) = load(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        assert torch.equal(master, torch.cat([random_tensor(3, seed=2 * place), random_tensor(3, seed=2 * place + 1)]))
    model = load(tmp_path / "out/global_step7/mp_rank_00_model_states.pt")
    assert model["num_experts"] == [4]
    assert model["ds_config"]["use_data_before_expert_parallelism"] is (order == (1, 0))
    for index, name in enumerate(names):
        stored = load(tmp_path / f"out/global_step7/layer_0_expert_{index}_mp_rank_00_model_states.pt")
        assert stored.keys() == {name}
        assert torch.equal(stored[name], random_tensor(3, seed=index).half())


def test_a_layout_that_does_not_fit_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = dense_checkpoint()
    checkpoint.trees[1]["groups"][0]["layout"]["params"][0] = ("w", 14, 0)  # type: ignore[index]
    repository, manifest = checkpoint.commit()

    with pytest.raises(
        MismatchError, match="recorded parameter has another size: rank=0 parameter=w recorded=14 stored=15"
    ):
        export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["/../../../out", 10**30, -1, None, 7.5])
def test_a_step_that_would_lead_out_of_the_export_is_refused(tmp_path: Path, step: object) -> None:
    checkpoint = dense_checkpoint()
    checkpoint.trees[0]["engine"]["global_steps"] = step  # type: ignore[index]
    repository, manifest = checkpoint.commit()

    with pytest.raises(ManifestCorruptError, match="state has no step"):
        export_deepspeed(repository, manifest, tmp_path / "a" / "b", lambda _: None)

    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_an_engine_has_no_deepspeed_form(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add("a", "master", random_tensor(8))
    repository, manifest = checkpoint.commit()

    with pytest.raises(MismatchError, match="was not taken from a DeepSpeed engine"):
        export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_of_a_moment_is_named(tmp_path: Path) -> None:
    checkpoint = dense_checkpoint()
    index = next(i for i, row in enumerate(checkpoint.contents[1]) if row[0].part == "exp_avg")
    shard, raw, crc = checkpoint.contents[1][index]
    checkpoint.contents[1][index] = (shard, bytes([raw[0] ^ 1]) + raw[1:], crc)
    repository, manifest = checkpoint.commit()

    with pytest.raises(ShardCorruptError, match=f"shard={shard.name}"):
        export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    repository, manifest = dense_checkpoint(200_001).commit()

    with file_size_limit(100_000), pytest.raises(StoreFullError, match="export failed"):
        export_deepspeed(repository, manifest, tmp_path / "out", lambda _: None)

    assert list(tmp_path.iterdir()) == []
