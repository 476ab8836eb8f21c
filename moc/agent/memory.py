"""How much memory a process may still take: what the machine has free, and what every cgroup above it leaves.

Both hierarchies count, version 2 (`memory.max`, `memory.high`) and version 1 (`memory.limit_in_bytes`), through
whatever mount the process sees. Page cache that the kernel would give up first counts as free: a container that has
read its data set is not full. Reads /proc and /sys and imports nothing of moc.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Room", "available_memory"]

# Of memory.high the kernel only says that it slows down who exceeds it: without swap, to a standstill.
LIMITS_V2 = ("memory.max", "memory.high")
LIMITS_V1 = ("memory.limit_in_bytes",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What may still be taken, and what sets the limit."""

    size_bytes: int
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hierarchy:
    """A mounted cgroup hierarchy with a memory controller, and the names of its files."""

    mount: Path
    root: str
    limits: tuple[str, ...]
    used: str
    reclaimable: str


def available_memory(top: Path = Path("/")) -> Room:
    """Return the tightest limit for this process; `top` is where /proc and /sys are."""
    rows = dict(line.split(":", 1) for line in (top / "proc/meminfo").read_text().splitlines())
    rooms = [Room(size_bytes=int(rows["MemAvailable"].split()[0]) * 1024, limit="free memory of the machine")]
    for hierarchy, path in _memberships(top):
        for folder in _levels(hierarchy, path):
            rooms += _rooms(hierarchy, folder)
    return min(rooms, key=lambda room: room.size_bytes)


def _memberships(top: Path) -> Iterator[tuple[_Hierarchy, str]]:
    """Yield the mounted memory hierarchies with this process's path in each."""
    hierarchies = _mounted(top)
    for line in (top / "proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        kind = "cgroup2" if number == "0" else "cgroup" if "memory" in controllers.split(",") else None
        if kind in hierarchies:
            yield hierarchies[kind], path


def _mounted(top: Path) -> dict[str | None, _Hierarchy]:
    found: dict[str | None, _Hierarchy] = {}
    for line in (top / "proc/self/mountinfo").read_text().splitlines():
        place, _, origin = line.partition(" - ")
        kind, *_, options = origin.split(" ")  # what lies between may be empty
        root, point = place.split()[3:5]
        mount = top / point.lstrip("/")
        if kind == "cgroup2":
            found[kind] = _Hierarchy(
                mount=mount, root=root, limits=LIMITS_V2, used="memory.current", reclaimable="inactive_file"
            )
        elif kind == "cgroup" and "memory" in options.split(","):
            found[kind] = _Hierarchy(
                mount=mount,
                root=root,
                limits=LIMITS_V1,
                used="memory.usage_in_bytes",
                reclaimable="total_inactive_file",
            )
    return found


def _levels(hierarchy: _Hierarchy, path: str) -> list[Path]:
    """Return the folders from this process's cgroup up to the mount; a container may see no more than its own."""
    root = hierarchy.root.rstrip("/")
    inner = path[len(root) :] if path == root or path.startswith(f"{root}/") else ""
    folder = Path(os.path.normpath(hierarchy.mount / inner.lstrip("/")))
    if not folder.is_relative_to(hierarchy.mount) or not folder.exists():
        folder = hierarchy.mount
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(hierarchy.mount))]


def _rooms(hierarchy: _Hierarchy, folder: Path) -> Iterator[Room]:
    used = folder / hierarchy.used
    for name in hierarchy.limits:
        limit = folder / name
        if not used.exists() or not limit.exists() or limit.read_text().strip() == "max":
            continue
        held_bytes = int(used.read_text()) - _reclaimable_bytes(folder, hierarchy.reclaimable)
        limit_bytes = int(limit.read_text())
        yield Room(size_bytes=max(limit_bytes - held_bytes, 0), limit=f"{limit}={limit_bytes}, {held_bytes} held")


def _reclaimable_bytes(folder: Path, name: str) -> int:
    stat = folder / "memory.stat"
    rows = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(rows.get(name, 0))
