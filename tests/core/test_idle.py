"""What keeps an agent that has no trainers, and what does not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from moc.agent.client import AgentClient
from moc.agent.server import ATTACH_VERBS, Agent
from moc.errors import MocError
from moc.host import SystemHost
from moc.trace import Trace

IDLE_S = 1000.0
TIMEOUT_S = 10.0


class _Host(SystemHost):
    """This process, in which time passes when the test says so."""

    passed_s = 0.0

    def now_s(self) -> float:
        is_errand = threading.current_thread().name == "moc-restock"  # its limits of time are not what is tested
        return 0.0 if is_errand else self.passed_s

    def sleep(self, seconds: float) -> None:
        """Nothing that a test waits for."""


class _Idle:
    """An agent without trainers, and a connection to it."""

    def __init__(self, host: _Host, folder: Path) -> None:
        self.host = host
        self._agent = Agent(folder, run="run-7", idle_s=IDLE_S, host=host, trace=Trace())
        assert self._agent.listen()
        self.thread = threading.Thread(target=self._agent.serve, daemon=True)
        self.thread.start()
        self.client = AgentClient.connect(folder, timeout_s=TIMEOUT_S, host=host)

    def pass_time(self, idle_limits: float) -> None:
        """Let time pass, and the agent notice."""
        self.host.passed_s += idle_limits * IDLE_S
        for _ in range(2):  # the first is answered before the agent looks at the time
            assert not self.client.status()["leaving"]

    def close(self) -> None:
        """Close what the end of an agent's process would."""
        self.client.close()
        for key in list(self._agent._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._agent._selector.close()
        assert self._agent._lock_file is not None
        self._agent._lock_file.close()


@contextmanager
def _idle(folder: Path) -> Iterator[_Idle]:
    idle = _Idle(_Host(), folder)
    with closing(idle):
        yield idle
        idle.pass_time(0.6)
        idle.host.passed_s += 0.6 * IDLE_S  # to be asked for the status keeps nothing alive
        idle.thread.join(TIMEOUT_S)
        assert not idle.thread.is_alive()


def test_an_agent_stays_for_an_attach_that_asks_it_something(tmp_path: Path) -> None:
    with _idle(tmp_path) as idle:
        for verb in ATTACH_VERBS:
            idle.pass_time(0.6)
            with suppress(MocError):  # some need what is not here: an attach asks all the same
                idle.client.request(verb, {"spare_pids": [], "known_pids": []})


def test_an_agent_stays_while_it_fetches_replicas_and_for_the_attach_after_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, _idle(tmp_path) as idle:
        silent.settimeout(TIMEOUT_S)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        lender = {"run": "run-7", "incarnation": 1, "node": 1, "nodes": 2, "secret": "a secret", "url": url}
        lenders = {"members": [lender], "places": [[1, 5, "00abcdef", 0, 0, True]]}
        wanted = {"incarnation": 1, "step": 5, "attempt": "00abcdef", "rank": 0, "run": "run-7", "storage": "unused"}
        answer: list[Any] = []
        asking = threading.Thread(
            target=lambda: answer.append(_fetch(tmp_path, {**wanted, "lenders": lenders})), daemon=True
        )
        asking.start()
        connection, _ = silent.accept()
        with connection:
            for _ in range(3):
                idle.pass_time(3)
        silent.close()
        asking.join(TIMEOUT_S)
        assert "problem" in answer[0]


def _fetch(folder: Path, wanted: dict[str, object]) -> object:
    with closing(AgentClient.connect(folder, timeout_s=TIMEOUT_S)) as client:
        return client.request("restock", wanted)[0]
