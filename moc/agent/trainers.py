"""The trainers of this node, as processes: who lives, who died, who must be killed before memory is used again.

A death is seen on the trainer's pidfd, not on its socket: a forked data-loader worker may keep the socket open.
Thread: the agent's main thread.
"""

from __future__ import annotations

import logging
import os
import selectors
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moc.errors import UsageError
from moc.host import Host
from moc.snapshot.arena import Arena

__all__ = ["Trainer", "Trainers"]

log = logging.getLogger(__name__)

REAP_TIMEOUT_S = 10.0


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A trainer process of this node; `is_alive` turns False when its pidfd becomes readable."""

    rank: int
    pid: int
    pidfd: int
    incarnation: int
    version: str
    is_alive: bool = True


class Trainers:
    """The registry. A trainer whose rank was taken over while it was still alive is kept apart until it is dead."""

    def __init__(self, selector: selectors.BaseSelector, *, on_death: Callable[[Trainer], None], host: Host) -> None:
        self._selector, self._on_death, self._host = selector, on_death, host
        self._by_rank: dict[int, Trainer] = {}
        self._displaced: list[Trainer] = []
        self._spared: frozenset[int] = frozenset()

    def enter(self, trainer: Trainer, *, newest_incarnation: int | None) -> None:
        """Register a trainer and own its pidfd; raises UsageError for one of an older life, or not to be watched."""
        if newest_incarnation is not None and trainer.incarnation < newest_incarnation:
            os.close(trainer.pidfd)
            raise UsageError(
                f"a newer life has begun: rank={trainer.rank} incarnation={trainer.incarnation} "
                f"newest={newest_incarnation}"
            )
        try:
            self._selector.register(trainer.pidfd, selectors.EVENT_READ, lambda _: self._note_death(trainer))
        except OSError as error:
            os.close(trainer.pidfd)
            raise UsageError(f"not a pidfd: rank={trainer.rank} pid={trainer.pid} reason={error}") from error
        held = self._by_rank.get(trainer.rank)
        if held is not None and held.is_alive and held.pid != trainer.pid:
            self._displaced.append(held)
        elif held is not None:
            self._forget_pidfd(held)
        self._by_rank[trainer.rank] = trainer

    def begin_life(self, incarnation: int) -> None:
        """Forget the dead of earlier lives: a rank that the new life does not have is not missing from it."""
        self._by_rank = {
            rank: trainer
            for rank, trainer in self._by_rank.items()
            if trainer.is_alive or trainer.incarnation >= incarnation
        }

    def living(self) -> list[Trainer]:
        """Return all that are alive."""
        return [trainer for trainer in self._all() if trainer.is_alive]

    def strangers(self) -> list[Trainer]:
        """Return the living that the newest fence was to kill: they may still write to memory of their lives.

        A process of the job that attaches may be known from an attach of its own that failed.
        """
        return [trainer for trainer in self.living() if trainer.pid not in self._spared]

    def ended(self, incarnation: int) -> set[int]:
        """Return the ranks whose trainer of this life has ended: they seal nothing any more."""
        return {t.rank for t in self._by_rank.values() if t.incarnation == incarnation and not t.is_alive}

    def zombies(self, incarnation: int) -> list[int]:
        """Return the pids of living trainers of other lives: they may still write to the arena."""
        return [t.pid for t in self.living() if t.incarnation != incarnation or t in self._displaced]

    def fence(self, spare_pids: list[int]) -> tuple[list[int], list[int]]:
        """SIGKILL all but the spared, wait for their end.

        Return the killed and those that would not die. Blocks: 10 s for each of those.
        """
        self._spared = frozenset(spare_pids)
        killed, immortal = [], []
        for trainer in self.living():
            if trainer.pid not in spare_pids:
                killed.append(trainer)
                try:
                    self._host.kill(trainer.pidfd)
                except ProcessLookupError:
                    log.info("trainer had ended already: pid=%d", trainer.pid)
                except OSError as error:
                    log.error("what came as a pidfd is none: pid=%d reason=%s", trainer.pid, error)
        for trainer in killed:
            if self._host.wait_readable(trainer.pidfd, REAP_TIMEOUT_S):
                self._note_death(trainer)
            else:
                immortal.append(trainer.pid)
        return [trainer.pid for trainer in killed], immortal

    def rows(self, arena: Arena | None) -> list[dict[str, object]]:
        """Return one row per trainer: rank, pid, alive, incarnation; where there is an arena, steps and heartbeat."""
        rows: list[dict[str, object]] = []
        for trainer in sorted(self._all(), key=lambda t: (t.rank, t.incarnation)):
            row: dict[str, object] = {
                "rank": trainer.rank,
                "pid": trainer.pid,
                "alive": trainer.is_alive,
                "incarnation": trainer.incarnation,
                "version": trainer.version,
            }
            if arena is not None and any(catalog.rank == trainer.rank for catalog in arena.catalogs):
                words = arena.words(trainer.rank)
                row |= {
                    "sealed_step": words.sealed_step,
                    "beat_step": words.beat_step,
                    "beat_ns": words.beat_ns,
                    "beat_interval_ns": words.beat_interval_ns,
                }
            rows.append(row)
        return rows

    def _all(self) -> Iterator[Trainer]:
        yield from self._by_rank.values()
        yield from self._displaced

    def _note_death(self, trainer: Trainer) -> None:
        if trainer.is_alive:
            log.warning("trainer ended: rank=%d pid=%d incarnation=%d", trainer.rank, trainer.pid, trainer.incarnation)
            trainer.is_alive = False
            self._on_death(trainer)
        self._forget_pidfd(trainer)
        self._displaced = [other for other in self._displaced if other.is_alive]

    def _forget_pidfd(self, trainer: Trainer) -> None:
        if trainer.pidfd >= 0:
            self._selector.unregister(trainer.pidfd)
            os.close(trainer.pidfd)
            trainer.pidfd = -1
