"""Other users of the machine: what they prepare, open or connect to gets them nothing, and gets nothing from us."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moc.agent.client import AgentClient, ensure_agent
from moc.agent.runtime import (
    LOG_NAME,
    SOCKET_NAME,
    default_root,
    live_agents,
    node_identity,
    remember_run,
    remembered_run,
    runtime_folder,
)
from moc.errors import UsageError
from tests.support.job import Job, until
from tests.support.other_user import NOBODY, as_nobody, needs_root

DIGEST = "0123456789abcdef"


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path for sockets, open to all users."""
    with tempfile.TemporaryDirectory(prefix="moc-") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.fixture
def agent(place: Path) -> Iterator[AgentClient]:
    client = ensure_agent(runtime_folder("run-1", place / "rt"), run="run-1", idle_s=60, timeout_s=10)
    yield client
    client.close()
    AgentClient.connect(place / "rt" / "run-1", timeout_s=10).drain()


def look_everywhere(root: Path) -> list[str]:
    """Use the root in every way; return what each was told."""

    def told(use: object) -> str:
        try:
            return f"used: {use()}"  # type: ignore[operator]
        except UsageError as error:
            return str(error)

    return [
        told(lambda: runtime_folder("run-1", root)),
        told(lambda: node_identity(root)),
        told(lambda: remember_run(root, DIGEST, "run-1")),
        told(lambda: remembered_run(root, DIGEST)),
        told(lambda: live_agents(root)),
    ]


# Sockets


@needs_root
def test_an_agent_refuses_another_user_although_its_socket_is_open_to_all(place: Path, agent: AgentClient) -> None:
    folder = agent.folder
    for path, mode in ((place / "rt", 0o777), (folder, 0o777), (folder / SOCKET_NAME, 0o777)):
        os.chmod(path, mode)

    def ask() -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect(str(folder / SOCKET_NAME))
            try:
                sock.send(b'{"verb":"status"}')
                return sock.recv(60_000).decode()
            except (BrokenPipeError, ConnectionResetError):
                return ""

    assert as_nobody(ask) == ""
    assert agent.status()["run"] == "run-1", "its own user is served"
    until(lambda: "another user" in (folder / LOG_NAME).read_text(), "the refusal is logged")
    for path in (place / "rt", folder):
        os.chmod(path, 0o700)


@needs_root
def test_a_client_refuses_an_agent_of_another_user_even_of_root(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(place / SOCKET_NAME))
        os.chmod(place / SOCKET_NAME, 0o777)
        listener.listen()

        said = as_nobody(lambda: AgentClient.connect(place, timeout_s=10).status())

    assert said.startswith("UsageError: agent belongs to another user")


@needs_root
def test_root_refuses_an_agent_of_another_user(place: Path) -> None:
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(send)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(place / SOCKET_NAME))
        listener.listen()
        os.read(receive, 1)  # until the test has seen enough
        os._exit(0)
    try:
        until((place / SOCKET_NAME).exists, "the other user listens")
        with pytest.raises(UsageError, match="belongs to another user"):
            until(lambda: _connected(place), "an answer")
    finally:
        os.close(send)
        os.waitpid(pid, 0)
        os.close(receive)


