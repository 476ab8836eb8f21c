"""Safetensors exports of small synthetic checkpoints: names, rounding, files, and what happens to a damaged one."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from moc.adapters.export.safetensors import export_safetensors
from moc.adapters.export.source import CheckpointSource
from moc.errors import ObjectMissingError, ShardCorruptError, StoreFullError, UsageError
from tests.export.checkpoint import NATIVE, Checkpoint, array, file_size_limit, random_tensor


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(path).items()}


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [(["bfloat16", "float32"], torch.bfloat16), (["float16"], torch.float16), (None, torch.float32)],
)
def test_masters_are_rounded_as_torch_rounds_them(tmp_path: Path, recorded: object, expected: torch.dtype) -> None:
    values = torch.cat([random_tensor(999), torch.tensor([0.0, -0.0, float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 1e-40])])
    checkpoint = Checkpoint(fingerprint={} if recorded is None else {"dtype": recorded})
    checkpoint.add("w", "master", values)
    checkpoint.add("w", "exp_avg", values)
    repository, manifest = checkpoint.commit()

    files = export_safetensors(repository, manifest, tmp_path / "out", lambda _: None)

    assert [path.name for path in files] == ["model.safetensors"]
    stored = read_folder(tmp_path / "out")
    assert stored.keys() == {"w"}
    assert stored["w"].dtype == expected
    assert torch.equal(stored["w"].view(torch.uint8), values.to(expected).view(torch.uint8))


def test_f32_keeps_the_masters_and_widens_what_is_frozen(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add("trained", "master", random_tensor(3, 5))
    checkpoint.add("frozen", "weight", random_tensor(4).to(torch.bfloat16))
    repository, manifest = checkpoint.commit()

    export_safetensors(repository, manifest, tmp_path / "out", lambda _: None, dtype="f32")

    stored = read_folder(tmp_path / "out")
    assert torch.equal(stored["trained"], random_tensor(3, 5))
    assert torch.equal(stored["frozen"], random_tensor(4).to(torch.bfloat16).float())


def test_large_models_are_divided_and_indexed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(fingerprint={})
    values = {f"layers.{i}.w": random_tensor(10, i + 1, seed=i) for i in range(12)}
    for name, value in values.items():
        checkpoint.add(name, "master", value)
    repository, manifest = checkpoint.commit()
    seen: list[int] = []

    files = export_safetensors(repository, manifest, tmp_path / "out", seen.append, shard_bytes=1000)

    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = sum(value.numel() * 4 for value in values.values())
    assert index["metadata"]["total_size"] == total
    assert sum(seen) >= total
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert index["weight_map"]["layers.0.w"] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    for name, value in values.items():
        with safetensors.safe_open(tmp_path / "out" / index["weight_map"][name], "pt") as file:
            assert torch.equal(file.get_tensor(name), value)
    assert all(path.stat().st_size < 1000 + 2000 for path in files[:-1] if len(path.name) > 10)


def test_buffers_are_those_of_a_state_dict_under_global_names(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    for index in range(4):
        checkpoint.add(f"{NATIVE}{index}.w", "master", random_tensor(2, 2, seed=index))
    groups = [{"is_expert": True, "name": "ep_size_2", "layout": {"params": [(f"{NATIVE}0.w", 4, 0)]}}]
    for rank in (0, 1):
        local = {f"{NATIVE}{i}.mean": array(random_tensor(3, seed=10 + 2 * rank + i)) for i in (0, 1)}
        whole = {"count": array(torch.tensor(5)), "table": array(random_tensor(2)), "moe.load": array(torch.ones(4))}
        checkpoint.trees[rank] = {
            "buffers": local | whole,
            "groups": groups,
            "persistent_buffers": ["count", "moe.load", *local],
            "tied": {"head": f"{NATIVE}0.w"},
        }
    repository, manifest = checkpoint.commit()

    export_safetensors(repository, manifest, tmp_path / "out", lambda _: None)

    stored = read_folder(tmp_path / "out")
    assert stored.keys() == {"count", "moe.load", *(f"{NATIVE}{i}.{n}" for i in range(4) for n in ("w", "mean"))}
    assert stored["count"].shape == ()
    for index in range(4):
        assert torch.equal(stored[f"{NATIVE}{index}.mean"], random_tensor(3, seed=10 + index))
    with safetensors.safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head": f"{NATIVE}0.w"}


def test_unrecorded_buffers_are_kept_but_for_those_deepspeed_drops(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add(f"{NATIVE}0.w", "master", random_tensor(2))
    checkpoint.add(f"{NATIVE}1.w", "master", random_tensor(2))
    buffers = {
        "seen": array(torch.ones(1)),
        "moe.bias": array(torch.ones(1)),
        "moe.tokens_per_expert": array(torch.ones(1)),
    }
    checkpoint.trees[0] = {"buffers": buffers, "groups": []}
    repository, manifest = checkpoint.commit()

    export_safetensors(repository, manifest, tmp_path / "out", lambda _: None)

    assert read_folder(tmp_path / "out").keys() - {f"{NATIVE}{i}.w" for i in (0, 1)} == {"seen", "moe.bias"}


def test_a_flipped_bit_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add("a", "master", random_tensor(8))
    checkpoint.add("b", "master", random_tensor(8))
    shard, raw, crc = checkpoint.contents[1][-1]
    checkpoint.contents[1][-1] = (shard, bytes([raw[0] ^ 1]) + raw[1:], crc)
    repository, manifest = checkpoint.commit()

    with pytest.raises(ShardCorruptError, match=r"r00001-d.* shard=master/b@4"):
        export_safetensors(repository, manifest, tmp_path / "deep" / "out", lambda _: None)

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add("a", "master", random_tensor(100_000))
    repository, manifest = checkpoint.commit()

    with file_size_limit(50_000), pytest.raises(StoreFullError, match="export failed"):
        export_safetensors(repository, manifest, tmp_path / "out", lambda _: None)

    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_untouched(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add("a", "master", random_tensor(8))
    repository, manifest = checkpoint.commit()
    (tmp_path / "mine.txt").write_text("keep")

    with pytest.raises(UsageError, match="export target is in use"):
        export_safetensors(repository, manifest, tmp_path, lambda _: None)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add("a", "master", random_tensor(8))
    repository, manifest = checkpoint.commit()

    with pytest.raises(UsageError, match="dtype=bf8"):
        export_safetensors(repository, manifest, tmp_path / "out", lambda _: None, dtype="bf8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="shard_bytes=0"):
        export_safetensors(repository, manifest, tmp_path / "out", lambda _: None, shard_bytes=0)


def test_a_missing_object_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.add("a", "master", random_tensor(8))
    repository, manifest = checkpoint.commit()
    checkpoint.store.delete(manifest.objects[0].key)

    with pytest.raises(ObjectMissingError, match=manifest.objects[0].key):
        export_safetensors(repository, manifest, tmp_path / "out", lambda _: None)

    assert list(tmp_path.iterdir()) == []


@given(data=st.data(), shape=st.sampled_from([(1,), (7,), (3, 5), (2, 2, 3)]))
def test_any_range_of_a_tensor_is_the_same_range_of_its_values(data: st.DataObject, shape: tuple[int, ...]) -> None:
    length = prod(shape)
    checkpoint = Checkpoint()
    checkpoint.add("w", "master", random_tensor(*shape), cut=data.draw(st.integers(0, length)))
    source = CheckpointSource(*checkpoint.commit(), lambda _: None)
    first = data.draw(st.integers(0, length))
    end = data.draw(st.integers(first, length))
    buffer = bytearray(4 * (end - first))

    source.read_into("w", "master", first, memoryview(buffer))

    assert bytes(buffer) == random_tensor(*shape).reshape(-1)[first:end].numpy().tobytes()
