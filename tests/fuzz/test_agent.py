"""The real agent, sent messages that no trainer sends: it answers them or closes the connection, and goes on."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc.agent import wire
from moc.agent.client import AgentClient, ensure_agent
from moc.agent.runtime import SOCKET_NAME, runtime_folder
from moc.host import SystemHost
from tests.fuzz import seeds
from tests.fuzz.changes import HOSTILE_TEXTS, HOSTILE_VALUES, changed_at

DEADLINE_S = 30.0
LASTING = 4  # the present arena, that of an earlier life, and what the agent opens when it first needs it
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "hello": {"version": "0", "pid": 1, "rank": 0, "incarnation": 1},
    "inventory": {},
    "fence": {"spare_pids": [], "known_pids": []},
    "check": {"descriptor": {}},
    "begin": {"incarnation": 1, "descriptor": {}},
    "adopt": {},
    "arena": {},
    "source": {},
    "bell": {},
    "wait": {"step": 1, "attempt": "00000000", "timeout_s": 0.0},
    "skip": {"step": 1, "attempt": "00000000", "rank": 0, "reason": "no"},
    "status": {},
    "unknown": {},
}
FILES = ("memfd", "pipe", "folder", "arena", "pidfd")


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, tuple[str, ...]]:
    """Return a packet and what goes with it."""
    files = tuple(draw(st.lists(st.sampled_from(FILES), max_size=3)))
    if draw(st.integers(0, 7)) == 0:
        return draw(st.sampled_from(HOSTILE_TEXTS) | st.binary(max_size=40)), files
    verb = draw(st.sampled_from(sorted(FIELDS)))
    fields = copy.deepcopy(dict(FIELDS[verb]))
    if "descriptor" in fields:
        fields["descriptor"] = copy.deepcopy(seeds.descriptor())
    for _ in range(draw(st.integers(0, 2))):
        fields = changed_at(lambda options: draw(st.sampled_from(options)), fields)
        if not isinstance(fields, dict):
            break
    message = {"verb": verb, **fields} if isinstance(fields, dict) else fields
    if draw(st.integers(0, 15)) == 0:
        message = {"spilled_bytes": draw(st.sampled_from(HOSTILE_VALUES))}
    return json.dumps(message).encode()[: wire.PACKET_LIMIT_BYTES], files


class Prey:
    """The agent under fire, and what is sent along."""

    def __init__(self, folder: Path) -> None:
        self.folder = runtime_folder("golden-1", folder)
        client = ensure_agent(self.folder, run="golden-1", idle_s=600.0, timeout_s=DEADLINE_S)
        self.pid = int(client.status()["pid"])
        client.close()
        self.child = subprocess.Popen(["sleep", "600"])  # a trainer that may be killed
        self._control = self._connect()
        self.descriptors = self.count_descriptors()

    def count_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def links(self) -> str:
        """Return what the agent's descriptors are, for a failed test."""
        folder = Path(f"/proc/{self.pid}/fd")
        return " ".join(os.readlink(path) for path in sorted(folder.iterdir(), key=lambda path: int(path.name)))

    def send(self, packets: list[tuple[bytes, tuple[str, ...]]]) -> None:
        """Send packets over one connection and wait until the agent has seen them all, or has closed it."""
        with self._connect() as connection, contextlib.suppress(ConnectionError):
            for content, files in packets:
                opened = [self._open(kind) for kind in files]
                try:
                    socket.send_fds(connection, [content or b" "], opened)
                finally:
                    for descriptor in opened:
                        os.close(descriptor)
            connection.shutdown(socket.SHUT_WR)
            while True:  # ends with the agent's end of the connection
                _, received = wire.receive(connection)
                for descriptor in received:
                    os.close(descriptor)

    def status(self) -> Mapping[str, Any]:
        """Ask on a connection of its own; the agent must be the same one."""
        wire.send(self._control, {"verb": "status"})
        reply, _ = wire.receive(self._control)
        assert reply.get("pid") == self.pid, reply
        return reply

    def close(self) -> None:
        self._control.close()
        self.child.kill()
        self.child.wait()
        with contextlib.closing(AgentClient.connect(self.folder, timeout_s=DEADLINE_S)) as client:
            client.drain(timeout_s=DEADLINE_S)

    def _connect(self) -> socket.socket:
        return wire.connect(str(self.folder / SOCKET_NAME), DEADLINE_S, host=SystemHost())

    def _open(self, kind: str) -> int:
        match kind:
            case "memfd":
                return os.memfd_create("fuzz")
            case "pipe":
                reader, writer = os.pipe()
                os.close(writer)
                return reader
            case "folder":
                return os.open("/", os.O_RDONLY)
            case "pidfd":
                return os.pidfd_open(self.child.pid)
            case _:
                fd = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
                os.write(fd, seeds.arena_bytes())
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
                return fd


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prey]:
    prey = Prey(tmp_path_factory.mktemp("agent"))
    yield prey
    prey.close()


def test_no_message_ends_the_agent_or_costs_it_a_descriptor(prey: Prey) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(messages(), min_size=1, max_size=6))
    def search(packets: list[tuple[bytes, tuple[str, ...]]]) -> None:
        prey.send(packets)
        assert "error" not in prey.status()

    search()

    prey.child.kill()  # the agent lets go of dead trainers
    prey.child.wait()
    deadline_s = time.monotonic() + DEADLINE_S
    while prey.count_descriptors() > prey.descriptors + LASTING:
        assert time.monotonic() < deadline_s, prey.links()
        select.select([], [], [], 0.01)
        prey.status()


@pytest.mark.parametrize(
    "message",
    [
        {"verb": "wait", "step": 1, "attempt": [], "timeout_s": 1.0},
        {"verb": "wait", "step": 1, "attempt": "00000000", "timeout_s": float("nan")},
        {"verb": "begin", "incarnation": 1, "descriptor": {**seeds.descriptor(), "timeout_s": "soon"}},
        {"verb": "begin", "incarnation": 1, "descriptor": {**seeds.descriptor(), "lineage": []}},
        {"verb": "begin", "incarnation": 1, "descriptor": {**seeds.descriptor(), "catalogs": []}},
        {"verb": "skip", "step": 1, "attempt": {}, "rank": 0, "reason": ""},
        {"verb": "fence", "spare_pids": 5},
        {"verb": "hello", "rank": 0},
        {"verb": [1]},
        {"spilled_bytes": 10**400},
    ],
)
def test_messages_that_once_ended_it_or_would(prey: Prey, message: Mapping[str, object]) -> None:
    prey.send([(json.dumps(message).encode(), ("memfd",))])

    assert "error" not in prey.status()
