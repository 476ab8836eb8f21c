"""`moc plan` and `moc simulate` as a user runs them."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from moc.cli.main import main
from moc.cli.modelfile import read_fields
from tests.cli.console import moc, moc_json

PAPER = ("--model", "gpt-350m-16e", "--layout", "paper", "--k-persist", 1)
MODEL = {
    "name": "own",
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "vocabulary": 100,
    "ffn": 64,
    "moe_layers": 1,
    "experts": 4,
    "expert_ffn": 64,
    "top_k": 2,
}
MEASURED = [
    *("--snapshot-every", 4, "--persist-every", 12, "--save-s", 0.2, "--persist-s", 0.6, "--copy-s", 0.1),
    *("--write-s", 1, "--load-memory-s", 1, "--load-storage-s", 3),
]


@pytest.mark.parametrize(
    ("parts", "size", "published"),
    [("w", "master_full", 0.88), ("o", "master_full", 0.54), ("wo", "master_full", 0.42), ("wo", "strict", 0.19)],
)
def test_plan_reproduces_the_papers_sizes(parts: str, size: str, published: float) -> None:
    report = moc_json("plan", *PAPER, "--dp", 8, "--ep", 8, "--parts", parts, "--size", size)

    assert round(report["size_ratio"], 2) == published
    sizes = report["bottleneck_bytes"]
    assert sizes["baseline"] > sizes["equal"] >= sizes["adaptive"] >= report["lower_bound_bytes"]
    assert report["max_over_lower_bound"] == sizes["adaptive"] / report["lower_bound_bytes"]


def test_plan_tells_everything_it_promises() -> None:
    report = moc_json("plan", "--model", "qwen3-30b-a3b", "--dp", 64, "--ep", 16, "--k-snapshot", 64, "--k-persist", 8)

    assert set(report) == {
        "model",
        "ranks",
        "inputs",
        "size_ratio",
        "bottleneck_bytes",
        "lower_bound_bytes",
        "max_over_lower_bound",
        "levels",
        "cost",
        "memory",
        "advice",
        "formulas",
    }
    assert report["ranks"] == {"dp": 64, "ep": 16, "edp": 4}
    assert [report["levels"][name]["k"] for name in ("snapshot", "persist")] == [64, 8]
    assert report["memory"]["arena_bytes_per_node"] == 8 * report["memory"]["arena_bytes_per_rank"]
    assert report["cost"]["stall_s"] == max(0.0, report["cost"]["copy_s"] - report["inputs"]["fb_s"])
    assert set(report["formulas"]) <= {*report, *report["cost"], *report["memory"], "arena_bytes"}


def test_plan_of_671b_on_16384_ranks_takes_less_than_a_second() -> None:
    arguments = ("plan", "--model", "deepseek-v3", "--dp", 16384, "--ep", 64, "--k-persist", 32)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = moc_json(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert report["max_over_lower_bound"] <= 1.01


def test_plan_advises_no_k_whose_manifest_would_be_too_long() -> None:
    """An order of N / K checkpoints makes a manifest name the objects of so many."""
    small, large = (
        moc_json("plan", "--model", "deepseek-v3", "--dp", dp, "--ep", 64, "--k-persist", 16) for dp in (16384, 65536)
    )

    assert large["levels"]["persist"]["manifest_objects"] == 65536 + 16 * 65536
    assert small["advice"]["k_persist"] == 1 < 16 < large["advice"]["k_persist"] <= 32


@pytest.mark.parametrize("ep", [8, 128])
def test_plan_of_64_layers_and_128_experts_on_4096_ranks_takes_less_than_three_seconds(tmp_path: Path, ep: int) -> None:
    path = tmp_path / "model.json"
    path.write_text(
        json.dumps(MODEL | {"layers": 64, "moe_layers": 64, "experts": 128, "hidden": 2048, "expert_ffn": 768})
    )

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    moc_json("plan", "--model", path, "--dp", 4096, "--ep", ep, "--k-persist", 16)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


def test_plan_is_readable_in_80_columns_and_logs_its_inputs() -> None:
    result = moc("plan", *PAPER, "--dp", 16, "--ep", 8)

    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "eq. 10" in result.stdout
    assert "link_gbps=25" in result.stderr
    assert "mtbf_hours=3125" in result.stderr


def test_a_model_file_may_be_yaml_or_json(tmp_path: Path) -> None:
    latent = {"q_rank": 8, "kv_rank": 8, "nope": 16, "rope": 8, "value": 16}
    (tmp_path / "m.json").write_text(json.dumps(MODEL | {"stacked": True, "latent": latent}))
    lines = ["---", "# a model", *(f"{name}: {value}  # why" for name, value in MODEL.items()), "", "stacked: true"]
    lines += ["latent:", *(f"  {name}: {value}" for name, value in latent.items()), "gated: true"]
    (tmp_path / "m.yaml").write_text("\n".join(lines))

    assert read_fields(str(tmp_path / "m.yaml")) == MODEL | {"stacked": True, "latent": latent, "gated": True}
    report = moc_json("plan", "--model", tmp_path / "m.yaml", "--dp", 4, "--ep", 2)
    assert report == moc_json("plan", "--model", tmp_path / "m.json", "--dp", 4, "--ep", 2)
    assert report["model"]["name"] == "own"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.yaml", "name: x\nname: y", "line=2 given='name: y'"),
        ("m.yaml", "  name: x", "line=1"),
        ("m.yaml", "layers: 2\n  heads: 3", "line=2"),
        ("m.yaml", "!!python/object:os.system x", "line=1"),
        ("m.yaml", "\n".join(f"{n}: {v}" for n, v in (MODEL | {"layers": "two"}).items()), "given='two' allowed=int"),
        ("m.yaml", "", "field=name"),
        ("m.json", "[1]", "given=list"),
        ("m.json", "{", "file="),
        ("m.json", "[" * 100_000, "file="),
    ],
)
def test_a_bad_model_file_is_named_with_the_line(
    tmp_path: Path, name: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(text)

    code = main(["plan", "--model", str(path), "--dp", "4", "--ep", "2"])

    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--k-persist", 17), "k_persist=17 allowed=1..16"),
        (("--k-snapshot", 0), "k_snapshot=0 allowed=1..16"),
        (("--k-snapshot", 2, "--k-persist", 3), "k_persist=3 allowed=1..2"),
        (("--ep", 3), "ep=3 dp=16"),
        (("--ep", 32, "--dp", 32), "ep=32 experts=16"),
        (("--dp", 1 << 21), "dp=2097152 allowed=1..1048576"),
        (("--dp", 0), "dp=0 allowed=at least 1"),
        (("--model", "gpt-6"), "model=gpt-6 allowed=gpt-125m-8e"),
        (("--model", "absent.yaml"), "file=absent.yaml"),
        (("--link-gbps", 0), "link=0 allowed=1000.."),
        (("--mtbf-hours", "nan"), "mtbf_s=nan allowed=1.."),
        (("--ranks-per-node", 17), "given=17 allowed=1..16"),
        (("--versions", 1), "versions=1 allowed=at least 2"),
    ],
)
def test_plan_names_a_bad_value_and_what_is_allowed(
    change: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*map(str, ("plan", "--model", "gpt-350m-16e", "--dp", 16, "--ep", 8, *change))])

    talk = capsys.readouterr().err
    assert code == 2
    assert message in talk
    assert talk.count("\n") == 1


def test_simulate_is_repeatable_and_the_seed_matters() -> None:
    arguments = ("simulate", "--model", "deepseek-v3", "--dp", 98304, "--ep", 64, "--trials", 5)

    first, again, other = moc_json(*arguments), moc_json(*arguments), moc_json(*arguments, "--seed", 1)

    assert first == again
    assert first != other
    rows = {row["name"]: row for row in first["schemes"]}
    assert list(rows) == ["blocking", "async", "moc-paper", "full"]
    assert rows["blocking"]["goodput"] < rows["async"]["goodput"] < rows["full"]["goodput"] < 1
    assert rows["moc-paper"]["plt"] > 0
    assert rows["full"]["plt"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--trials", 0), "trials=0 allowed=1..100000"),
        (("--days", 0), "days=0.0 allowed"),
        (("--node-share", 2), "node_share=2.0 allowed=0..1"),
        (("--mtbf-hours", 0.0003), "too many faults"),
        (("--seed", -1), "seed=-1"),
        (("--save-s", 1), "missing: --snapshot-every --persist-every --persist-s"),
        ((*MEASURED, "--snapshot-every", 0), "snapshot_every=0 allowed=1.."),
        ((*MEASURED, "--load-storage-s", "nan"), "load_storage_s=nan allowed=0.."),
        (("--faults", "5p,5n"), "faults=5p,5n allowed="),
        (("--faults", "5x"), "faults=5x allowed="),
        (("--faults", ""), "faults= allowed="),
    ],
)
def test_simulate_names_a_bad_value_and_what_is_allowed(
    change: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*map(str, ("simulate", "--model", "gpt-350m-16e", "--dp", 16, "--ep", 8, *change))])

    assert code == 2
    assert message in capsys.readouterr().err


def test_simulate_plays_a_measured_scheme_through_scheduled_faults() -> None:
    inputs = ("--fb-s", 1.9, "--restart-s", 9, "--days", 200 / 86400, "--faults", "61p,122.5n")

    report = moc_json("simulate", "--model", "gpt-350m-16e", "--dp", 2, "--ep", 2, *inputs, *MEASURED)

    # A step takes 2 s: 30 steps, of which 28 are kept; 25 more, of which storage has the 48th; 32 more.
    row = report["schemes"][-1]
    assert (row["name"], row["faults"], row["step_s"]) == ("measured", 2, pytest.approx(2.0))
    assert row["lost_steps_per_fault"] == (2 + 5) / 2
    assert row["goodput"] == pytest.approx((48 + 32) * 1.9 / 200)


def test_simulate_prints_a_table_in_80_columns() -> None:
    result = moc("simulate", "--model", "gpt-350m-16e", "--dp", 16, "--ep", 8, "--mtbf-hours", 2, "--trials", 5)

    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "seed=0" in result.stderr
