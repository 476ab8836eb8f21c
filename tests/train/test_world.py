"""Real DeepSpeed worlds: the same losses for every expert-parallel size, twice the same bits, and right checkpoints."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest
from moc.plan.burden import Checkpoint, all_experts, rank_bytes
from moc.plan.cost import full_bytes, partial_bytes
from moc.plan.ownership import catalog_ownership, zero2_ownership
from moc.plan.scope import MOC_LAYOUT, Scope
from moc.plan.shapes import ModelShape
from moc.repository import Repository
from moc.state import RankCatalog, check_coverage, shard_order
from moc.store.open import open_store
from moc_train.compare import compare, read_lineage
from moc_train.runlog import read_records, surviving_steps
from tests.support.zygote import Zygote, run_world

pytestmark = [pytest.mark.world, pytest.mark.longest, pytest.mark.timeout(600)]  # the first test waits for three worlds

ROOT = Path(__file__).parents[2]
STEPS = 20
TOLERANCE = 1e-5
TOP_K = 2
DEADLINE_S = 240
TINY = [
    "checkpoint.enabled=false",
    "data.max_mb=0.3",
    "data.vocab_size=512",
    "data.sequence_length=32",
    "logging.tensorboard=false",
    "model.layers=2",
    "model.moe_layers=all",
    "model.width=32",
    "model.heads=2",
    "model.experts=8",
    f"model.top_k={TOP_K}",
    "model.expert_hidden=32",
    "training.micro_batch=2",
    "training.global_batch=8",
    "training.threads=1",
    "optimizer.lr=0.005",
    f"training.steps={STEPS}",
]


STORED = (  # large enough that alignment and headers do not matter
    "model.width=256",
    "model.experts=4",
    "model.expert_hidden=512",
    "model.ep_size=2",
    "training.steps=2",
    "checkpoint.enabled=true",
    "checkpoint.storage=repository",
    "checkpoint.persist_every=2",
)
PARTIAL = (
    "training.steps=10",
    "checkpoint.mode=partial",
    "checkpoint.k_persist=1",
    "checkpoint.persist_every=2",
    "checkpoint.keep_last=10",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    world_size: int
    name: str
    verb: str
    settings: tuple[str, ...]


SCENARIOS = (
    Scenario(world_size=1, name="one_rank", verb="train", settings=("model.ep_size=1",)),
    Scenario(world_size=2, name="two_ranks", verb="train", settings=("model.ep_size=1",)),
    Scenario(world_size=2, name="ep2", verb="train", settings=("model.ep_size=2",)),
    Scenario(world_size=2, name="ep2_again", verb="train", settings=("model.ep_size=2",)),
    Scenario(world_size=2, name="ep2_loop", verb="train", settings=("model.ep_size=2", "model.gmm=loop")),
    Scenario(world_size=2, name="bf16", verb="train", settings=("model.ep_size=2", "training.precision=bf16")),
    Scenario(world_size=2, name="bf16_again", verb="train", settings=("model.ep_size=2", "training.precision=bf16")),
    Scenario(
        world_size=2,
        name="bf16_optimizer",
        verb="train",
        settings=(
            "model.ep_size=2",
            "training.precision=bf16",
            "training.zero_stage=1",
            "training.gradient_dtype=fp32",
        ),
    ),
    Scenario(
        world_size=2,
        name="counted",
        verb="train",
        settings=(
            "model.ep_size=2",
            "model.moe_layers=odd",
            "checkpoint.enabled=true",
            "checkpoint.storage=repository",
            "checkpoint.persist_every=1",
            "checkpoint.keep_last=6",
            "training.steps=6",
        ),
    ),
    Scenario(world_size=2, name="saved", verb="checkpoint", settings=("model.ep_size=2",)),
    Scenario(
        world_size=2,
        name="saved_bf16",
        verb="checkpoint",
        settings=("model.ep_size=2", "training.precision=bf16", "model.moe_layers=odd"),
    ),
    Scenario(world_size=4, name="ep4", verb="train", settings=("model.ep_size=4",)),
    Scenario(world_size=4, name="ep2_replicated", verb="train", settings=("model.ep_size=2",)),
    Scenario(world_size=4, name="saved_replicated", verb="checkpoint", settings=("model.ep_size=2",)),
    Scenario(world_size=2, name="stored", verb="train", settings=STORED),
    Scenario(world_size=2, name="stored_partial", verb="train", settings=(*STORED, *PARTIAL)),
    Scenario(world_size=4, name="stored_replicated", verb="train", settings=STORED),
)


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


STORED_SHAPE = ModelShape(
    name="stored",
    layers=2,
    hidden=256,
    heads=2,
    vocabulary=512,
    ffn=0,
    moe_layers=2,
    experts=4,
    expert_ffn=512,
    top_k=2,
    tied=True,
    stacked=True,
)


@pytest.fixture(scope="module")
def worlds(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what each scenario left; one world of processes per number of ranks."""
    folder = tmp_path_factory.mktemp("worlds")
    for world_size in sorted({scenario.world_size for scenario in SCENARIOS}):
        plan = [
            {
                "verb": scenario.verb,
                "folder": str(folder / scenario.name),
                # The same batch per forward pass everywhere: the balance loss is a function of the micro-batch.
                "settings": [*TINY, f"data.cache={folder / 'cache'}", *settings_of(scenario, folder)],
            }
            for scenario in SCENARIOS
            if scenario.world_size == world_size
        ]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        words = run_world(
            zygote, "tests.train.world_worker", {"plan": plan}, ranks=world_size, folder=folder, environment=meeting
        )
        assert not words, words
    return folder


