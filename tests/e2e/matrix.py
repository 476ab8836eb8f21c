"""The combinations of the end-to-end tests: a pairwise covering set, computed; without torch, to collect quickly."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations, product

__all__ = ["CASES", "FACTORS", "QUICK", "Case", "admissible_pairs", "pairs_of"]

FACTORS: dict[str, tuple[object, ...]] = {
    "model": ("grouped", "native", "dense"),
    "zero": ("1", "2", "bf16"),
    "dtype": ("fp32", "bf16"),
    "ranks": (2, 4),
    "accumulation": (1, 3),
    "optimizer": ("adamw", "cpu_adam"),
    "skips": (True, False),
    "boundary": ("step", "hook"),
    "killed": ("one", "all"),
    "source": ("memory", "storage"),
}
QUICK_COUNT = 4
TRIES = 60  # candidates for each row of the set; more make it smaller at the cost of time when tests are collected


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: the engine, what happens to it, and where it is recovered from.

    model: our grouped layer, DeepSpeed's own, or no experts. zero: the stage, or "bf16" for BF16_Optimizer. skips: a
    NaN makes DeepSpeed skip one update before the kill and one after it. boundary: `manager.step()` with averaged
    weights after `engine.step()`, or the hook.
    """

    model: str
    zero: str
    dtype: str
    ranks: int
    accumulation: int
    optimizer: str
    skips: bool
    boundary: str
    killed: str
    source: str

    @property
    def name(self) -> str:
        zero = "bf16opt" if self.zero == "bf16" else f"zero{self.zero}"
        skips = "nan" if self.skips else "plain"
        return (
            f"{self.ranks}r-{self.model}-{self.dtype}-{zero}-{self.optimizer}-acc{self.accumulation}-{skips}-{self.boundary}"
            f"-{self.killed}-{self.source}"
        )


Pair = tuple[tuple[str, object], tuple[str, object]]


def is_possible(values: dict[str, object]) -> bool:
    """Return whether DeepSpeed makes such an engine: BF16_Optimizer exists for bf16 alone."""
    return not (values.get("zero") == "bf16" and values.get("dtype") == "fp32")


def pairs_of(values: dict[str, object]) -> set[Pair]:
    """Return the pairs of settings that a combination has."""
    return set(combinations(values.items(), 2))


def admissible_pairs() -> set[Pair]:
    """Return all pairs that some possible combination has."""
    names = list(FACTORS)
    return {
        ((a, x), (b, y))
        for a, b in combinations(names, 2)
        for x, y in product(FACTORS[a], FACTORS[b])
        if is_possible({a: x, b: y})
    }


def covering_set(seed: int) -> list[dict[str, object]]:
    """Return combinations that have every admissible pair, greedily: of some candidates, that which adds most pairs."""
    chance = random.Random(seed)
    missing = admissible_pairs()
    rows: list[dict[str, object]] = []
    while missing:
        first = min(missing, key=repr) if len(missing) < 12 else chance.choice(sorted(missing, key=repr))
        candidates = [_grown(dict(first), missing, chance) for _ in range(TRIES)]
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append(best)
    return rows


def _grown(row: dict[str, object], missing: set[Pair], chance: random.Random) -> dict[str, object]:
    names = [name for name in FACTORS if name not in row]
    chance.shuffle(names)
    for name in names:
        values = [value for value in FACTORS[name] if is_possible(row | {name: value})]
        chance.shuffle(values)
        row = row | {name: max(values, key=lambda v: len(_ordered_pairs(row | {name: v}) & missing))}
    return {name: row[name] for name in FACTORS}


def _ordered_pairs(row: dict[str, object]) -> set[Pair]:
    return pairs_of({name: row[name] for name in FACTORS if name in row})


def _most_telling(rows: Iterable[dict[str, object]], count: int) -> list[dict[str, object]]:
    """Return the rows that together have most pairs, one after the other."""
    left, chosen, covered = list(rows), [], set()
    for _ in range(count):
        best = max(left, key=lambda row: len(pairs_of(row) - covered))
        left.remove(best)
        chosen.append(best)
        covered |= pairs_of(best)
    return chosen


_ROWS = min((covering_set(seed) for seed in range(8)), key=len)
CASES = tuple(Case(**row) for row in _ROWS)  # type: ignore[arg-type]  # the factors are the fields
QUICK = tuple(Case(**row) for row in _most_telling((asdict(case) for case in CASES), QUICK_COUNT))
