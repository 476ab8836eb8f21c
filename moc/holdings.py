"""What the agents of all nodes hold: each node's lowest rank speaks with its agent, rank 0 hears all of it.

Nobody is killed on any node before every node has found that no earlier life trains there. A snapshot exists where all
ranks of its life have sealed it, each at some node: one of which parts are lost, with a node or by a record that has
rotted, is *torn*. It is no candidate, but experts may come from what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from moc.agent.client import AgentClient, ensure_agent
from moc.agent.peers.lender import merge_lenders
from moc.agent.runtime import runtime_folder
from moc.agreement import agree, exchange
from moc.errors import IntegrityError, MocError, RankFailedError, StoreUnavailableError, UsageError
from moc.facts import Facts
from moc.format.manifest import Incarnation, decode_lineage
from moc.host import Host
from moc.plan.lineage import MEMORY, PEERS, Candidate
from moc.survey import Holdings, Request
from moc.trace import Trace
from moc.training import World

__all__ = ["at_node", "gather_holdings"]

LIVE_BEAT_S = 15.0  # a job whose last step is older than this, and than 3 of its steps, is taken for hung
FIRST_STEP_S = 60.0  # before a first step there is no interval to judge by, and it may compile for long
WATCH_INTERVAL_S = 0.1

T = TypeVar("T")


def at_node(facts: Facts, rank: int, act: Callable[[], T]) -> T:
    """Run something that may fail at this node alone, and name the node in its error."""
    try:
        return act()
    except RankFailedError:
        raise
    except MocError as error:
        if facts.topology.node_count == 1:
            raise
        raise type(error)(f"{error} node={facts.node_of(rank)}") from error


def gather_holdings(
    request: Request, run: str, unstored: str | None, world: World, facts: Facts, *, host: Host, trace: Trace
) -> Holdings:
    """Start each node's agent if need be, end what is left of earlier lives, and return what the agents hold.

    Collective. `unstored` says why storage cannot take what an agent of another version holds, None if it can. The
    result is whole on rank 0 only.
    """
    rank, is_leader = world.rank, facts.is_leader(world.rank)
    address = facts.addresses[facts.node_of(rank)] if facts.addresses else None
    node = _Node(request, run, unstored, facts.pids_beside(rank), address, host=host, trace=trace)
    try:
        agree(world, lambda: at_node(facts, rank, node.judge) if is_leader else None)
        own = agree(world, lambda: at_node(facts, rank, node.fence) if is_leader else None)
    finally:
        node.close()
    rows = exchange(world, own)
    found = [(facts.node_of(other), row) for other, row in enumerate(rows) if isinstance(row, dict)]
    return _merge(run, found) if rank == 0 else Holdings(lives=(), snapshots=(), notes=())


class _Node:
    """One node's agent at the beginning of a life, seen by the node's leader."""

    def __init__(
        self,
        request: Request,
        run: str,
        unstored: str | None,
        pids: Sequence[int],
        address: str | None,
        *,
        host: Host,
        trace: Trace,
    ) -> None:
        """`address` is where other nodes reach this one's agent, None where there are none."""
        self._request, self._run, self._unstored, self._pids = request, run, unstored, list(pids)
        self._address = address
        self._host, self._trace = host, trace
        self._client: AgentClient | None = None
        self._known: list[int] = []

    def judge(self) -> None:
        """Connect to the agent, started if need be; raises UsageError if an earlier life of this run still trains."""
        self._client = ensure_agent(
            runtime_folder(self._run, self._request.runtime_root),
            run=self._run,
            idle_s=self._request.agent_idle_s,
            timeout_s=self._request.config.timeout_s,
            before_drain=self._before_drain,
            host=self._host,
            trace=self._trace,
        )
        self._known = _refuse_live_job(self._client, self._pids, host=self._host)

    def fence(self) -> dict[str, object]:
        """Kill what is left of earlier lives and return what the agent holds."""
        assert self._client is not None, "judged before"
        notes: list[str] = []
        fields = {"spare_pids": self._pids, "known_pids": self._known}
        fenced, _ = self._client.request("fence", fields)
        while fenced["unknown"]:  # a trainer that has come to a young agent since the look: of a live job, maybe
            fields["known_pids"] = _refuse_live_job(self._client, self._pids, host=self._host)
            fenced, _ = self._client.request("fence", fields)
        if fenced["killed"]:
            notes.append(f"killed trainers of an earlier life: pids={fenced['killed']}")
        if fenced["quarantined"]:
            notes.append(
                f"trainers that cannot be killed, their memory is not used again: pids={fenced['quarantined']}"
            )
        inventory, _ = self._client.request("inventory", {"lend_at": self._address} if self._address else None)
        return {"notes": notes, **inventory}

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _before_drain(self, old: AgentClient) -> None:
        _refuse_live_job(old, self._pids, host=self._host)
        if self._unstored is not None and old.status().get("arena_bytes"):
            raise StoreUnavailableError(
                f"an agent of another version holds snapshots that it cannot store now: folder={old.folder} "
                f"reason={self._unstored}"
            )


