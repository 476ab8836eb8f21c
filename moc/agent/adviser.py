"""Advice on K and intervals from what the trainers and this agent have measured; for the log and `moc status`.

Thread: the agent's main thread.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from moc.agent.custody import Custody
from moc.agent.saves import Saves
from moc.plan.layout import Unit

if TYPE_CHECKING:
    from moc.plan.tuning import Settings, Tuning

__all__ = ["Adviser"]

log = logging.getLogger(__name__)

COMMITS_BETWEEN = 10  # at least, between two lines of advice in the log


class Adviser:
    """Advises anew after every commit, and logs it at the first of a life and where it has changed, now and then."""

    def __init__(self) -> None:
        self.newest: Tuning | None = None
        """What was advised last, None before anything was measured."""
        self._commits = 0
        self._logged: Settings | None = None
        self._logged_at = 0

    def begin_life(self) -> None:
        """Repeat what the former life has led to; the new one measures anew."""
        self._logged = None
        if self.newest is not None:
            self._log(self.newest, "by the former life")

    def look(self, custody: Custody | None, saves: Saves) -> None:
        """Advise if something was committed since the last look."""
        commits = saves.commits
        if custody is None or commits == self._commits:
            return
        self._commits = commits
        tuning = _tuning(custody, saves)
        if tuning is None:
            return
        self.newest = tuning
        is_due = self._logged is None or commits - self._logged_at >= COMMITS_BETWEEN
        if is_due and tuning.advised != self._logged:
            self._logged, self._logged_at = tuning.advised, commits
            self._log(tuning, f"after {commits} commits")

    def _log(self, tuning: Tuning, when: str) -> None:
        from moc.plan.tuning import describe_tuning

        log.info("advice %s: %s", when, "; ".join(describe_tuning(tuning.to_json())))


def _tuning(custody: Custody, saves: Saves) -> Tuning | None:
    """Return advice for the present life, None as long as something is not measured."""
    from moc.plan.tuning import RankTimes, Settings, tune  # an agent's start, which trainers wait for, does not need it

    arena, life, written = custody.arena, custody.life, saves.written
    if written is None:
        return None
    ranks, counts = [], dict[int, set[int]]()
    for rank in life.ranks:
        timings, units = arena.timings(rank), arena.rank_layout(rank).units
        if not (timings.copy_rate and timings.pass_ns):
            return None
        for unit in units:
            if unit.expert is not None:
                counts.setdefault(unit.expert.layer, set()).add(unit.expert.index)
        sizes = [sum(shard.size_bytes for shard in arena.catalog(rank).shards[_range(unit)]) for unit in units]
        ranks.append(
            RankTimes(
                dense_bytes=sizes[0],
                expert_bytes=sum(sizes[1:]),
                copy_rate=timings.copy_rate,
                pass_s=timings.pass_ns / 1e9,
            )
        )
    config, experts = life.descriptor["config"], max((*map(len, counts.values()), *life.experts), default=1)
    return tune(
        ranks,
        experts=experts,
        storage_rate=written.size_bytes / max(written.seconds, 1e-9),
        restarts=sum(record.reason == "recover" for record in life.lineage),
        steps=custody.global_step or 0,
        failed_share=len(life.ranks) / len(life.world),
        plt_limit=float(config["plt_limit"]),
        present=Settings(
            k_snapshot=min(config.get("k_snapshot") or experts, experts),
            k_persist=min(config.get("k_persist") or experts, experts),
            snapshot_every=max(1, config["snapshot_every"]),
            persist_every=config["persist_every"],
        ),
    )


def _range(unit: Unit) -> slice:
    return slice(unit.first, unit.first + unit.count)
