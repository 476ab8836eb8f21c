"""Real DeepSpeed engines in real worlds: what is captured, copied and restored continues bit for bit."""

from __future__ import annotations

import pytest

from tests.adapters.scenarios import DEFAULT, SLOW
from tests.adapters.worlds import Results, run_cases
from tests.support.zygote import Zygote

pytestmark = [pytest.mark.world, pytest.mark.timeout(320)]

OTHER_PROCESSES = "2ranks-bf16-zero1-cpu_adam-native-gas1-warmup-offload-round_robin_gradients"
REWOUND = "2ranks-bf16-zerobf16-fused-stacked-gas1-multistep-skip"
RESUMED = {ranks: [f"resume:{s.name}" for s in DEFAULT if s.ranks == ranks] for ranks in (2, 4)}
SLOWLY_RESUMED = {ranks: [f"resume:{s.name}" for s in SLOW if s.ranks == ranks] for ranks in (2, 4)}
SINGLE = [
    "forced",
    "frozen",
    "hooks",
    "loaded",
    "moved",
    "partial",
    "powers:cpu_adam",
    "powers:fused_adam",
    "refusals",
    "reshard:native",
    "reshard:stacked",
    f"rewind:{REWOUND}",
    "routes",
    f"save:{OTHER_PROCESSES}",
    "stateful",
    "world",
]
BATCH = 12  # cases per world in the slow tier, so that no world outlives its timeout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def two_ranks(zygote: Zygote, folder) -> Results:
    return run_cases(zygote, folder, 2, [*SINGLE, *RESUMED[2]])


@pytest.fixture(scope="module")
def four_ranks(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_cases(zygote, tmp_path_factory.mktemp("four"), 4, RESUMED[4])


@pytest.mark.parametrize("case", RESUMED[2])
def test_attached_and_restored_runs_equal_the_undisturbed_run(two_ranks: Results, case: str) -> None:
    assert two_ranks[case] == "ok"


@pytest.mark.parametrize("case", RESUMED[4])
def test_attached_and_restored_runs_equal_the_undisturbed_run_on_four_ranks(four_ranks: Results, case: str) -> None:
    assert four_ranks[case] == "ok"


@pytest.mark.parametrize("case", SINGLE)
def test_case_holds_in_a_world_of_two(two_ranks: Results, case: str) -> None:
    assert two_ranks[case] == "ok"


def test_fresh_processes_continue_exactly(zygote: Zygote, folder, two_ranks: Results) -> None:
    assert two_ranks[f"save:{OTHER_PROCESSES}"] == "ok"

    results = run_cases(zygote, folder, 2, [f"load:{OTHER_PROCESSES}"])

    assert results[f"load:{OTHER_PROCESSES}"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "batch"),
    [(ranks, batch) for ranks, cases in SLOWLY_RESUMED.items() for batch in range(-(-len(cases) // BATCH))],
)
def test_every_combination_resumes(zygote: Zygote, tmp_path, ranks: int, batch: int) -> None:
    cases = SLOWLY_RESUMED[ranks][batch * BATCH : (batch + 1) * BATCH]
    results = run_cases(zygote, tmp_path, ranks, cases)

    assert results == dict.fromkeys(cases, "ok")
