"""What a seed decides before anything runs: sizes, limits and odds, drawn wide, so that rare states become common."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

__all__ = ["Knobs"]


ROTTING_ODDS = 0.3  # of a simulation of partial checkpoints on one node


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """The settings of one simulation; odds are per opportunity, times in virtual seconds."""

    size: int
    other_size: int
    versions: int
    persist_every: int
    snapshot_every: int
    keep_last: int
    keep_every: int
    timeout_s: float
    idle_s: float
    is_remote: bool
    run_id: str | None
    step_s: float
    barrier_every: int
    store_s: float
    error_odds: float
    lost_answer_odds: float
    late_odds: float
    late_s: float
    switch_odds: float
    tick_s: float
    trainer_kill_odds: float
    agent_kill_odds: float
    event_odds: float
    event_s: float
    chaos_s: float
    chaos_turns: int
    restart_s: float
    kill_s: float
    save_odds: float
    load_odds: float
    detach_odds: float
    resize_odds: float
    second_job_odds: float
    is_raced: bool
    mode: str = "full"
    k_snapshot: int | None = None
    k_persist: int | None = None
    is_counting: bool = False  # routes are registered
    plt_limit: float = 1.0
    nodes: int = 1
    replicas: int = 0
    shuffle_odds: float = 0.0  # that ranks change places with a launch
    net_s: float = 0.0  # one way, at most
    net_slow_odds: float = 0.0
    net_slow_s: float = 0.0
    net_lost_odds: float = 0.0  # of a request, and of an answer
    net_cut_odds: float = 0.0
    net_twice_odds: float = 0.0
    net_flip_odds: float = 0.0  # that a bit of a piece of a snapshot changes on its way
    is_rotting: bool = False  # bits of the newest snapshot flip as the job fails
    part_s: float = 0.0  # how long machines do not hear each other, at most

    @property
    def is_partial(self) -> bool:
        return self.mode != "full"

    @staticmethod
    def draw(chance: random.Random, *, is_partial: bool, has_nodes: bool) -> Knobs:
        knobs = _draw(chance)
        if has_nodes:
            knobs = _spread(knobs, chance)
        if not is_partial:
            return knobs
        k_snapshot = chance.choice((1, 2, 2, 3))
        knobs = replace(
            knobs,
            mode=chance.choice(("partial", "partial", "partial_by_load")),
            is_counting=chance.random() < 0.7,
            plt_limit=chance.choice((1.0, 1.0, 0.2, 0.04)),
            k_snapshot=k_snapshot,
            k_persist=chance.randint(1, k_snapshot),
            persist_every=knobs.persist_every or knobs.snapshot_every,
        )
        if has_nodes or chance.random() > ROTTING_ODDS:
            return knobs
        # Memory must be there, and newer than storage, or nobody would read it.
        return replace(
            knobs,
            is_rotting=True,
            agent_kill_odds=0.0,
            persist_every=chance.choice((2, 3, 5)) * knobs.snapshot_every,
            save_odds=min(knobs.save_odds, 0.1),
            event_s=min(knobs.event_s, 4.0),
            chaos_turns=900,
        )

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


def _draw(chance: random.Random) -> Knobs:
    pick, rare = chance.choice, chance.random
    snapshot_every = pick((1, 1, 1, 2))
    size = pick((1, 2, 2, 3))
    store_s = pick((0.0, 0.01, 0.2))
    return Knobs(
        size=size,
        other_size=pick((1, 2, 3)),
        versions=pick((2, 2, 3, 4)),
        persist_every=pick((0, 1, 2, 3, 5)) * snapshot_every,
        snapshot_every=snapshot_every,
        keep_last=pick((1, 1, 2, 3)),
        keep_every=pick((0, 0, 4, 6)),
        timeout_s=pick((5.0, 10.0)) if store_s < 0.1 else 30.0,
        idle_s=pick((20.0, 300.0)),
        is_remote=rare() < 0.3,
        run_id=pick((None, None, "sim-run")),
        step_s=pick((0.0, 0.05, 0.5)),
        barrier_every=pick((0, 1, 1, 3)),
        store_s=store_s,
        error_odds=pick((0.0, 0.0, 0.005, 0.05)),
        lost_answer_odds=pick((0.0, 0.0, 0.02)),
        late_odds=pick((0.0, 0.5)),
        late_s=pick((0.1, 1.0)),
        switch_odds=pick((0.05, 0.3, 1.0)),
        tick_s=pick((0.0001, 0.002)),
        trainer_kill_odds=pick((0.0, 0.0, 0.001, 0.004)),
        agent_kill_odds=pick((0.0, 0.0, 0.002, 0.008)),
        event_odds=pick((0.0, 0.002, 0.01)),
        event_s=pick((1.0, 4.0, 15.0)),
        chaos_s=pick((10.0, 30.0, 60.0)),
        chaos_turns=pick((150, 400, 900)),
        restart_s=pick((0.0, 1.0, 8.0)),
        kill_s=pick((0.0, 0.0, 0.5)),
        save_odds=pick((0.0, 0.1, 0.3)),
        load_odds=pick((0.0, 0.0, 0.0, 0.03)),
        detach_odds=pick((0.0, 0.0, 0.02, 0.1)),
        resize_odds=pick((0.0, 0.0, 0.5)),
        second_job_odds=pick((0.0, 0.5)),
        is_raced=rare() < 0.05,
    )


def _spread(knobs: Knobs, chance: random.Random) -> Knobs:
    """Return the same job on several nodes."""
    pick = chance.choice
    nodes = pick((2, 2, 3))
    return replace(
        knobs,
        nodes=nodes,
        size=pick((nodes, nodes, nodes, nodes + 1)),
        other_size=pick((1, nodes - 1, nodes, nodes + 1)),
        resize_odds=pick((0.0, 0.0, 0.0, 0.3)),
        shuffle_odds=pick((0.0, 0.0, 0.0, 0.3)),
        replicas=pick((0, 1, 1)),
        persist_every=pick((0, 0, 1, 4, 10)) * knobs.snapshot_every,  # memory is to be newer than storage
        save_odds=pick((0.0, 0.0, 0.05, 0.2)),
        idle_s=pick((20.0, 60.0)),
        net_s=pick((0.0, 0.01, 0.2)),
        net_slow_odds=pick((0.0, 0.0, 0.02, 0.1)),
        net_slow_s=pick((1.0, 4.0, 15.0)),
        net_lost_odds=pick((0.0, 0.0, 0.01, 0.1)),
        net_cut_odds=pick((0.0, 0.0, 0.05)),
        net_twice_odds=pick((0.0, 0.0, 0.05)),
        net_flip_odds=pick((0.0, 0.0, 0.05)),
        second_job_odds=pick((0.0, 0.0, 0.5)),
        part_s=pick((2.0, 15.0, 40.0)),
        restart_s=pick((0.5, 2.0, 8.0)),
        chaos_s=pick((30.0, 60.0, 120.0)),
        chaos_turns=pick((1000, 3000, 6000)),
        event_s=pick((4.0, 10.0, 20.0)),  # apart enough for a snapshot to come to the others in between
        event_odds=pick((0.0, 0.0, 0.002)),
        trainer_kill_odds=pick((0.0, 0.0, 0.001)),
        agent_kill_odds=pick((0.0, 0.0, 0.002)),
    )
