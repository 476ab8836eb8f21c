"""`moc run` where everything ends with it: as the first process of a PID namespace, and told to drain."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from moc.repository import Repository
from moc.store.open import open_store
from moc.verify import verify_repository
from tests.cli.console import DEADLINE_S, MOC, clean_env, moc, moc_json
from tests.support.job import Job, until

REPOSITORY = Path(__file__).parents[2]
WORKER = REPOSITORY / "tests" / "crash" / "worker.py"
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")

LINGERING = """
import os
if os.fork() == 0:
    if os.fork() == 0:
        while os.getppid() != 1:  # until the process in the middle has ended
            os.sched_yield()
        print(os.getpid(), flush=True)
    os._exit(0)
os.wait()
"""

REAPED = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
orphan = int(child.stdout.readline())
for _ in range(1_000_000):
    if not os.path.exists(f"/proc/{orphan}"):  # a zombie is still there
        print("reaped by", os.getppid())
        break
    os.sched_yield()
child.wait()
"""


def _can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


namespace = pytest.mark.skipif(not _can_unshare(), reason="this user may not make a PID namespace")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one job lives."""

    folder: Path
    root: Path

    @property
    def repo(self) -> Path:
        return self.folder / "repo"

    @property
    def log(self) -> Path:
        return self.folder / "worker.log"

    def worker(self, **options: object) -> list[str]:
        """Return a command that trains without torch; nothing is persisted before the end."""
        settings = {"rank": 0, "size": 1, "steps": 1_000_000, "persist-every": 0, "step-s": 0.002, **options}
        places = {"rendezvous": self.folder / "rv", "storage": self.repo, "root": self.root, "log": self.log}
        words = [f"--{name}={value}" for name, value in (settings | places).items()]
        return [sys.executable, str(WORKER), *words]

    def events(self, kind: str) -> list[dict[str, object]]:
        if not self.log.exists():
            return []
        whole = self.log.read_text().rpartition("\n")[0].splitlines()
        return [event for event in map(json.loads, whole) if event["event"] == kind]

    def newest(self, kind: str) -> int:
        return max((int(str(event["step"])) for event in self.events(kind)), default=0)

    def committed(self) -> int:
        """Return the newest checkpoint's step; all of them must be sound."""
        repository = Repository(open_store(str(self.repo)))
        assert verify_repository(repository, read_data_fraction=1.0).all_findings == ()
        steps = [stored.name.step for stored in repository.checkpoints()]
        repository.close()
        return max(steps, default=0)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="moc-") as folder:
        yield Place(tmp_path, Path(folder) / "rt")
        moc("agent", "stop", "--runtime-root", Path(folder) / "rt")


