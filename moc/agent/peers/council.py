"""What the agents of a life's nodes know together: their reports, and the decision about each save.

Where experts take turns, a save begins with the offers of all nodes, from which all compose the same checkpoint. It is
made where every node has contributed its receipts. The lowest node puts the manifest; another one does after a while,
with the same bytes, because the manifest follows from the contributions alone. A save that fails at one node
fails at all with that node's words; one that is committed is committed, whatever was said before.
Thread: `hear` on the transport's, what blocks or tells of a save on the persist thread, the rest on the agent's main
thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from moc.agent.peers.report import Contribution, Order, Others, Report, Verdict, Wish
from moc.errors import CoordinationError, PlanDivergedError, SaveFailedError, WaitTimeoutError
from moc.host import Host
from moc.plan.freeing import Moment, Seal
from moc.plan.offers import Offer

__all__ = ["Council"]

T = TypeVar("T")

PATIENCE_S = 10.0  # each node waits so much longer than the one before it until it puts a manifest in its place
SILENCE_S = 10.0  # who has not answered for so long is away; a restart takes a second
LOOK_S = 1.0  # a waiting save looks at the clock at least this often
CONTRIBUTION_LIMIT = 4  # of the newest saves; they come one after the other


class Council:
    """The agents of one life, seen from one of them."""

    def __init__(
        self,
        *,
        node: int,
        ranks_of: Sequence[tuple[int, ...]],
        incarnation: int,
        host: Host,
        wake: Callable[[], None],
    ) -> None:
        """`ranks_of` are the ranks of each node; `wake` tells the main thread that there is something to see."""
        self.node, self.ranks_of, self.incarnation = node, tuple(ranks_of), incarnation
        self._host, self._wake = host, wake
        self._lock = threading.Lock()
        self._reports: dict[int, Report] = {}
        self._heard_s = dict.fromkeys((n for n in range(len(ranks_of)) if n != node), host.now_s())
        self._contributions: dict[Moment, Contribution] = {}
        self._offer: Offer | None = None
        self._announced: Verdict | None = None
        self._changed = host.event()
        self._end: str | None = None
        self._is_hurried = False
        self._born_ns, self._sequence = int(host.now_s() * 1e9), 0
        self._told: Report | None = None

    @property
    def is_lowest(self) -> bool:
        """Return whether this node says what is said once for the job."""
        return self.node == 0

    # The transport's thread

    def hear(self, report: Report) -> bool:
        """Take another node's report; return whether it is newer than what is known, and new."""
        with self._lock:
            self._heard_s[report.node] = self._host.now_s()
            known = self._reports.get(report.node)
            if known is not None and known.order >= report.order:
                return False
            self._reports[report.node] = report
        self._stir()
        self._wake()
        return True

    def known(self, node: int) -> Order | None:
        """Return which report of another node is known, None before the first."""
        with self._lock:
            report = self._reports.get(node)
        return None if report is None else report.order

    def note_alive(self, node: int) -> None:
        """Note that another node has been heard, with nothing new to tell."""
        with self._lock:
            self._heard_s[node] = self._host.now_s()

    # The main thread

    def report(
        self,
        url: str,
        held: Mapping[Moment, Collection[int]],
        passed: Mapping[int, Moment],
        *,
        ended: Iterable[int],
        wishes: Iterable[Wish],
        verdicts: Sequence[Verdict],
        done: Sequence[Moment] = (),
        leaning: Sequence[Moment] = (),
    ) -> Report | None:
        """Return what to tell the others, None if that is what they were told last."""
        with self._lock:
            announced, contributions = self._announced, tuple(self._contributions.values())
            offer = self._offer
        if announced is not None:
            verdicts = [*(verdict for verdict in verdicts if verdict.moment != announced.moment), announced]
        order = (self._born_ns, self._sequence)
        report = Report(
            node=self.node,
            order=order,
            url=url,
            held=tuple((moment, tuple(sorted(ranks))) for moment, ranks in sorted(held.items())),
            passed=tuple(sorted(passed.items())),
            ended=tuple(sorted(ended)),
            wishes=tuple(sorted(wishes)),
            contributions=contributions,
            verdicts=tuple(verdicts),
            done=tuple(done),
            leaning=tuple(leaning),
            offer=offer,
        )
        if report == self._told:
            return None
        self._sequence += 1
        self._told = replace(report, order=(self._born_ns, self._sequence))
        return self._told

    def others(self) -> Others:
        """Return what all others have reported, together."""
        with self._lock:
            reports = [report for _, report in sorted(self._reports.items())]
            now_s = self._host.now_s()
            silent = tuple(node for node, heard_s in sorted(self._heard_s.items()) if now_s - heard_s > SILENCE_S)
        return Others(
            seals=tuple(
                Seal(incarnation=self.incarnation, step=step, attempt=attempt, rank=rank, record=0)
                for report in reports
                for (step, attempt), ranks in report.held
                for rank in ranks
            ),
            passed={rank: moment for report in reports for rank, moment in report.passed},
            ended=frozenset(rank for report in reports for rank in report.ended),
            wishes=frozenset(wish for report in reports for wish in report.wishes),
            verdicts=tuple(verdict for report in reports for verdict in report.verdicts),
            done={report.node: report.done for report in reports},
            leaning=frozenset(moment for report in reports for moment in report.leaning),
            silent=silent,
        )

    def asked(self) -> frozenset[Moment]:
        """Return the saves that other nodes are at, or were not long ago."""
        with self._lock:
            reports = list(self._reports.values())
        offered = {report.offer.moment for report in reports if report.offer is not None}
        return frozenset(offered.union(part.moment for report in reports for part in report.contributions))

    def hurry(self) -> None:
        """Wait for silent nodes no longer: this agent is about to leave."""
        self._is_hurried = True
        self._stir()

    def close(self, reason: str) -> None:
        """End every wait: the life is over."""
        self._end = reason
        self._stir()

    # The persist thread

    def consult(self, mine: Offer, *, timeout_s: float) -> tuple[Offer, ...] | Verdict:
        """Offer for a save, and return the offers of all nodes, by node, once there are all; or the verdict.

        Blocks: for the others. Raises: as `gather` does.
        """
        with self._lock:
            self._offer = mine
        self._wake()

        def offers() -> dict[int, Offer]:
            found = {node: report.offer for node, report in self._reports.items()}
            return {node: offer for node, offer in found.items() if offer is not None and offer.moment == mine.moment}

        return self._wait_all("offers", mine.moment, mine, offers, timeout_s=timeout_s, patience_s=0.0)

    def confirm(self, mine: Offer) -> None:
        """Have the others told what this node has composed.

        Raises PlanDivergedError where another one has composed something else, before anything is written: an agent
        that is replaced may have written a part already, and a key is written with one content only.
        """
        with self._lock:
            self._offer = mine
            told = {node: report.offer for node, report in sorted(self._reports.items())}
        self._wake()
        others = {node: o.composed for node, o in told.items() if o is not None and o.moment == mine.moment}
        differing = [node for node, digest in others.items() if digest not in (None, mine.composed)]
        if differing:
            raise PlanDivergedError(f"nodes compose different checkpoints: step={mine.moment[0]} nodes={differing}")

    def withdraw(self) -> None:
        """Offer nothing any more: the save has ended here. How it has, the verdict says, and is shorter."""
        with self._lock:
            if self._offer is None:
                return
            self._offer = None
        self._wake()

    def gather(self, mine: Contribution, *, timeout_s: float) -> tuple[Contribution, ...] | Verdict:
        """Contribute to a save, and return all contributions, by node, once it is this node's turn to commit; or the
        verdict, where another one has committed.

        Blocks: for the others. Raises: SaveFailedError with the words of a node that could not, WaitTimeoutError,
        CoordinationError where the life has ended.
        """
        with self._lock:
            self._contributions.pop(mine.moment, None)
            self._contributions[mine.moment] = mine
            while len(self._contributions) > CONTRIBUTION_LIMIT:
                del self._contributions[next(iter(self._contributions))]
        self._wake()

        def parts() -> dict[int, Contribution]:
            return {
                node: part
                for node, report in self._reports.items()
                for part in report.contributions
                if part.moment == mine.moment
            }

        patience_s = PATIENCE_S * self.node
        return self._wait_all("receipts", mine.moment, mine, parts, timeout_s=timeout_s, patience_s=patience_s)

    def announce(self, verdict: Verdict) -> None:
        """Have the others told that this node has committed a save, before its own job is done with it."""
        with self._lock:
            self._announced, self._offer = verdict, None
        self._wake()

    def verdict(self, moment: Moment) -> Verdict | None:
        """Return how the others say that a save has ended; that it is committed, if one of them says so."""
        with self._lock:
            found = [v for _, report in sorted(self._reports.items()) for v in report.verdicts if v.moment == moment]
        committed = [verdict for verdict in found if verdict.error is None]
        return next(iter(committed or found), None)

    def _wait_all(
        self,
        what: str,
        moment: Moment,
        mine: T,
        others: Callable[[], dict[int, T]],
        *,
        timeout_s: float,
        patience_s: float,
    ) -> tuple[T, ...] | Verdict:
        """Return what all nodes say to a save, by node, so long after it is whole; or the verdict, if that is sooner.

        `others` reads it from the reports.
        """
        began_s = self._host.now_s()
        whole_s: float | None = None
        while True:
            changed = self._changed
            if self._end is not None:
                raise CoordinationError(self._end)
            verdict = self.verdict(moment)
            if verdict is not None:
                if verdict.error is None:
                    return verdict
                raise SaveFailedError(verdict.error)
            with self._lock:
                found = {**others(), self.node: mine}
            lacking = [node for node in range(len(self.ranks_of)) if node not in found]
            now_s = self._host.now_s()
            if not lacking:
                whole_s = now_s if whole_s is None else whole_s
                left_s = whole_s + patience_s - now_s
                if left_s <= 0:
                    return tuple(part for _, part in sorted(found.items()))
            else:
                whole_s = None
                left_s = began_s + timeout_s - now_s
                silent = self.others().silent
                if left_s <= 0 or (self._is_hurried and set(lacking) & set(silent)):
                    raise WaitTimeoutError(
                        f"nodes gave no {what}: step={moment[0]} nodes={lacking} silent={list(silent)} "
                        f"waited_s={now_s - began_s:.1f} timeout_s={timeout_s}"
                    )
            changed.wait(min(left_s, LOOK_S))

    def _stir(self) -> None:
        """Wake the save that waits."""
        with self._lock:
            changed, self._changed = self._changed, self._host.event()
        changed.set()