def _connected(folder: Path) -> bool:
    """Return False until the other side listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        if probe.connect_ex(str(folder / SOCKET_NAME)):
            return False
    AgentClient.connect(folder, timeout_s=10)
    return True


# The runtime root


@needs_root
def test_a_root_that_another_user_has_made_before_is_refused(place: Path) -> None:
    root = place / "rt"
    as_nobody(lambda: root.mkdir(mode=0o777))
    as_nobody(lambda: (root / f"{DIGEST}.run").write_text("run-of-theirs"))

    told = look_everywhere(root)

    assert all("not private" in words for words in told), told
    assert sorted(os.listdir(root)) == [f"{DIGEST}.run"]


@needs_root
def test_the_default_root_in_tmp_that_another_user_has_made_before_is_refused() -> None:
    theirs = Path(f"/tmp/moc-{NOBODY}")
    if theirs.exists():
        pytest.skip(f"somebody uses {theirs}")
    theirs.mkdir(mode=0o777)
    try:
        said = as_nobody(lambda: str(runtime_folder("run-1", None)))
        assert as_nobody(lambda: str(default_root())) == str(theirs)
    finally:
        theirs.rmdir()

    assert said.startswith("UsageError: runtime folder is not private")


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "fifo", "open"])
def test_a_root_that_is_no_private_folder_is_refused(place: Path, kind: str) -> None:
    root, other = place / "rt", place / "other"
    other.mkdir(mode=0o700)
    match kind:
        case "link":
            root.symlink_to(other)
        case "dangling":
            root.symlink_to(place / "nowhere")
        case "file":
            root.write_text("")
        case "fifo":
            os.mkfifo(root)
        case _:
            root.mkdir(mode=0o750)

    told = look_everywhere(root)

    assert all("not private" in words for words in told), told
    assert os.listdir(other) == []
    assert not (place / "nowhere").exists()


def test_a_runs_folder_that_is_a_link_is_refused(place: Path) -> None:
    (place / "rt").mkdir(mode=0o700)
    (place / "rt" / "run-1").symlink_to(place)

    with pytest.raises(UsageError, match="not private"):
        runtime_folder("run-1", place / "rt")


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "huge", "no run id", "folder"])
def test_a_note_that_is_not_ours_is_not_read(place: Path, kind: str) -> None:
    root, secret = place / "rt", place / "secret"
    secret.write_text("run-of-theirs")
    remember_run(root, DIGEST, "run-1")
    note = root / f"{DIGEST}.run"
    note.unlink()
    match kind:
        case "link":
            note.symlink_to(secret)
        case "hard link":
            note.hardlink_to(secret)
        case "fifo":
            os.mkfifo(note)  # without a writer: an ordinary open would wait for ever
        case "huge":
            note.write_bytes(b"a" * 10_000_000)
        case "no run id":
            note.write_text("../../etc")
        case _:
            note.mkdir()

    with pytest.raises(UsageError):
        remembered_run(root, DIGEST)


def test_a_note_that_a_power_loss_has_emptied_says_nothing_and_refuses_no_start(place: Path) -> None:
    root = place / "rt"
    remember_run(root, DIGEST, "run-1")
    os.truncate(root / f"{DIGEST}.run", 0)

    assert remembered_run(root, DIGEST) is None


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_note_is_never_written_through_a_link(place: Path, kind: str) -> None:
    root, victim = place / "rt", place / "victim"
    victim.write_text("precious")
    remember_run(root, DIGEST, "run-1")
    for name in (f"{DIGEST}.run", f".{DIGEST}.{os.getpid()}"):
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(victim) if kind == "link" else (root / name).hardlink_to(victim)

    remember_run(root, DIGEST, "run-2")

    assert victim.read_text() == "precious"
    assert remembered_run(root, DIGEST) == "run-2"


# A living job


@needs_root
def test_no_file_descriptor_or_memory_of_a_job_is_open_to_another_user() -> None:
    with Job(size=1, step_s=0.002) as job:
        life = job.start()
        life.event("global", step=2)
        agent = job.agent_pid()
        assert agent is not None
        os.chmod(job.folder, 0o777)
        arenas = [(pid, entry) for pid in (agent, life.pid(0)) for entry in _arenas(pid)]
        assert {pid for pid, _ in arenas} == {agent, life.pid(0)}, "both have the arena open"
        for pid, entry in arenas:
            assert os.stat(f"/proc/{pid}/fd/{entry}").st_mode & 0o777 == 0o600
            for path in (f"/proc/{pid}/fd/{entry}", f"/proc/{pid}/mem", f"/proc/{pid}/environ"):
                assert as_nobody(lambda path=path: os.open(path, os.O_RDONLY)).startswith("PermissionError"), path
            assert _dump_flags(pid, "memfd:moc-") == {"dd", "dc"}, "in no core dump, in no child"
        assert as_nobody(lambda: os.listdir(job.root)).startswith("PermissionError")


def _arenas(pid: int) -> list[str]:
    """Return the descriptors of a process that are arenas."""
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if "memfd:moc-" in os.readlink(f"/proc/{pid}/fd/{entry}"):
                found.append(entry)
    return found


def _dump_flags(pid: int, name: str) -> set[str]:
    """Return which of the flags "not in core dumps" and "not in children" every mapping with this name has."""
    flags, is_wanted = [], False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            is_wanted = name in line
        elif is_wanted and line.startswith("VmFlags:"):
            flags.append({"dd", "dc"} & set(line.split()))
    assert flags
    return set.intersection(*flags)
