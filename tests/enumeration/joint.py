"""A save that the agents of two nodes make together, on one thread: one goes on until it waits for the other.

The persisters and councils are production's; what an agent tells is heard by the other as soon as somebody waits. Where
both wait the clock moves to the end of the shorter wait. So operation n is the same one in every run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from greenlet import getcurrent, greenlet

from moc.agent.jobs import Outcome, SaveJob
from moc.agent.peers.council import Council
from moc.agent.peers.report import Verdict, report_from_json
from moc.agent.persister import Persister
from moc.format.manifest import Incarnation
from moc.snapshot.seal import SealRecord
from moc.store.port import Store
from moc.trace import Trace
from tests.enumeration.serial import SerialHost

__all__ = ["Pair", "joint_plan"]

RANKS = ((0,), (1,))
TIMEOUT_S = 30.0
TURN_LIMIT = 1000


def joint_plan(plan: Mapping[str, Any], node: int) -> dict[str, Any]:
    """Return what the agent of a node is told of a life, given what the only one would be."""
    return {
        **plan,
        "catalogs": [plan["catalogs"][rank] for rank in RANKS[node]],
        "topology": {**plan["topology"], "node_of_rank": [node for node, ranks in enumerate(RANKS) for _ in ranks]},
        "fellows": {"node": node, "secret": "", "address": "", "urls": []},
        "timeout_s": TIMEOUT_S,
    }


class _Stage:
    """Who goes on: the agents in turn, each until it waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._hub = getcurrent()
        self._waits: dict[greenlet, tuple[_Event, float]] = {}

    def play(self, acts: list[Callable[[], None]], between: Callable[[], None]) -> None:
        """Run all acts to their end; `between` is called before each turn. What one of them raises ends all of them."""
        self._hub, self._waits = getcurrent(), {}
        players = [greenlet(act) for act in acts]
        for _ in range(TURN_LIMIT):
            between()
            living = [player for player in players if not player.dead]
            if not living:
                return
            ready = [player for player in living if player not in self._waits or self._waits[player][0].is_set()]
            if not ready:
                self.now_s = max(self.now_s, min(until_s for _, until_s in self._waits.values()))
                ready = [player for player in living if self._waits[player][1] <= self.now_s]
            self._waits.pop(ready[0], None)
            ready[0].switch()
        raise AssertionError("the agents wait for each other without end")

    def wait(self, event: _Event, timeout_s: float) -> None:
        self._waits[getcurrent()] = (event, self.now_s + timeout_s)
        self._hub.switch()


class _Event:
    def __init__(self, stage: _Stage) -> None:
        self._stage, self._is_set = stage, False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            self._stage.wait(self, TIMEOUT_S if timeout is None else timeout)
        return self._is_set


class _Host(SerialHost):
    """One node's part of the stage."""

    def __init__(self, open_store: Callable[[], Store], stage: _Stage) -> None:
        super().__init__(open_store)
        self._stage = stage

    def now_s(self) -> float:
        return self._stage.now_s

    def sleep(self, seconds: float) -> None:
        self._stage.now_s += seconds

    def event(self) -> Any:
        return _Event(self._stage)


class _Agent:
    """The persist thread and the council of one node's agent."""

    def __init__(self, node: int, open_store: Callable[[], Store], stage: _Stage, life: Incarnation) -> None:
        self.node, self._stage, self._life = node, stage, life
        self.host = _Host(open_store, stage)
        self.council = Council(node=node, ranks_of=RANKS, incarnation=life.number, host=self.host, wake=lambda: None)
        self.persister = Persister(on_end=self._note, host=self.host, trace=Trace())
        self.outcome: Outcome | None = None
        self._verdicts: list[Verdict] = []

    def offer(self, records: dict[int, SealRecord], arena: Any, plan: Mapping[str, Any]) -> None:
        self.outcome = None
        own = {rank: record for rank, record in records.items() if rank in RANKS[self.node]}
        job = SaveJob(
            arena=arena,
            records=own,
            life=self._life,
            descriptor=joint_plan(plan, self.node),
            pinned=None,
            is_whole=False,
            council=self.council,
        )
        assert self.persister.offer(job), "one save at a time"

    def tell(self, other: _Agent) -> None:
        report = self.council.report("http://node", {}, {}, ended=(), wishes=(), verdicts=self._verdicts[-8:], done=())
        if report is not None:
            body = json.loads(json.dumps(report.to_json()))
            other.council.hear(report_from_json(body, node=self.node, ranks=RANKS[self.node]))

    def _note(self, job: SaveJob, outcomes: list[Outcome]) -> None:
        (self.outcome,) = outcomes
        moment = (self.outcome.name.step, self.outcome.name.attempt)
        self._verdicts.append(Verdict(moment=moment, size_bytes=self.outcome.size_bytes, error=self.outcome.error))


class Pair:
    """The agents of two nodes, with one rank each, in one life."""

    def __init__(self, open_store: Callable[[], Store], life: Incarnation) -> None:
        self._stage = _Stage()
        self._agents = [_Agent(node, open_store, self._stage, life) for node in range(len(RANKS))]

    def save(self, records: dict[int, SealRecord], arena: Any, plan: Mapping[str, Any]) -> Outcome:
        """Have both make a save, and return how it ended: well if one of them says so."""
        first, second = self._agents
        for agent in self._agents:
            agent.offer(records, arena, plan)

        def talk() -> None:
            first.tell(second)
            second.tell(first)

        self._stage.play([agent.host.work for agent in self._agents], talk)
        talk()
        outcomes = [agent.outcome for agent in self._agents if agent.outcome is not None]
        assert len(outcomes) == len(RANKS), "both have ended"
        return min(outcomes, key=lambda outcome: outcome.error is not None)
