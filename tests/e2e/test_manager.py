"""Promises of `CheckpointManager` in real worlds: refusals, detaching, chosen steps, termination, world sizes."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moc import Config
from moc.errors import ConfigError
from moc.report import reasons_for_drift
from tests.e2e.launch import Job, Life
from tests.e2e.matrix import Case
from tests.support.zygote import Zygote

pytestmark = [pytest.mark.world, pytest.mark.timeout(600)]

SHARED = (
    "attach_twice",
    "unsupported_engine",
    "detached_engine",
    "chosen_steps",
    "loaded_checkpoint",
    "stepped_engine",
    "other_experiment",
    "strange_objects",
    "bad_storage",
    "one_bad_rank",
    "failed_save",
    "counted_routes",
    "destroyed_engine",
    "failed_hooking",
)
SIGTERM_CASE = Case(
    model="grouped", zero="2", dtype="bf16", ranks=2, accumulation=1, optimizer="adamw", skips=True, boundary="step",
    killed="all", source="storage",
)  # fmt: skip


@pytest.fixture(scope="module")
def shared_world(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """One world of two ranks in which all behaviours have run, or all up to the first that failed."""
    with Job(zygote, tmp_path_factory.mktemp("shared")) as job:
        life = job.start("shared", 2, {"behaviours": SHARED})
        life.ended(deadline_s=240.0)
        yield life


@pytest.mark.parametrize("name", SHARED)
def test_behaviour_holds(shared_world: Life, name: str) -> None:
    for rank in range(2):
        verdicts = {event["name"]: event["verdict"] for event in shared_world.events(rank, "behaviour")}

        assert verdicts.get(name) == "ok", f"rank {rank}: {verdicts.get(name, 'not reached')}\n{shared_world.story()}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SIGTERM_CASE, id="step"),
        pytest.param(replace(SIGTERM_CASE, model="dense", boundary="hook"), id="hook", marks=pytest.mark.slow),
    ],
)
def test_termination_saves_and_the_next_life_goes_on_from_there(case: Case, zygote: Zygote, tmp_path: Path) -> None:
    steps = 40
    common = {"case": asdict(case), "steps": steps, "persist_every": 1000}
    with Job(zygote, tmp_path) as job:
        plain = job.start("plain", 2, {**common, "is_attached": False, "seed": 1})
        plain.finished()
        lives = []
        for name, resumed, ranks in (("first", 0, (0, 1)), ("second", 10, (1,))):  # of a node's ranks, and of one alone
            life = job.start(name, 2, {**common, "is_attached": True, "seed": 1 + len(lives)})
            lives.append(life)
            assert life.event("attached")["step"] >= resumed, life.story()
            life.event("step", step=resumed + 10)

            life.signal(signal.SIGTERM, *ranks)

            assert life.ended() == [-signal.SIGTERM] * 2, life.story()
            job.kill_agents()
        last = job.start("last", 2, {**common, "is_attached": True, "seed": 9})
        last.finished()

        attached = last.event("attached")
        assert attached["source"] == "storage"
        for rank in range(2):
            lineage: list[dict] = []
            for life in (*lives, last):
                resumed = life.event("attached", rank)["step"]
                assert resumed == (lineage[-1]["step"] if lineage else 0), (
                    "the step of the save is the step of the next life"
                )
                lineage += life.events(rank, "step")
            expected = plain.events(rank, "step")
            assert [(e["step"], e["losses"], e["ids"]) for e in lineage] == [
                (e["step"], e["losses"], e["ids"]) for e in expected
            ]
            assert last.event("final", rank)["digests"] == plain.event("final", rank)["digests"]


def test_other_world_sizes_take_over_every_tensor(zygote: Zygote, tmp_path: Path) -> None:
    with Job(zygote, tmp_path) as job:
        seen = []
        for name, ranks in (("two", 2), ("four", 4), ("again", 2)):
            life = job.start(name, ranks, {"behaviours": ["resharded"]})
            if ranks == 4:  # it kills itself, for a recovery from memory
                assert life.ended() == [-signal.SIGKILL] * 4, life.story()
            else:
                life.finished()
            seen.append((life.event("resharded"), life.event("trained")))
            assert life.event("resharded", ranks - 1)["before"] == seen[-1][0]["before"]

    (two, two_trained), (four, four_trained), (again, _) = seen
    assert (two["resumed"], four["resumed"], again["resumed"]) == (0, 4, 8)
    assert (four["source"], again["source"]) == ("storage", "memory")
    assert four["before"] == two_trained["after"]
    assert again["before"] == four_trained["after"]
    assert (four["used"], again["used"]) == (two_trained["used"], four_trained["used"])
    assert any("w1" in key for key in two["before"]), "expert weights are part of the comparison"
    for report, sizes in ((four, "stored=2 present=4"), (again, "stored=4 present=2")):
        assert any("not bit-exact" in note and sizes in note for note in report["notes"]), report["notes"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("snapshot_every", 0),
        ("persist_every", -1),
        ("versions", 1),
        ("versions", 9),
        ("keep_last", 0),
        ("keep_every", -1),
        ("memory_budget_bytes", 0),
        ("timeout_s", 0),
        ("plt_limit", 0),
        ("plt_limit", 1.5),
        ("plt_limit", -0.1),
        ("plt_limit", float("nan")),
        ("mode", "half"),
        ("k_snapshot", 2),
        ("k_persist", 2),
        ("replicas", -1),
        ("persist_every", "often"),
        ("snapshot_every", True),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
    ],
)
def test_config_refuses_a_value_by_name_and_says_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.*allowed="):
        Config(**{name: value})


def test_report_names_every_version_that_has_changed() -> None:
    reasons = reasons_for_drift(
        stored_ranks=2, ranks=2, stored_software={"moc": "1", "torch": "2.12"}, software={"moc": "1", "torch": "2.13"}
    )

    assert reasons == ("a version has changed, so the run may not be bit-exact: torch stored='2.12' present='2.13'",)


def test_config_refuses_unknown_settings_by_name() -> None:
    with pytest.raises(ConfigError, match="snapshot_evry"):
        Config(snapshot_evry=1)  # type: ignore[call-arg]


def test_config_refuses_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"persist_every=5 allowed=a multiple of snapshot_every=2"):
        Config(snapshot_every=2, persist_every=5)


@pytest.mark.parametrize(
    ("k_snapshot", "k_persist", "words"),
    [
        (0, None, "k_snapshot=0 allowed=1..the experts of a layer, or None"),
        (None, 0, "k_persist=0 allowed=1..the experts of a layer, or None"),
        (4, 5, "k_persist=5 allowed=1..k_snapshot=4"),
        (4, None, "k_persist=None allowed=1..k_snapshot=4"),
        (4, 0, "k_persist=0 allowed=1..k_snapshot=4"),
    ],
)
def test_config_refuses_numbers_of_experts_that_do_not_fit_each_other(
    k_snapshot: int | None, k_persist: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        Config(mode="partial", k_snapshot=k_snapshot, k_persist=k_persist)


@pytest.mark.parametrize("mode", ["partial", "partial_by_load"])
@pytest.mark.parametrize(("k_snapshot", "k_persist"), [(None, None), (None, 3), (4, 4), (4, 1)])
def test_config_takes_numbers_of_experts_in_the_partial_modes(
    mode: str, k_snapshot: int | None, k_persist: int | None
) -> None:
    config = Config(mode=mode, k_snapshot=k_snapshot, k_persist=k_persist)

    assert (config.k_snapshot, config.k_persist) == (k_snapshot, k_persist)
