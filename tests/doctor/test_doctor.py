"""`moc doctor` on real jobs: living, stopped, hung, half dead, gone; and where there is nothing at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moc.agent.runtime import runtime_folder
from moc.agent.stacks import SIGNAL, StackDump, collect_stacks
from moc.clock import SystemClock
from moc.doctor.bundle import Bundle
from moc.doctor.collect import collect
from moc.doctor.judge import judge
from moc.doctor.report import secrets_to_hide
from tests.cli.console import moc
from tests.support.job import Job, until

HANGING = """
import ctypes, sys, threading
from pathlib import Path
from moc.agent.stacks import StackDump
dump = StackDump(Path(sys.argv[1]), "rank00000")
threading.Thread(target=threading.Event().wait, name="waits", daemon=True).start()
def hang_in_foreign_code():
    while True:
        ctypes.PyDLL(None).pause()  # does not let go of the interpreter's lock
print("hangs", flush=True)
hang_in_foreign_code()
"""


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """A job of two ranks that trains while the tests of this module look at it."""
    with Job(size=2, step_s=0.02, persist_every=20) as running:
        life = running.start()
        life.event("committed", step=20)
        yield running


def examine(job: Job, output: Path, *arguments: object) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the summary and the files of a bundle."""
    result = moc(
        "doctor", "--json", "-o", output, "-r", job.storage, "--runtime-root", job.root, "--timeout", "4", *arguments
    )
    assert result.returncode in (0, 1), result.stderr
    return json.loads(result.stdout), read_bundle(output)


def read_bundle(path: Path) -> dict[str, str]:
    assert path.stat().st_mode & 0o777 == 0o600
    found = {}
    with tarfile.open(path) as bundle:
        for member in bundle:
            stream = bundle.extractfile(member)
            assert stream is not None
            found[member.name.partition("/")[2]] = stream.read().decode()
    return found


def texts(summary: dict[str, Any], severity: str) -> str:
    return "\n".join(s["text"] for s in summary["symptoms"] if s["severity"] == severity)


def stacks(files: dict[str, str], name: str) -> str:
    return next(text for path, text in files.items() if f"/stacks/{name}-" in path)


def test_a_bundle_of_a_living_job_holds_what_its_table_of_contents_says(job: Job, tmp_path: Path) -> None:
    life = job.lives[0]
    summary, files = examine(job, tmp_path / "bundle.tar.gz")
    place = f"agents/{job.run}"
    status, diagnosis = (json.loads(files[f"{place}/{name}.json"]) for name in ("status", "diagnosis"))
    node = json.loads(files["node.json"])

    assert texts(summary, "problem") == ""
    assert [row["rank"] for row in status["ranks"]] == [0, 1]
    assert diagnosis["descriptor"]["config"]["persist_every"] == 20
    assert diagnosis["descriptor"]["storage"] == str(job.storage)
    assert {row["span"] for row in diagnosis["spans"]} >= {"save.persist", "commit.put", "store.fsync"}
    assert [row["error"] for row in diagnosis["saves"]] == [None] * len(diagnosis["saves"])
    ranks = diagnosis["arena"]["ranks"]
    assert [row["corrupt"] for row in ranks] == [[], []]
    assert all(seal["incarnation"] == 1 for row in ranks for seal in row["seals"].values())
    assert "in serve" in stacks(files, "agent")
    for rank in (0, 1):
        assert "in _copy_loop" in stacks(files, f"rank{rank:05d}"), "all threads"
        assert "worker.py" in stacks(files, f"rank{rank:05d}")
    assert {row["pid"] for row in json.loads(files[f"{place}/processes.json"])} >= {life.pid(0), life.pid(1)}
    assert "agent listens" in files[f"{place}/agent.log"]
    assert sum(name.startswith("records/manifests/") for name in files) >= 1
    assert sum(name.startswith("records/incarnations/") for name in files) == 1
    assert json.loads(files["repository.json"])["checked"][0]["findings"] == []
    assert node["cpu"]["checksum_kernels"]
    assert node["versions"]["torch"]
    assert json.loads(files["summary.json"])["symptoms"] == summary["symptoms"]
    at = life.newest_step("step")
    life.event("step", step=at + 3)  # nobody was disturbed
    life.exact()


def test_a_stopped_agent_is_named_and_the_rest_is_collected(job: Job, tmp_path: Path) -> None:
    pid = job.agent_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        summary, files = examine(job, tmp_path / "bundle.tar.gz")
    finally:
        os.kill(pid, signal.SIGCONT)

    assert f"the agent does not answer: run={job.run} pid={pid} state=stopped" in texts(summary, "problem")
    assert any(s["hint"] == f"kill -CONT {pid}" for s in summary["symptoms"])
    assert "stopped" in stacks(files, "agent")
    assert "worker.py" in stacks(files, "rank00000"), "trainers answer without it"
    assert "agent listens" in files[f"agents/{job.run}/agent.log"]
    assert any(name.startswith("records/manifests/") for name in files)
    assert json.loads(files[f"agents/{job.run}/status.json"])["silence"]