def settings_of(scenario: Scenario, folder: Path) -> list[str]:
    repository = f"checkpoint.storage={folder / scenario.name / 'repository'}"
    return [repository if word.startswith("checkpoint.storage=") else word for word in scenario.settings]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in surviving_steps(read_records(folder / "rank00000.jsonl")).values()]


@pytest.mark.parametrize("name", ["two_ranks", "ep2", "ep2_loop", "ep4", "ep2_replicated"])
def test_every_expert_parallel_size_gives_the_same_loss_curve(worlds: Path, name: str) -> None:
    expected, actual = losses(worlds / "one_rank"), losses(worlds / name)

    assert len(actual) == STEPS
    assert expected[-1] < expected[0] - 0.3  # it does learn
    assert max(abs(a - b) for a, b in zip(expected, actual, strict=True)) < TOLERANCE


@pytest.mark.parametrize(("one", "other"), [("ep2", "ep2_again"), ("bf16", "bf16_again")])
def test_the_same_run_gives_the_same_bits(worlds: Path, one: str, other: str) -> None:
    comparison = compare(read_lineage(worlds / one), read_lineage(worlds / other))

    assert comparison.is_equal, comparison.differences
    assert comparison.equal_steps == STEPS


@pytest.mark.parametrize("name", ["bf16", "bf16_optimizer"])
def test_bf16_follows_the_fp32_curve(worlds: Path, name: str) -> None:
    expected, actual = losses(worlds / "one_rank"), losses(worlds / name)

    assert max(abs(a - b) for a, b in zip(expected, actual, strict=True)) < 0.1


def test_all_ranks_log_the_same_losses_and_loads(worlds: Path) -> None:
    ranks = [surviving_steps(read_records(path)) for path in sorted((worlds / "ep4").glob("rank*.jsonl"))]

    assert len(ranks) == 4
    for key in ("loss_hex", "load", "lr", "grad_norm"):
        assert len({json.dumps([record[key] for record in steps.values()]) for steps in ranks}) == 1


def test_the_counters_have_every_route_of_every_step(worlds: Path) -> None:
    repository = Repository(open_store(str(worlds / "counted" / "repository")))
    manifests = [repository.read_manifest(checkpoint.name) for checkpoint in repository.checkpoints()]
    repository.close()

    assert manifests[-1].name.step == 6
    assert len(manifests) > 1
    for manifest in manifests:
        routing = manifest.routing
        assert routing is not None
        assert routing.basis == "kept"
        assert routing.shape == (8,)
        assert [sum(row) for row in routing.routed] == [manifest.name.step * 8 * 32 * TOP_K]
        assert routing.learned == routing.routed
    loads = [record["load"][0] for record in surviving_steps(read_records(worlds / "counted/rank00000.jsonl")).values()]
    first = manifests[0].routing
    assert first is not None
    if manifests[0].name.step == 1:  # what the trainer itself has logged
        assert max(first.routed[0]) / (sum(first.routed[0]) / 8) == pytest.approx(loads[0])


@pytest.mark.parametrize("name", ["saved", "saved_bf16", "saved_replicated"])
def test_deepspeeds_own_checkpoint_restores_the_model(worlds: Path, name: str) -> None:
    reports: list[dict[str, Any]] = [json.loads(path.read_text()) for path in (worlds / name).glob("report*.json")]

    assert reports
    for report in reports:
        assert report["different_before"]
        assert report["full"]
        assert report["module_only"]
        assert report["actual"] == report["expected"]


