"""Which step every expert of a checkpoint comes from: rows for programs, and a map of 80 columns for people. Pure.

In the map each MoE layer is a line and each expert a mark: a dot is of the checkpoint's own step, digits are older the
greater they are. Where there are more experts than columns, or more layers than lines, a mark stands for the oldest of
its neighbours.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from moc.format.manifest import Manifest
from moc.routing import Routing, lose

__all__ = ["Steps", "expert_map", "experts_json", "if_restored", "staleness_facts", "staleness_json"]

COLUMNS = 80
MARKS = 60  # on a line: with the layers' numbers before them and a count behind them, 80 columns
LINES = 20  # a map fits a screen
LEVELS = 9  # digits
FRESH = "."
NUMBER_COLUMNS = 9
UNITS = ("", "k", "M", "G", "T", "P", "E")

Steps = Mapping[int, Sequence[int]]
"""By MoE layer the step of each expert's bytes."""


def if_restored(manifest: Manifest) -> Routing | None:
    """Return the routes as they would be counted after this checkpoint is restored; None where nothing counts them."""
    routing = manifest.routing
    if routing is None:
        return None
    lost_at = {
        row.expert: min(row.routed, routing.learned[row.expert.layer][row.expert.index])
        for row in manifest.stale_experts
        if row.expert.layer < len(routing.shape) and row.expert.index < routing.shape[row.expert.layer]
    }
    return lose(routing, lost_at)


def experts_json(steps: Steps) -> list[dict[str, object]]:
    """Return one row per layer."""
    return [{"layer": layer, "steps": list(row)} for layer, row in sorted(steps.items())]


def staleness_json(manifest: Manifest, steps: Steps) -> dict[str, object]:
    """Return how far experts are behind, and what that costs where routes are counted."""
    behind = [age for row in _ages(manifest, steps).values() for age in row]
    before, after = manifest.routing, if_restored(manifest)
    return {
        "oldest_step": manifest.name.step - max(behind, default=0),
        "mean_steps_behind": sum(behind) / max(len(behind), 1),
        "plt": before and before.plt,
        "plt_if_restored": after and after.plt,
        "lost_if_restored": _lost_if_restored(manifest),
    }


def staleness_facts(manifest: Manifest, steps: Steps) -> list[tuple[str, str]]:
    """Return the same in words."""
    behind = [age for row in _ages(manifest, steps).values() for age in row]
    routing, after = manifest.routing, if_restored(manifest)
    facts = []
    if any(behind):
        stale = sum(age > 0 for age in behind)
        mean = sum(behind) / len(behind)
        words = f"{stale} of {len(behind)} experts, the oldest {max(behind)} steps, on average {mean:.1f}"
        facts.append(("behind", words))
    if routing is not None and after is not None:
        more = f", {100 * after.plt:.3g} % if restored" if manifest.stale_experts else ""
        facts.append(("PLT", f"{100 * routing.plt:.3g} %{more} (routes counted: {routing.basis})"))
    return facts


def expert_map(manifest: Manifest, steps: Steps) -> list[str]:
    """Return the lines of the map; none where all experts are of the checkpoint's own step."""
    ages = _ages(manifest, steps)
    bounds = _bounds(sorted({age for row in ages.values() for age in row if age}))
    if not bounds:
        return []
    lost = _lost_if_restored(manifest)
    experts = max(map(len, ages.values()))
    per_mark, per_line = -(-experts // MARKS), -(-len(ages) // LINES)
    lines = [_title(experts, per_mark, has_lost=lost is not None)]
    for group in _groups(list(ages), per_line):
        marks = "".join(
            _mark(max(age for layer in group for age in ages[layer][first : first + per_mark]), bounds)
            for first in range(0, max(len(ages[layer]) for layer in group), per_mark)
        )
        name = str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"
        count = "" if lost is None else _short(sum(lost[layer] for layer in group if layer < len(lost)))
        width = min(experts, -(-experts // per_mark))
        lines.append(f"{name:>{NUMBER_COLUMNS}} {marks:<{width}}{count:>{NUMBER_COLUMNS}}".rstrip())
    return lines + _legend(ages, bounds, manifest.name.step)


def _ages(manifest: Manifest, steps: Steps) -> dict[int, list[int]]:
    """Return how many steps each expert is behind; headers that nobody has checked may say anything."""
    newest = manifest.name.step
    return {layer: [max(newest - step, 0) for step in row] for layer, row in sorted(steps.items())}


def _lost_if_restored(manifest: Manifest) -> list[int] | None:
    """Return by layer the routes whose updates a restore would lose."""
    before, after = manifest.routing, if_restored(manifest)
    if before is None or after is None:
        return None
    return [int(more - less) for less, more in zip(before.lost, after.lost, strict=True)]


def _bounds(ages: Sequence[int]) -> list[int]:
    """Return the greatest age of each level: one level for each age, or where there are more, levels of equal width."""
    if len(ages) <= LEVELS:
        return list(ages)
    return sorted({-(-ages[-1] * level // LEVELS) for level in range(1, LEVELS + 1)})


def _mark(age: int, bounds: Sequence[int]) -> str:
    return FRESH if not age else str(1 + bisect_left(bounds, age))


def _title(experts: int, per_mark: int, *, has_lost: bool) -> str:
    words = f"experts 0-{experts - 1}" + (f", {per_mark} to a mark, which shows the oldest" if per_mark > 1 else "")
    return f"{'layer':>{NUMBER_COLUMNS}} {words}" + (", and the routes lost if restored" if has_lost else "")


def _legend(ages: Mapping[int, Sequence[int]], bounds: Sequence[int], newest: int) -> list[str]:
    """Return which steps each mark stands for, newest first."""
    entries = [f"{FRESH} step {newest}"]
    known = sorted({age for row in ages.values() for age in row if age})
    for level, bound in enumerate(bounds):
        reached = [age for age in known if age <= bound and (not level or age > bounds[level - 1])]
        if reached:
            first, last = newest - reached[-1], newest - reached[0]
            entries.append(f"{level + 1} " + (f"step {first}" if first == last else f"steps {first}-{last}"))
    unbroken = [entry.replace(" ", "\0") for entry in entries]
    lines = textwrap.wrap(", ".join(unbroken), COLUMNS - NUMBER_COLUMNS - 1)
    return [" " * (NUMBER_COLUMNS + 1) + line.replace("\0", " ") for line in lines]


def _groups(layers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(layers), size):
        yield layers[first : first + size]


def _short(count: int) -> str:
    """Return a count in at most five letters."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}{UNITS[unit]}"
