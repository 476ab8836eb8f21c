"""What a process of the same user, broken or stopped, can do to the agent: nothing that costs a snapshot or a save."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moc.agent import wire
from moc.agent.client import AgentClient, ensure_agent
from moc.agent.door import CONNECTION_LIMIT
from moc.agent.runtime import LOCK_NAME, LOG_NAME, SOCKET_NAME, remember_run, runtime_folder
from moc.errors import MocError
from tests.support.job import until

FEW_DESCRIPTORS = 48
QUICK_S = 2.0


class Foreground:
    """An agent of its own, with its log in a file."""

    def __init__(self, root: Path, *, descriptors: int | None = None) -> None:
        self.folder = runtime_folder("run-1", root)
        self.log = self.folder / LOG_NAME
        command = [sys.executable, "-m", "moc.agent", "--foreground", "--folder", str(self.folder), "--run", "run-1"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, "--idle-s", "60"], stderr=log)
        until(self._answers, "the agent listens")
        if descriptors is not None:
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (descriptors, descriptors))

    def _answers(self) -> bool:
        try:
            self.ask()
        except MocError:
            return False
        return True

    def ask(self, *, timeout_s: float = 10.0) -> dict[str, object]:
        """Ask for the status on a connection of its own."""
        with contextlib.closing(AgentClient.connect(self.folder, timeout_s=timeout_s)) as client:
            return client.status()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(10)
        until(lambda: sock.connect_ex(str(self.folder / SOCKET_NAME)) == 0, "room in the queue")
        return sock

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moc-") as folder:
        yield Path(folder)


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Foreground]]:
    started: list[Foreground] = []

    def begin(**options: int) -> Foreground:
        started.append(Foreground(place / "rt", **options))
        return started[-1]

    yield begin
    for agent in started:
        agent.process.kill()
        agent.process.wait()


def test_an_agent_without_descriptors_rests_says_so_once_and_recovers(start: Callable[..., Foreground]) -> None:
    agent = start(descriptors=FEW_DESCRIPTORS)
    held = [agent.connect() for _ in range(FEW_DESCRIPTORS + 20)]
    until(lambda: "no connection can be accepted" in agent.log.read_text(), "the agent has no descriptors left")
    before_s = agent.cpu_s()
    select.select([], [], [], 1.2)  # as long as a loop would have spun

    assert agent.cpu_s() - before_s < 0.4
    for sock in held:
        sock.close()
    assert agent.ask()["run"] == "run-1"
    assert agent.log.read_text().count("no connection can be accepted") == 1
    assert agent.process.poll() is None


def test_the_number_of_connections_is_bounded_and_the_first_ones_are_served(start: Callable[..., Foreground]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < CONNECTION_LIMIT + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(CONNECTION_LIMIT + 200, hard), hard))
    agent = start()
    first = AgentClient.connect(agent.folder, timeout_s=10)
    held = [agent.connect() for _ in range(CONNECTION_LIMIT + 20)]
    until(lambda: "no more connections" in agent.log.read_text(), "the agent has as many as it takes")

    assert first.status()["run"] == "run-1"
    assert agent.descriptors() < CONNECTION_LIMIT + 30
    for sock in held:
        sock.close()
    assert agent.ask()["run"] == "run-1"
    first.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


UNREAD = """
import os, signal, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
try:
    for _ in range(5000):
        sock.send(b'{"verb":"status"}', socket.MSG_DONTWAIT if sys.argv[2] == "stopped" else 0)
except OSError:
    pass  # shown out, or nothing more fits
if sys.argv[2] == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["flooding", "stopped"])
def test_a_client_that_does_not_read_delays_nobody(start: Callable[..., Foreground], kind: str) -> None:
    agent = start()
    with subprocess.Popen(
        [sys.executable, "-c", UNREAD, str(agent.folder / SOCKET_NAME), kind], stdin=subprocess.PIPE
    ) as client:

        def is_shown_out() -> bool:
            assert agent.ask(timeout_s=QUICK_S)["run"] == "run-1"  # all the while
            return "does not read" in agent.log.read_text()

        until(is_shown_out, "the client is shown out")
        client.kill()


