"""Checkpoints of real DeepSpeed worlds, exported and loaded by scripts that know nothing of moc."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from moc.adapters.export.deepspeed import export_deepspeed
from moc.adapters.export.safetensors import export_safetensors
from moc.repository import Repository
from moc.store.local import LocalStore
from tests.export.models import EXPERTS, Scenario
from tests.export.scenarios import DEFAULT, FOUR_RANKS, SLOW
from tests.export.worlds import run_plain
from tests.support.zygote import Zygote, run_world

pytestmark = pytest.mark.world

TIERS = {"default": (DEFAULT, 2), "slow": (SLOW, 2), "four": (FOUR_RANKS, 4)}
CASES = [
    pytest.param((tier, scenario), id=f"{tier}-{scenario.name}", marks=() if tier == "default" else pytest.mark.slow)
    for tier, (scenarios, _) in TIERS.items()
    for scenario in scenarios
]
UNRECORDED = ("ds_config", "moc", "buffer_names")
# DeepSpeed's own slices are those of another order under round_robin_gradients; its elastic form of the optimizer state
# is for a number of ranks that changes, and engines with that option load the other form as well.
UNLIKE = {"round_robin_gradients": "param_slice_mappings", "elastic_checkpoint": "base_optimizer_state"}


class Worlds:
    """The folders of a tier's scenarios after both worlds have run; made when first asked for."""

    def __init__(self, zygote: Zygote, root: Path) -> None:
        self._zygote, self._root = zygote, root
        self._done: set[str] = set()

    def folder(self, tier: str, scenario: Scenario) -> Path:
        if tier not in self._done:
            scenarios, ranks = TIERS[tier]
            root = self._root / tier
            root.mkdir()
            names = [s.name for s in scenarios]
            spec = {"folder": str(root), "scenarios": names}
            words = run_world(self._zygote, "tests.export.source_job", spec, ranks=ranks, folder=root)
            assert not words, words
            for name in names:
                repository = Repository(LocalStore(root / name / "repository"))
                manifest = repository.read_manifest(repository.checkpoints()[0].name)
                export_deepspeed(repository, manifest, root / name / "ours", lambda _: None)
                export_safetensors(repository, manifest, root / name / "weights", lambda _: None, shard_bytes=3000)
            run_plain("tests.export.plain_job", str(root), *names, ranks=ranks)
            self._done.add(tier)
        return self._root / tier / scenario.name


@pytest.fixture(scope="module")
def worlds(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(zygote, tmp_path_factory.mktemp("export"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, worlds: Worlds) -> tuple[Scenario, Path, int]:
    tier, scenario = request.param
    return scenario, worlds.folder(tier, scenario), TIERS[tier][1]


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False, map_location="cpu")


def differences(expected: object, actual: object, path: str = "") -> Iterator[str]:
    """Yield the path of everything that is not bitwise equal."""
    match expected, actual:
        case torch.Tensor(), torch.Tensor():
            same = (expected.dtype, expected.shape) == (actual.dtype, actual.shape) and torch.equal(expected, actual)
        case dict(), dict():
            same = expected.keys() == actual.keys()
            for key in expected.keys() & actual.keys():
                yield from differences(expected[key], actual[key], f"{path}/{key}")
        case (list(), list()) | (tuple(), tuple()):
            same = len(expected) == len(actual)
            for i, (left, right) in enumerate(zip(expected, actual, strict=False)):
                yield from differences(left, right, f"{path}/{i}")
        case _ if type(expected).__module__.startswith("deepspeed") and hasattr(expected, "__dict__"):
            same = type(expected) is type(actual)
            yield from differences(vars(expected), vars(actual), path)
        case _:
            same = type(expected) is type(actual) and expected == actual
    if not same:
        yield f"{path}: expected={str(expected)[:200]} actual={str(actual)[:200]}"


def test_every_file_holds_what_deepspeed_itself_would_have_written(case: tuple[Scenario, Path, int]) -> None:
    scenario, folder, _ = case
    unlike = tuple(f"/optimizer_state_dict/{UNLIKE[option]}" for option, _ in scenario.options if option in UNLIKE)

    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        for root in (folder / "theirs", folder / "ours")
    ]

    assert names[0] == names[1]
    assert (folder / "theirs/latest").read_text() == (folder / "ours/latest").read_text()
    for name in (name for name in names[0] if name.endswith(".pt")):
        theirs, ours = (
            {k: v for k, v in load(folder / root / name).items() if k not in UNRECORDED} for root in ("theirs", "ours")
        )
        assert [line for line in differences(theirs, ours) if not line.startswith(unlike)] == [], name


