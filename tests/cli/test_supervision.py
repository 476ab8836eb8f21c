"""Supervision with real processes: restarts, crash loops, signals, hangs, orphans."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.errors import UsageError
from moc.store.local import LocalStore
from moc.supervise import DELAY_LIMIT_S, LOOP_LIVES, GiveUp, Limits, Restart, decide
from tests.cli.console import DEADLINE_S, MOC, clean_env, moc
from tests.support.repository import RepositoryBuilder

REPOSITORY = Path(__file__).parents[2]

TRAIN = """
import sys
from pathlib import Path
from moc.store.local import LocalStore
from tests.support.repository import RepositoryBuilder

builder = RepositoryBuilder(LocalStore(Path(sys.argv[1])))
if not builder.repository.checkpoints():
    builder.begin(1)
step = 10 + max((c.name.step for c in builder.repository.checkpoints()), default=0)
builder.commit(1, step)
sys.exit(0 if step >= int(sys.argv[2]) else 9)
"""

SAVER = """
import os, signal, sys, threading
asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
print("ready", os.getpid(), flush=True)
asked.wait()
threading.Event().wait(0.5)  # the save
print("saved", flush=True)
sys.exit(int(sys.argv[1]))
"""

ORPHAN = """
import os, sys
before = os.getpid()
if os.fork() == 0:
    if os.fork() == 0:
        while os.getppid() != int(sys.argv[1]):  # until the process in the middle has ended
            os.sched_yield()
        print("adopted", os.getpid(), flush=True)
        os._exit(0)
    os._exit(0)
os.wait()
sys.stdin.read()
"""

SILENT = """
import sys
from moc.supervise import Limits, supervise
limits = Limits(max_restarts=1, hang_timeout_s=0.2, delay_s=0.01)
say = lambda text: print(text, file=sys.stderr, flush=True)
code = supervise(sys.argv[1:], limits=limits, newest_step=lambda: None, last_beat_s=lambda: 99.0, say=say)
sys.exit(code)
"""


@pytest.fixture
def runtime_root(tmp_path: Path) -> Path:
    """A folder without agents: those of other jobs on this machine are none of a test's business."""
    return tmp_path / "runtime"


def test_three_lives_without_progress_are_a_crash_loop(tmp_path: Path, runtime_root: Path) -> None:
    result = _run(tmp_path, runtime_root, "--", "sh", "-c", "echo life; exit 7")

    assert result.returncode == 7
    assert result.stdout == "life\n" * LOOP_LIVES
    assert "giving up: crash loop" in result.stderr


def test_lives_that_commit_are_restarted_until_the_work_is_done(tmp_path: Path, runtime_root: Path) -> None:
    result = _run(tmp_path, runtime_root, "--", sys.executable, "-c", TRAIN, tmp_path / "checkpoints", "60")

    assert result.returncode == 0, result.stderr
    assert result.stderr.count("restart ") == 5
    assert "exit_code=9 step_before=20 step_after=30" in result.stderr


def test_restarts_are_counted(tmp_path: Path, runtime_root: Path) -> None:
    result = _run(
        tmp_path, runtime_root, "--max-restarts", "2", "--", sys.executable, "-c", TRAIN, tmp_path / "checkpoints", "60"
    )

    assert result.returncode == 9
    assert "restarts used up: max_restarts=2" in result.stderr
    assert len(RepositoryBuilder(LocalStore(tmp_path / "checkpoints")).repository.checkpoints()) == 3