def test_a_trainer_that_hangs_in_a_collective_is_seen_where_it_hangs(job: Job, tmp_path: Path) -> None:
    life = job.lives[0]
    life.signal(signal.SIGSTOP, 1)
    try:
        until(lambda: "in all_gather" in ask(job.runtime, "rank00000"), "rank 0 waits for rank 1")
        summary, files = examine(job, tmp_path / "bundle.tar.gz")
    finally:
        life.signal(signal.SIGCONT, 1)

    assert f"a trainer is stopped: run={job.run} pid={life.pid(1)}" in texts(summary, "problem")
    assert "in boundary" in stacks(files, "rank00000")
    assert "in all_gather" in stacks(files, "rank00000")
    assert "no answer within" in stacks(files, "rank00001")
    at = life.newest_step("step")
    life.event("step", step=at + 3)


def ask(folder: Path, name: str) -> str:
    """Return the stacks of one process."""
    reports = collect_stacks(folder, clock=SystemClock(), timeout_s=1)
    return next((report.text for report in reports if report.name == name), "")


def test_ranks_that_ended_while_others_live_are_named(tmp_path: Path) -> None:
    with Job(size=2, step_s=0.01) as job:
        life = job.start()
        life.event("global", step=2)
        life.signal(signal.SIGSTOP, 0)  # it must not see the end of the other
        life.kill(1)
        summary, _ = examine(job, tmp_path / "bundle.tar.gz")

    assert "ranks have ended while others live" in texts(summary, "problem")
    assert "ended=[1] alive=[0]" in texts(summary, "problem")


def test_without_anything_there_is_a_bundle_and_no_complaint(tmp_path: Path) -> None:
    result = moc("doctor", "--runtime-root", tmp_path / "none", cwd=tmp_path)
    (bundle,) = tmp_path.glob("moc-doctor-*.tar.gz")

    assert result.returncode == 0, result.stderr
    assert "note: no agent has lived under this runtime root" in result.stdout
    assert {"README.txt", "node.json", "summary.json", "repository.json"} <= set(read_bundle(bundle))


def test_a_repository_that_is_not_there_or_not_sound_is_a_symptom(tmp_path: Path, damaged: Path) -> None:
    options = ("--runtime-root", tmp_path / "none", "-o")
    absent = moc("doctor", *options, tmp_path / "1.tar.gz", "-r", tmp_path / "absent")
    next((damaged / "incarnations").iterdir()).write_text("{}")
    max((damaged / "objects").glob("*/*/*-d.safetensors")).unlink()
    wrong = moc("doctor", *options, tmp_path / "2.tar.gz", "-r", damaged)

    assert (absent.returncode, wrong.returncode) == (1, 1)
    assert "warning: there is no repository" in absent.stdout
    assert "problem: a record is unreadable" in wrong.stdout
    assert "problem: a checkpoint is not sound" in wrong.stdout


@pytest.mark.parametrize("kind", ["file", "link", "folder is missing"])
def test_a_bundle_is_written_to_a_free_name_only(tmp_path: Path, kind: str) -> None:
    victim, output = tmp_path / "victim", tmp_path / "bundle.tar.gz"
    victim.write_text("precious")
    match kind:
        case "file":
            output.write_text("precious")
        case "link":
            output.symlink_to(victim)
        case _:
            output = tmp_path / "no" / "bundle.tar.gz"

    result = moc("doctor", "--runtime-root", tmp_path / "none", "-o", output)

    assert result.returncode == 2, result.stderr
    assert victim.read_text() == "precious"
    assert not output.exists() or output.read_text() == "precious"


def test_a_runtime_root_of_somebody_else_is_not_looked_into(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "run-1").mkdir(parents=True)
    (theirs / "run-1" / "agent.log").write_text("their words")
    theirs.chmod(0o755)

    result = moc("doctor", "--runtime-root", theirs, "-o", tmp_path / "bundle.tar.gz")

    assert result.returncode == 1
    assert "part=agents UsageError: runtime folder is not private" in result.stdout
    assert not any("their words" in text for text in read_bundle(tmp_path / "bundle.tar.gz").values())


class HangingFileSystem(MemoryFileSystem):
    """A storage that does not answer until the test is over."""

    protocol = "hanging"
    is_over = threading.Event()

    def info(self, path: str, **_: object) -> dict[str, object]:
        self.is_over.wait(60)
        raise FileNotFoundError(path)