def test_deepspeeds_own_checkpoint_has_a_file_per_global_expert(worlds: Path) -> None:
    files = {path.name for path in (worlds / "saved" / "saved").glob("layer_*_expert_*")}

    assert files == {
        f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt" for layer in (0, 1) for expert in range(8)
    }


@pytest.mark.parametrize(("name", "world_size"), [("stored", 2), ("stored_replicated", 4)])
def test_a_checkpoint_is_as_large_as_the_plan_says_and_holds_every_element_once(
    worlds: Path, name: str, world_size: int
) -> None:
    own = zero2_ownership(STORED_SHAPE, world_size, 2)
    job = Checkpoint(shape=STORED_SHAPE, ownership=own, layout=MOC_LAYOUT, scope=Scope(), is_cut=True)
    planned = rank_bytes(job, all_experts(own), "adaptive").tolist()
    repository = Repository(open_store(str(worlds / name / "repository")))

    manifest = repository.read_manifest(repository.checkpoints()[-1].name)
    headers = [repository.read_header(row) for row in manifest.objects]
    shards = [stored.shard for header in headers for stored in header.shards]
    written = [sum(row.size_bytes for row in manifest.objects if rank_of(row.key) == r) for r in range(world_size)]
    repository.close()

    assert manifest.name.step == 2
    check_coverage(shards)
    catalogs = [
        RankCatalog(
            rank=rank,
            shards=tuple(sorted((s.shard for h in headers if h.rank == rank for s in h.shards), key=shard_order)),
            state_capacity_bytes=0,
        )
        for rank in range(world_size)
    ]
    shown = catalog_ownership(catalogs, range(STORED_SHAPE.moe_layers), experts=STORED_SHAPE.experts, ep=2)
    assert shown is not None
    assert (shown.slices == own.slices * MOC_LAYOUT.total).all(), "so ranks take turns as the plan says"
    assert sum(shard.size_bytes for shard in shards) == sum(planned) == full_bytes(STORED_SHAPE, MOC_LAYOUT)
    assert written == pytest.approx(planned, rel=0.01)
    assert sum(written) == pytest.approx(sum(planned), rel=0.01)


def test_a_partial_checkpoint_writes_as_much_as_the_formula_says(worlds: Path) -> None:
    repository = Repository(open_store(str(worlds / "stored_partial" / "repository")))
    manifests = [repository.read_manifest(stored.name) for stored in repository.checkpoints()]
    repository.close()
    is_partial = {manifest.name: bool(manifest.stale_experts) for manifest in manifests}

    assert set(is_partial.values()) == {True, False}  # the first one is whole, and so is what the job leaves behind
    for manifest in manifests:
        k = 1 if is_partial[manifest.name] else STORED_SHAPE.experts
        planned = partial_bytes(STORED_SHAPE, MOC_LAYOUT, Scope(), k)
        assert own_bytes(manifest) == pytest.approx(planned, rel=0.01), manifest.name


def own_bytes(manifest: Manifest) -> int:
    return sum(row.size_bytes for row in manifest.objects if parse_object_key(row.key)[0] == manifest.name)


def rank_of(key: str) -> int:
    return parse_object_key(key)[1]


def run_script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(ROOT / "moc_train" / "pretrain.py"), *words],
        env=clean,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_script_runs_without_a_launcher_and_a_fault_kills_it_inside_its_step(worlds: Path, tmp_path: Path) -> None:
    words = [*TINY, f"data.cache={worlds / 'cache'}", f"logging.folder={tmp_path}"]

    result = run_script(tmp_path, *words, "faults.kill_rank=0", "faults.kill_step=4")

    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert losses(tmp_path) == losses(worlds / "one_rank")[:3]


def test_the_script_refuses_a_bad_setting_before_anything_starts(tmp_path: Path) -> None:
    result = run_script(tmp_path, "model.widht=3")

    assert result.returncode == 2
    assert result.stderr.startswith("pretrain.py: unknown key model.widht (did you mean width?)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["data.corpus=[missing.txt]"], "corpus file cannot be read path=missing.txt"),
        pytest.param(
            ["model.gmm=grouped_gemm", "training.precision=bf16"],
            "model.gmm grouped_gemm needs a cuda accelerator",
            marks=pytest.mark.slow,  # its line takes the way of the one before
        ),
    ],
)
def test_the_script_says_in_one_line_what_is_missing(tmp_path: Path, settings: list[str], named: str) -> None:
    result = run_script(tmp_path, *TINY, f"data.cache={tmp_path / 'cache'}", *settings)

    assert result.returncode == 2
    assert f"pretrain.py: {named}" in result.stderr
    assert "Traceback" not in result.stderr
