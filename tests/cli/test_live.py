"""Verbs that talk to a node agent, with a real agent and a process that stands for a trainer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moc.agent.saves import OUTCOME_LIMIT
from tests.cli.console import clean_env, moc, moc_json
from tests.support.job import Job, until

TRAINER = """
import sys
from pathlib import Path
from moc.agent.client import AgentClient
client = AgentClient.connect(Path(sys.argv[1]), timeout_s=10)
client.hello(rank=0, incarnation=1)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def runtime_root() -> Iterator[Path]:
    """A runtime root with a path that is short enough for sockets; its agents are stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="moc-") as folder:
        root = Path(folder) / "rt"
        yield root
        for _ in range(4):
            if moc("agent", "status", "--runtime-root", root).returncode == 0:
                for agent in moc_json("status", "--runtime-root", root)["agents"]:
                    moc("agent", "stop", "--run-id", agent["run"], "--runtime-root", root)


def test_without_an_agent_there_is_nothing_to_tell(runtime_root: Path) -> None:
    for arguments in (("status",), ("status", "--run-id", "run-7"), ("agent", "status"), ("agent", "stop")):
        result = moc(*arguments, "--runtime-root", runtime_root)

        assert result.returncode == 1
        assert "no agent answers" in result.stderr


def test_an_agent_is_started_shown_and_stopped(runtime_root: Path) -> None:
    started = moc_json("agent", "start", "--run-id", "run-7", "--idle", "60", "--runtime-root", runtime_root)
    again = moc("agent", "start", "--run-id", "run-7", "--idle", "60", "--runtime-root", runtime_root)
    (status,) = moc_json("status", "--runtime-root", runtime_root)["agents"]
    text = moc("agent", "status", "--runtime-root", runtime_root)
    stopped = moc_json("agent", "stop", "--runtime-root", runtime_root)

    assert (started["run"], started["action"], again.returncode) == ("run-7", "started", 0)
    assert {
        "folder",
        "run",
        "pid",
        "incarnation",
        "ranks",
        "global_step",
        "last_committed_step",
        "persisting",
        "arena_bytes",
        "versions",
        "counters",
        "last_error",
    } <= set(status)
    assert (status["run"], status["ranks"]) == ("run-7", [])
    assert text.stdout.startswith("run ")
    assert (stopped["run"], stopped["action"]) == ("run-7", "stopped")
    assert moc("status", "--runtime-root", runtime_root).returncode == 1


def test_of_several_agents_one_must_be_named(runtime_root: Path) -> None:
    for run_id in ("run-7", "run-8"):
        moc("agent", "start", "--run-id", run_id, "--idle", "60", "--runtime-root", runtime_root)

    unnamed = moc("agent", "stop", "--runtime-root", runtime_root)
    one = moc_json("status", "--run-id", "run-8", "--runtime-root", runtime_root)
    both = moc_json("status", "--runtime-root", runtime_root)

    assert unnamed.returncode == 2
    assert "run-7,run-8" in unnamed.stderr
    assert [agent["run"] for agent in one["agents"]] == ["run-8"]
    assert [agent["run"] for agent in both["agents"]] == ["run-7", "run-8"]


def test_rewind_is_refused_while_the_job_lives(damaged: Path, runtime_root: Path) -> None:
    folder = moc_json("agent", "start", "--run-id", "run-7", "--idle", "60", "--runtime-root", runtime_root)["folder"]
    with _trainer(folder):
        refused = moc("rewind", "--step", "20", "-r", damaged, "--runtime-root", runtime_root)
        (status,) = moc_json("status", "--runtime-root", runtime_root)["agents"]
        kept = len(list((damaged / "incarnations").iterdir()))
        forced = moc("rewind", "--step", "20", "--force", "-r", damaged, "--runtime-root", runtime_root)

    assert refused.returncode == 1
    assert "ranks=0" in refused.stderr
    assert "--force" in refused.stderr
    assert [(row["rank"], row["alive"]) for row in status["ranks"]] == [(0, True)]
    assert kept == 3
    assert forced.returncode == 0


def test_an_agent_without_living_ranks_does_not_prevent_a_rewind(damaged: Path, runtime_root: Path) -> None:
    moc("agent", "start", "--run-id", "run-7", "--idle", "60", "--runtime-root", runtime_root)

    result = moc("rewind", "--step", "20", "-r", damaged, "--runtime-root", runtime_root)

    assert result.returncode == 0, result.stderr


@contextmanager
def _trainer(folder: str) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_env(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.communicate(timeout=30)


def test_without_an_agent_there_is_still_a_metric(runtime_root: Path) -> None:
    result = moc("status", "--prometheus", "--runtime-root", runtime_root)
    both = moc("status", "--prometheus", "--json", "--runtime-root", runtime_root)

    assert result.returncode == 1
    assert "\nmoc_agents 0.0\n" in result.stdout
    assert both.returncode == 2


def test_metrics_tell_what_the_status_tells() -> None:
    with Job(size=2, persist_every=1, step_s=0.001) as job:
        life = job.start()
        life.event("committed", step=1)
        until(lambda: _saves(job) > OUTCOME_LIMIT, "more saves than an agent remembers")
        life.kill()
        until(lambda: not _status(job)["persisting"], "the end of the last save")
        status = _status(job)
        text = moc("status", "--prometheus", "--runtime-root", job.root).stdout

    samples = {
        (sample.name, sample.labels.get("rank")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["moc_agents", None] == samples["moc_agent_info", None] == 1
    assert samples["moc_saves_total", None] == status["counters"]["saves"] > OUTCOME_LIMIT
    assert samples["moc_saves_failed_total", None] == status["counters"]["failed"]
    assert samples["moc_global_step", None] == status["global_step"]
    assert samples["moc_committed_step", None] == status["last_committed_step"]
    assert samples["moc_arena_bytes", None] == status["arena_bytes"]
    assert samples["moc_persisting", None] == 0
    for row in status["ranks"]:
        rank = str(row["rank"])
        assert samples["moc_rank_alive", rank] == 0
        assert samples["moc_rank_sealed_step", rank] == row["sealed_step"]
        assert samples["moc_rank_beat_age_seconds", rank] > 0


def test_lost_tokens_are_told_and_too_many_alarm() -> None:
    options: dict[str, object] = {"mode": "partial_by_load", "k_persist": 1, "keep_last": 1, "persist_every": 3}
    with Job(size=1, step_s=0.005, witness=True, plt_limit=1e-6, **options) as job:
        first = job.start()
        first.event("committed", step=7)  # the first of a life is whole, this one is not
        job.kill_agent()
        first.kill()
        second = job.start()
        plt = second.event("attached")["plt_now"]
        second.event("global", step=second.event("attached")["step"] + 1)
        text = moc("status", "--runtime-root", job.root).stdout
        second.kill()
        routing = _status(job)["routing"]
        metrics = moc("status", "--prometheus", "--runtime-root", job.root).stdout
        alarms = [line for line in second.errors[0].read_text().splitlines() if "too many tokens are lost" in line]

    samples = {
        (sample.name, sample.labels.get("layer")): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    assert plt > routing["plt"] > 1e-6  # the share falls while the run goes on
    assert "TOO MANY" in text
    assert len(alarms) == 1, second.story()
    assert routing["basis"] == "kept"
    assert (samples["moc_plt", None], samples["moc_plt_limit", None]) == (routing["plt"], 1e-6)
    for layer in range(2):
        assert samples["moc_routes", str(layer)] == routing["routed"][layer]
        assert samples["moc_routes_lost", str(layer)] == routing["lost"][layer] > 0


def _status(job: Job) -> dict[str, Any]:
    return job.ask_agent("status")[0]


def _saves(job: Job) -> int:
    return int(_status(job)["counters"]["saves"])
