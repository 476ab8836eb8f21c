"""Cases, how many there were of each kind, and what went wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Case", "CaseError", "Tally"]


class CaseError(AssertionError):
    """A case in which a promise was broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    workflow: str
    fault: str
    where: str

    def __str__(self) -> str:
        return f"{self.workflow}: {self.fault} at {self.where}"


@dataclass(slots=True)
class Tally:
    """Cases by fault and workflow. `judged` counts the different outcomes; equal ones are judged once."""

    keep_going: bool = False
    """Collect failures instead of raising the first."""
    cases: dict[tuple[str, str], int] = field(default_factory=dict)
    judged: int = 0
    failures: list[str] = field(default_factory=list)
    _seen: set[object] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(self.cases.values())

    def count(self, case: Case) -> None:
        key = (case.fault, case.workflow)
        self.cases[key] = self.cases.get(key, 0) + 1

    def is_new(self, outcome: object) -> bool:
        """Return whether no equal outcome was judged before."""
        if outcome in self._seen:
            return False
        self._seen.add(outcome)
        self.judged += 1
        return True

    def check(self, case: Case, act: Callable[[], None]) -> None:
        """Run a check of this case; whatever it raises is the case's failure."""
        try:
            act()
        except Exception as error:
            message = f"{case}: {type(error).__name__}: {error}"
            if not self.keep_going:
                raise CaseError(message) from error
            self.failures.append(message)

    def table(self) -> str:
        """Return the numbers of cases as text: a row per fault, a column per workflow."""
        faults = list(dict.fromkeys(fault for fault, _ in self.cases))
        columns = list(dict.fromkeys(workflow for _, workflow in self.cases))
        width = max(len(fault) for fault in faults)
        widths = [max(len(column), 6) for column in columns]
        rows = ["".ljust(width) + "".join(f"  {c:>{w}}" for c, w in zip(columns, widths, strict=True)) + "     all"]
        for fault in faults:
            counts = [self.cases.get((fault, column), 0) for column in columns]
            cells = "".join(f"  {count or '-':>{w}}" for count, w in zip(counts, widths, strict=True))
            rows.append(f"{fault:<{width}}{cells}  {sum(counts):>6}")
        return "\n".join(rows)