def test_a_plain_script_trains_on_with_the_same_losses(case: tuple[Scenario, Path, int]) -> None:
    _, folder, ranks = case

    for rank in range(ranks):
        expected, seen = load(folder / f"expected{rank}.pt"), load(folder / f"seen{rank}.pt")

        assert list(differences(expected["at"], seen["at"])) == []
        assert torch.equal(expected["logits"], seen["logits"])
        assert seen["losses"] == expected["losses"][-len(seen["losses"]) :]
        assert list(differences(expected["after"], seen["after"])) == []
        assert seen["client_state"]["stateful"]["position"]["where"] == (1.5, None)


def test_weights_alone_give_the_same_logits(case: tuple[Scenario, Path, int]) -> None:
    _, folder, ranks = case

    for rank in range(ranks):
        expected, seen = load(folder / f"expected{rank}.pt"), load(folder / f"seen{rank}.pt")["module_only"]

        assert torch.equal(expected["logits"], seen["logits"])
        assert seen["steps"] == 0
        for master, loaded in zip(expected["at"]["masters"], seen["masters"], strict=True):
            model = torch.bfloat16 if "bf16" in folder.name else torch.float32
            assert torch.equal(master.to(model).float(), loaded)


def test_safetensors_hold_the_weights_that_the_ranks_had(case: tuple[Scenario, Path, int]) -> None:
    scenario, folder, ranks = case
    stored = read_weights(folder / "weights")

    known = set()
    for rank in range(ranks):
        for name, weight in globally_named(load(folder / f"expected{rank}.pt")["at"], scenario, rank).items():
            known.add(name)
            assert stored[name].dtype == weight.dtype
            assert torch.equal(stored[name], weight), name

    assert known == stored.keys()


def test_safetensors_give_a_model_without_expert_parallelism_the_same_logits(case: tuple[Scenario, Path, int]) -> None:
    scenario, folder, ranks = case

    for rank in range(ranks):
        expected, whole = load(folder / f"expected{rank}.pt")["logits"], load(folder / f"seen{rank}.pt")["whole"]

        # Tokens meet an expert in batches of another size, which rounds products differently.
        tolerance = 1e-5 if scenario.dtype == "fp32" else 2e-2
        torch.testing.assert_close(whole, expected, rtol=tolerance, atol=tolerance)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    return found


def globally_named(seen: dict[str, Any], scenario: Scenario, rank: int) -> dict[str, torch.Tensor]:
    """Return a rank's weights and persistent buffers under the names of a model with expert-parallel size 1."""
    native = "deepspeed_moe.experts.deepspeed_experts."
    first = rank % scenario.ep_size * (EXPERTS // scenario.ep_size)
    named = {}
    for name, tensor in (seen["weights"] | seen["buffers"]).items():
        prefix, _, rest = name.partition(native)
        if rest:
            local, _, parameter = rest.partition(".")
            named[f"{prefix}{native}{first + int(local)}.{parameter}"] = tensor
        elif name.rpartition(".")[2] in ("w1", "w2", "w3"):
            prefix, _, parameter = name.rpartition(".")
            named |= {f"{prefix}.{native}{first + i}.{parameter}": row for i, row in enumerate(tensor)}
        else:
            named[name] = tensor
    return named