def _merge(run: str, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Holdings:
    """Return what all nodes' inventories come to together. Pure.

    Raises: IntegrityError where two nodes remember different lives of one number.
    """
    lives: dict[int, Incarnation] = {}
    notes: list[str] = []
    holders: dict[tuple[int, int, str], set[int]] = {}
    worlds: dict[tuple[int, int, str], set[int]] = {}
    for node, row in rows:
        where = f" node={node}" if len(rows) > 1 else ""
        notes += [f"{note}{where}" for note in row["notes"]]
        if not row["has_arena"]:
            continue
        notes += [f"seal record is corrupt: rank={rank} record={record}{where}" for rank, record in row["corrupt"]]
        for life in decode_lineage(row["lineage"], fingerprint=row["fingerprint"]):
            known = lives.setdefault(life.number, life)
            if known.token != life.token:
                raise IntegrityError(
                    f"nodes remember different lives: incarnation={life.number} tokens={known.token}, {life.token}"
                    f"{where}"
                )
        for number, step, attempt, ranks in row["sealed"]:
            holders.setdefault((number, step, attempt), set()).update(ranks)
            worlds.setdefault((number, step, attempt), set()).update(row["world"])
    torn = {key: held for key, held in sorted(holders.items()) if held != worlds[key]}
    notes += [f"snapshot is incomplete: step={key[1]} sealed by ranks {sorted(held)}" for key, held in torn.items()]
    empty = [node for node, row in rows if not row["has_arena"]]
    if empty and len(empty) < len(rows):
        notes.append(f"nodes have no memory of this run, because they are new or have lost it: nodes={empty}")
    lenders = merge_lenders([row for _, row in rows])
    covered: dict[tuple[int, int, str], set[int]] = {}
    for number, step, attempt, rank, _, is_replica in lenders.get("places", ()):
        if is_replica and (number, step, attempt) in holders:
            covered.setdefault((number, step, attempt), set(holders[number, step, attempt])).add(rank)
    sources = {MEMORY: holders, PEERS: covered}
    return Holdings(
        lives=tuple(life for _, life in sorted(lives.items())),
        snapshots=tuple(
            Candidate(source=source, run=run, incarnation=key[0], step=key[1], attempt=key[2])
            for source, found in sources.items()
            for key, held in sorted(found.items())
            if held == worlds[key]
        ),
        notes=tuple(notes),
        torn=tuple(
            Candidate(source=MEMORY, run=run, incarnation=number, step=step, attempt=attempt)
            for number, step, attempt in torn
        ),
        lenders=lenders,
    )


def _refuse_live_job(client: AgentClient, pids: Sequence[int], *, host: Host) -> list[int]:
    """Raise UsageError if an earlier life of this run still trains; wait while that is not clear.

    Return the pids of the trainers that were looked at: those of a life that is over.

    A life trains if all its trainers here are alive and their step advances: with one dead the collectives of the
    others cannot end.
    """
    first: dict[int, object] = {}
    first_s = host.now_s()
    while True:
        inventory, _ = client.request("inventory")
        rows = [row for row in inventory["live"] if row["pid"] not in pids]
        if not rows or not all(row["alive"] for row in rows):
            return [row["pid"] for row in rows]
        beats = {row["rank"]: (row.get("beat_step"), row.get("beat_ns")) for row in rows}
        first = first or dict(beats)
        if any(beats[rank] != first.get(rank) for rank in beats):
            raise UsageError(
                f"another job of this run is training: pids={[row['pid'] for row in rows]} "
                f"incarnation={rows[0]['incarnation']} "
                "allowed=one job per repository; stop it first"
            )
        # A life that has just begun has no heartbeat yet: it counts as young as it can be.
        newest_s = max(row.get("beat_ns") or 0 for row in rows) * 1e-9 or first_s
        interval_ns = max(row.get("beat_interval_ns") or 0 for row in rows)
        patience_s = max(LIVE_BEAT_S, 3e-9 * interval_ns) if interval_ns else FIRST_STEP_S
        if host.now_s() - newest_s > patience_s:
            return [row["pid"] for row in rows]
        host.sleep(WATCH_INTERVAL_S)