def garbage() -> Iterator[bytes]:
    """Yield what is no request, and requests whose every field has the wrong type."""
    yield from (b"\0", b"\xff" * 1000, b"null", b"[]", b'"bell"', b"{", b"[" * 59_000, b'{"a":' * 9_000, b"1" * 59_000)
    yield from (b'{"verb":null}', b'{"verb":["bell"]}', b'{"verb":"bell","x":NaN}', b'{"verb":"none"}')
    for spilled in (-1, 1, 1 << 60, None, [], "x"):
        yield json.dumps({"spilled_bytes": spilled}).encode()
    verbs = ("hello", "inventory", "fence", "check", "begin", "adopt", "arena", "source", "wait", "skip", "diagnose")
    for verb in verbs:
        yield json.dumps({"verb": verb}).encode()
        for value in (None, -1, 1e308, "x", [], [[]], {}, {"a": []}):
            names = ("spare_pids", "descriptor", "step", "attempt", "timeout_s", "reason", "pid", "incarnation")
            fields = dict.fromkeys(names, value)
            yield json.dumps({"verb": verb, "rank": value if verb != "hello" else 0, **fields}).encode()


def test_no_message_ends_the_agent_or_costs_it_a_descriptor(start: Callable[..., Foreground]) -> None:
    agent = start()
    before = agent.descriptors()
    for text in garbage():
        with agent.connect() as sock:
            spare = os.memfd_create("spare")
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(sock, [text], [spare, spare])
            os.close(spare)
            poller = select.poll()
            poller.register(sock, select.POLLIN)
            poller.poll(50)  # a reply, or that the door was shut; `wait` has neither
        assert agent.process.poll() is None, text[:200]

    assert agent.ask()["ranks"] == []
    until(lambda: agent.descriptors() <= before + 2, "all descriptors are closed again")


def test_a_message_that_is_nested_too_deep_is_a_value_error() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.send(b"[" * 59_000)
        with pytest.raises(ValueError, match="nested too deep"):
            wire.receive(right)


# Log and lock


def test_a_log_is_bounded_private_and_followed_by_the_standard_streams(place: Path) -> None:
    program = """
import logging, os, sys
from pathlib import Path
from moc.agent.log import log_to_file
log_to_file(Path(sys.argv[1]), limit_bytes=20_000)
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), 2)
log = logging.getLogger("moc.test")
for number in range(1000):
    log.info("line %d of many that fill it", number)
log.info("forged\\n2026-01-01 INFO moc an event that never was \\x1b[31m")
log.info("storage s3://AKIA:c4nary/x@bucket/run refused aws_secret_access_key=c4nary")
try:
    raise ValueError("https://me:c4nary@host/x?X-Amz-Signature=c4nary")
except ValueError:
    log.exception("save failed")
logging.getLogger("botocore").info("c4nary, says a library")
print("a crash of the interpreter", file=sys.stderr, flush=True)
"""
    path = place / LOG_NAME
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, stderr=subprocess.PIPE)
    text = path.read_text()

    assert sorted(entry.name for entry in place.iterdir()) == [LOG_NAME, f"{LOG_NAME}.1"]
    assert all(entry.stat().st_size <= 20_500 for entry in place.iterdir())
    assert all(entry.stat().st_mode & 0o777 == 0o600 for entry in place.iterdir())
    assert "line 999" in text
    assert text.endswith("a crash of the interpreter\n")
    assert "forged\\n2026" in text
    assert "\x1b" not in text
    assert "Traceback" in text
    assert "c4nary" not in text


@pytest.mark.parametrize("name", [LOG_NAME, LOCK_NAME])
def test_a_link_in_place_of_log_or_lock_is_not_followed(place: Path, name: str) -> None:
    folder = runtime_folder("run-1", place / "rt")
    victim = place / "victim"
    victim.write_text("precious")
    (folder / name).symlink_to(victim)

    with pytest.raises((MocError, OSError)):
        ensure_agent(folder, run="run-1", idle_s=60, timeout_s=10)

    assert victim.read_text() == "precious"


def test_a_job_with_the_most_open_umask_makes_private_files() -> None:
    former = os.umask(0)
    try:
        with tempfile.TemporaryDirectory(prefix="moc-") as folder:
            root = Path(folder) / "rt"
            client = ensure_agent(runtime_folder("run-1", root), run="run-1", idle_s=60, timeout_s=10)
            remember_run(root, "0123456789abcdef", "run-1")
            modes = {path.name: path.lstat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
            client.drain()
    finally:
        os.umask(former)

    assert modes.pop("rt") == 0o700
    assert modes.pop("run-1") == 0o700
    assert len(modes) >= 4
    assert all(mode == 0o600 for mode in modes.values()), modes