def test_a_command_that_dies_of_a_signal_counts_as_128_and_its_number(tmp_path: Path, runtime_root: Path) -> None:
    result = _run(tmp_path, runtime_root, "--max-restarts", "0", "--", "sh", "-c", "kill -9 $$")

    assert result.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(("command", "code"), [("/nonexistent/program", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_start_is_not_restarted(
    command: str, code: int, tmp_path: Path, runtime_root: Path
) -> None:
    result = _run(tmp_path, runtime_root, "--", command)

    assert result.returncode == code
    assert "restart" not in result.stderr


def test_the_command_gets_the_repository_and_its_own_options(tmp_path: Path, runtime_root: Path) -> None:
    result = _run(
        tmp_path, runtime_root, "-r", "here", "--", "sh", "-c", 'echo "$MOC_STORAGE" "$@"', "sh", "-r", "--json"
    )

    assert result.stdout == "here -r --json\n"


@pytest.mark.parametrize("code", [0, 5])
def test_sigterm_is_passed_on_and_the_save_is_waited_for(code: int, tmp_path: Path, runtime_root: Path) -> None:
    with _started(tmp_path, runtime_root, "--", sys.executable, "-c", SAVER, str(code)) as process:
        assert _line(process).startswith("ready")

        process.send_signal(signal.SIGTERM)
        output, talk = process.communicate(timeout=DEADLINE_S)

    assert output == "saved\n"
    assert process.returncode == code
    assert "restart" not in talk


def test_workers_may_save_after_their_launcher_has_gone(tmp_path: Path, runtime_root: Path) -> None:
    launcher = f'trap "exit 143" TERM; {sys.executable} -c "$1" 0 & wait'
    with _started(tmp_path, runtime_root, "--", "sh", "-c", launcher, "sh", SAVER) as process:
        assert _line(process).startswith("ready")

        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_S)

    assert output == "saved\n"
    assert process.returncode == 143


def test_whoever_does_not_end_in_time_is_killed(tmp_path: Path, runtime_root: Path) -> None:
    stubborn = "trap '' TERM; (trap '' TERM; while :; do sleep 1; done) & echo ready $!; while :; do sleep 1; done"
    with _started(tmp_path, runtime_root, "--grace", "0.3", "--", "sh", "-c", stubborn) as process:
        worker = int(_line(process).split()[1])

        process.send_signal(signal.SIGTERM)
        _, talk = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 128 + signal.SIGKILL
    assert "did not end in time" in talk
    assert not Path(f"/proc/{worker}").exists()


def test_a_second_signal_ends_the_wait(tmp_path: Path, runtime_root: Path) -> None:
    stubborn = "trap 'echo told' TERM; echo ready; while :; do sleep 0.1; done"
    with _started(tmp_path, runtime_root, "--", "sh", "-c", stubborn) as process:
        assert _line(process) == "ready\n"

        process.send_signal(signal.SIGTERM)
        assert _line(process) == "told\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 128 + signal.SIGKILL


def test_a_signal_during_the_delay_prevents_the_restart(tmp_path: Path, runtime_root: Path) -> None:
    with _started(tmp_path, runtime_root, "--delay", "1000", "--", "sh", "-c", "echo life; exit 3") as process:
        assert process.stderr is not None
        assert "restart 1" in process.stderr.readline()

        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_S)

    assert output == "life\n"
    assert process.returncode == 3


def test_workers_of_a_dead_launcher_are_killed_before_the_next_life(tmp_path: Path, runtime_root: Path) -> None:
    launcher = "sleep 1000 & echo $!; exit 4"
    result = _run(tmp_path, runtime_root, "--max-restarts", "1", "--", "sh", "-c", launcher)

    workers = [int(line) for line in result.stdout.split()]

    assert result.returncode == 4
    assert len(workers) == 2
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_orphans_are_adopted_and_reaped(tmp_path: Path, runtime_root: Path) -> None:
    script = f'exec {sys.executable} -c "$1" $PPID'
    with _started(tmp_path, runtime_root, "--", "sh", "-c", script, "sh", ORPHAN) as process:
        adopted = int(_line(process).split()[1])

        _wait_until_reaped(adopted)
        process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 0


@pytest.mark.skipif(shutil.which("unshare") is None or os.getuid() != 0, reason="needs a PID namespace of its own")
def test_it_can_be_the_first_process_of_a_container(tmp_path: Path, runtime_root: Path) -> None:
    inner = f'{MOC} run --runtime-root {runtime_root} -- sh -c "(sleep 0.2 & exec true) & echo first is \\$PPID; wait"'
    result = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", f"exec {inner}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_env(),
        timeout=DEADLINE_S,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout == "first is 1\n"


def test_a_silent_command_is_restarted() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SILENT, "sh", "-c", "echo life; exec sleep 1000"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=DEADLINE_S,
        check=False,
    )

    assert result.stdout == "life\nlife\n", result.stderr
    assert result.returncode == 128 + signal.SIGTERM
    assert result.stderr.count("the command hangs") == 2


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 40))
def test_decisions_are_bounded_and_give_up_exactly_when_they_should(advanced: list[bool], max_restarts: int) -> None:
    limits = Limits(max_restarts=max_restarts)

    verdict = decide(advanced, limits)

    is_loop = len(advanced) >= LOOP_LIVES and not any(advanced[-LOOP_LIVES:])
    if is_loop or len(advanced) > max_restarts:
        assert isinstance(verdict, GiveUp)
        assert ("crash loop" in verdict.reason) == is_loop
    else:
        assert isinstance(verdict, Restart)
        assert 0 < verdict.delay_s <= DELAY_LIMIT_S


@pytest.mark.parametrize("wrong", [{"max_restarts": -1}, {"grace_s": 0.0}, {"hang_timeout_s": 0.0}, {"delay_s": -1.0}])
def test_impossible_limits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Limits(**{"max_restarts": 1, **wrong})  # type: ignore[arg-type]


def _run(cwd: Path, runtime_root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(REPOSITORY)}
    return moc("run", "--runtime-root", runtime_root, *_quick(arguments), cwd=cwd, env=environment)


@contextmanager
def _started(cwd: Path, runtime_root: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [MOC, "run", "--runtime-root", str(runtime_root), *map(str, _quick(arguments))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=clean_env(),
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _quick(arguments: tuple[object, ...]) -> tuple[object, ...]:
    return arguments if "--delay" in arguments else ("--delay", "0.01", *arguments)


def _wait_until_reaped(pid: int) -> None:
    """Return when the process is gone; a zombie is not."""
    for _ in range(1_000_000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        os.sched_yield()
    pytest.fail(f"process is still there: pid={pid}")


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