def test_a_storage_that_hangs_costs_its_own_part_only(tmp_path: Path) -> None:
    fsspec.register_implementation("hanging", HangingFileSystem, clobber=True)
    try:
        facts = collect(
            storage="hanging://place/run", run_id=None, root=tmp_path / "none", clock=SystemClock(), timeout_s=0.5
        )
    finally:
        HangingFileSystem.is_over.set()

    assert facts.troubles == {"repository": "not finished within 0 s"}
    assert facts.node["versions"]["moc"]
    assert any("storage does not answer" in symptom.text for symptom in judge(facts))


# Secrets


def test_whatever_goes_into_a_bundle_goes_through_its_gate(tmp_path: Path) -> None:
    facts = collect(
        storage="memory://me:Hunter2/hunter2@place/run",
        run_id=None,
        root=tmp_path / "none",
        clock=SystemClock(),
        timeout_s=10,
    )
    secrets = secrets_to_hide(facts)
    texts = ["quoted: Hunter2/hunter2", "escaped: Hunter2%2Fhunter2", "s3://a:Hunter2@b/c", "api_key=Hunter2"]
    with Bundle(tmp_path / "bundle.tar.gz", folder="f", secrets=secrets, epoch_s=0.0) as bundle:
        bundle.add_text("text", "\n".join(texts))
        bundle.add_json("json", {"rows": texts, "Hunter2/hunter2": 1, "password": "Hunter2"})
    files = read_bundle(tmp_path / "bundle.tar.gz")

    assert {"text", "json"} == set(files)
    assert "unter2" not in files["text"]
    assert "unter2" not in files["json"]
    assert json.loads(files["json"])["password"] == "***"


def test_a_bundle_that_cannot_be_finished_is_not_left_behind(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "bundle.tar.gz", folder="f", secrets=(), epoch_s=0.0)
    with pytest.raises(RuntimeError, match="half-way"), bundle:
        raise RuntimeError("half-way")

    assert list(tmp_path.iterdir()) == []


# Stacks


def test_a_process_that_holds_the_interpreters_lock_in_foreign_code_shows_its_stacks(tmp_path: Path) -> None:
    folder = runtime_folder("run-1", tmp_path / "rt")
    with subprocess.Popen([sys.executable, "-c", HANGING, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        until(lambda: "in hang_in_foreign_code" in ask(folder, "rank00000"), "it hangs")
        first, second = (collect_stacks(folder, clock=SystemClock(), timeout_s=10) for _ in range(2))
        process.kill()

    for (report,) in (first, second):
        assert (report.name, report.pid, report.problem) == ("rank00000", process.pid, None)
        assert report.text.count("Stack (most recent call first)") == 1, "each time anew, at once where it hangs"
        assert "in hang_in_foreign_code" in report.text


def test_the_signal_is_harmless_before_and_after_and_a_handler_of_the_users_own_stays(tmp_path: Path) -> None:
    folder = runtime_folder("run-1", tmp_path / "rt")
    heard: list[int] = []
    os.kill(os.getpid(), SIGNAL)
    dump = StackDump(folder, "rank00000")
    (report,) = collect_stacks(folder, clock=SystemClock(), timeout_s=10)
    dump.close()
    dump.close()
    os.kill(os.getpid(), SIGNAL)
    former = signal.signal(SIGNAL, lambda number, _: heard.append(number))
    try:
        other = StackDump(folder, "rank00000")
        os.kill(os.getpid(), SIGNAL)
        assert collect_stacks(folder, clock=SystemClock(), timeout_s=1) == []
        other.close()
    finally:
        signal.signal(SIGNAL, former)

    assert "in test_the_signal_is_harmless" in report.text
    assert heard == [SIGNAL]
    assert list(folder.glob("stacks-*")) == []


def test_a_file_of_a_dead_process_is_told_from_a_living_one_with_its_number(tmp_path: Path) -> None:
    folder = runtime_folder("run-1", tmp_path / "rt")
    for name in (f"stacks-rank00000-{os.getpid()}-12345.txt", f"stacks-rank00001-{2**22 - 1}-12345.txt"):
        (folder / name).touch()
    reports = collect_stacks(folder, clock=SystemClock(), timeout_s=1)

    with contextlib.closing(StackDump(folder, "rank00000")):
        left = sorted(path.name for path in folder.glob("stacks-*"))

    assert [report.problem for report in reports] == ["has ended", "has ended"]
    assert len(left) == 2, "its own, and that of another rank"
    assert f"stacks-rank00000-{os.getpid()}-12345.txt" not in left