@contextmanager
def _started(place: Place, *arguments: object, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run `moc run`; what is left at the end is killed."""
    words = [*prefix, MOC, "run", "--runtime-root", str(place.root), "--max-restarts", "0", *map(str, arguments)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place.folder, env=clean_env()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _first_process(process: subprocess.Popen[str]) -> int:
    """Return the number, out here, of the process that is number 1 in the namespace."""

    def child() -> int:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(listed[0]) if listed else 0

    return int(until(child, "the first process of the namespace"))


@namespace
def test_as_the_first_process_a_crashed_job_is_drained_before_the_container_ends(place: Place) -> None:
    with _started(place, "--", *place.worker(), prefix=NAMESPACE) as process:
        until(lambda: place.newest("global") >= 10, "a snapshot")
        worker = int(str(place.events("attached")[0]["pid"]))  # its number in there
        inside = ["nsenter", "-t", str(_first_process(process)), "-p", "-m", "kill", "-9", str(worker)]
        subprocess.run(inside, check=True)
        _, talk = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 128 + signal.SIGKILL
    assert "drained: last_committed_step=" in talk
    assert place.committed() >= place.newest("global") >= 10
    assert not _agent_answers(place)


@namespace
def test_as_the_first_process_sigterm_reaches_the_job_and_everything_is_stored(place: Place) -> None:
    with _started(place, "--", *place.worker(), prefix=NAMESPACE) as process:
        until(lambda: place.newest("global") >= 3, "a snapshot")
        os.kill(_first_process(process), signal.SIGTERM)
        _, talk = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 0, talk
    assert place.committed() == place.newest("terminated") == place.newest("step") > 0


@namespace
def test_as_the_first_process_orphans_are_reaped(place: Place) -> None:
    with _started(place, "--", sys.executable, "-c", REAPED, LINGERING, prefix=NAMESPACE) as process:
        output, talk = process.communicate(timeout=DEADLINE_S)

    assert (output, process.returncode) == ("reaped by 1\n", 0), talk


def test_elsewhere_the_agent_stays_with_what_it_holds(place: Place) -> None:
    with _started(place, "--", *place.worker()) as process:
        until(lambda: place.newest("global") >= 3, "a snapshot")
        os.kill(int(str(place.events("attached")[0]["pid"])), signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)

    assert _agent_answers(place)
    assert place.committed() == 0


def test_told_to_drain_it_does_so_at_the_end(place: Place) -> None:
    with _started(place, "--drain", "30", "--", *place.worker()) as process:
        until(lambda: place.newest("global") >= 3, "a snapshot")
        os.kill(int(str(place.events("attached")[0]["pid"])), signal.SIGKILL)
        _, talk = process.communicate(timeout=DEADLINE_S)

    assert "drained: last_committed_step=" in talk
    assert not _agent_answers(place)
    assert place.committed() >= place.newest("global") >= 3


def test_an_agent_in_the_foreground_serves_the_job_and_is_not_drained_with_it(place: Place) -> None:
    words = [MOC, "agent", "start", "--foreground", "--run-id", "side", "--runtime-root", str(place.root)]
    with subprocess.Popen(words, env=clean_env(), stderr=subprocess.DEVNULL) as agent:
        until(lambda: _agent_answers(place), "the agent listens")
        with _started(place, "--drain", "30", "--", *place.worker(**{"run-id": "side"})) as process:
            until(lambda: place.newest("global") >= 3, "a snapshot")
            (status,) = moc_json("status", "--runtime-root", place.root)["agents"]
            os.kill(int(str(place.events("attached")[0]["pid"])), signal.SIGKILL)
            _, talk = process.communicate(timeout=DEADLINE_S)
        still = moc_json("status", "--runtime-root", place.root)["agents"]
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(DEADLINE_S) == 0

    assert status["pid"] == agent.pid
    assert [row["pid"] for row in still] == [agent.pid]
    assert "draining" not in talk
    assert place.committed() >= place.newest("global") >= 3


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_batch_systems_are_passed_on_and_mean_nothing(number: signal.Signals, place: Place) -> None:
    script = f"trap 'echo told; exit 3' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    with _started(place, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, talk = process.communicate(timeout=DEADLINE_S)

    assert (output, process.returncode) == ("told\n", 3)
    assert "restarts used up" in talk, "a failure like any other"


# The documentation's recipes


def _blocks(language: str) -> list[str]:
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _moc_words() -> list[list[str]]:
    """Return the moc commands of the manifests and job scripts in the documentation, as words."""
    found = []
    for manifest in (document for block in _blocks("yaml") for document in yaml.safe_load_all(block)):
        spec = manifest["spec"]["template"]["spec"]
        found += [c["command"] + c.get("args", []) for c in [*spec["containers"], *spec.get("initContainers", [])]]
    for script in _blocks("sh"):
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "moc" in words:
                found.append(words[words.index("moc") :])
    return found


def test_the_documented_manifests_and_scripts_are_well_formed() -> None:
    assert len(_blocks("yaml")) >= 2
    assert len(_blocks("sh")) >= 1
    for script in _blocks("sh"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for block in _blocks("yaml"):
        for manifest in yaml.safe_load_all(block):
            spec = manifest["spec"]["template"]["spec"]
            words = spec["containers"][0]["command"]
            limits = {name: float(value) for name, value in itertools.pairwise(words) if name in ("--grace", "--drain")}
            assert spec["terminationGracePeriodSeconds"] > limits["--grace"] + limits.get("--drain", 0.0)


def test_the_documented_commands_are_accepted(place: Place) -> None:
    words = [command for command in _moc_words() if command[1] == "run"]
    assert len(words) >= 3
    for command in words:
        options = command[2 : command.index("--")]
        for name in ("--runtime-root", "-r", "--trace"):
            if name in options:
                options[options.index(name) + 1] = str(place.root if name == "--runtime-root" else place.folder / "x")

        result = moc("run", *options, "--", "true", cwd=place.folder)

        assert result.returncode == 0, result.stderr


def _agent_answers(place: Place) -> bool:
    return moc("status", "--runtime-root", place.root).returncode == 0


@pytest.mark.parametrize("agent_first", [True, False])
def test_sigterm_to_every_process_of_a_step_stores_the_last_step(agent_first: bool) -> None:
    """As Slurm signals a step: the agent begins to leave while the ranks still want their last save from it."""
    with Job(size=2, persist_every=0, step_s=0.002) as job:
        life = job.start()
        life.event("global", step=5)
        agent = job.agent_pid()
        assert agent is not None
        order = [agent, life.pid(0), life.pid(1)] if agent_first else [life.pid(1), life.pid(0), agent]
        for pid in order:
            os.kill(pid, signal.SIGTERM)

        life.finished()
        until(lambda: job.agent_pid() is None, "the end of the last agent")

        ended = life.last(0, "terminated")
        assert ended is not None
        assert max(job.committed_steps()) == ended["step"] == life.newest_step("step")
        job.sound()
