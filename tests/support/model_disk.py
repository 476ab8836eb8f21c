"""A disk in memory, with everything that POSIX lets a power loss do to what was not synced.

Faults of a power loss, each chosen by a `Survival`:

- a file's bytes that no fsync of that file covered are lost, whole or by sectors of 512 bytes (a torn write);
- its length may survive without its bytes: the file then has zeros or garbage where they were;
- bytes written past the page cache are on the disk at once, and yet out of reach until the length is;
- a name made, given or taken away (create, link, rename, unlink, mkdir, rmdir) that no fsync of that directory covered
  is lost or kept, each by itself, in any combination, across and within directories;
- fsync of a file does not cover its name, fsync of a directory covers neither what is below nor its own name;
- after an fsync that failed, the bytes it should have covered are never written by a later one.

A process that dies without a power loss loses nothing. Nodes are frozen values, so a copy of the disk is cheap.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

__all__ = [
    "SECTOR_BYTES",
    "SURVIVALS",
    "Change",
    "Directory",
    "Disk",
    "File",
    "Survival",
    "Write",
    "subsets",
    "without_token",
]

SECTOR_BYTES = 512
ROOT = 1
_TOKEN = re.compile(rb'"token":"[0-9a-f]{8}"|"crc32c":[0-9]+')
_TEMPORARY = re.compile(r"~\d+-[0-9a-f]{8}$")

Choice = Callable[[int, int], bool]
"""Whether the unsynced thing `index` of `count` survives; they are numbered in the order in which they were done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """Which unsynced things a power loss spares."""

    name: str
    names: Choice
    lengths: Choice
    sectors: Choice
    filler: bytes = b"\0"


def _never(_index: int, _count: int) -> bool:
    return False


def _always(_index: int, _count: int) -> bool:
    return True


def _early(index: int, count: int) -> bool:
    return index < (count + 1) // 2


def _late(index: int, count: int) -> bool:
    return index >= count // 2


def _seeded(seed: int) -> Survival:
    bits = [random.Random(f"{seed}/{what}").getrandbits(1024) for what in ("names", "lengths", "sectors")]
    names, lengths, sectors = ((lambda index, _count, b=b: bool(b >> index % 1024 & 1)) for b in bits)
    return Survival(name=f"seed-{seed}", names=names, lengths=lengths, sectors=sectors, filler=b"\xa5")


SURVIVALS = (
    Survival(name="nothing", names=_never, lengths=_never, sectors=_never),
    Survival(name="early", names=_early, lengths=_always, sectors=_early, filler=b"\xa5"),
    Survival(name="names", names=_always, lengths=_never, sectors=_never),
    Survival(name="lengths", names=_always, lengths=_always, sectors=_never),
    Survival(name="late", names=_late, lengths=_always, sectors=_late),
    Survival(name="everything", names=_always, lengths=_always, sectors=_always),
    *(_seeded(seed) for seed in (1, 2, 3)),
)


def subsets(count: int) -> Iterator[Survival]:
    """Yield every combination of `count` unsynced names, with no unsynced byte."""
    for mask in range(1 << count):
        yield Survival(
            name=f"names-{mask:0{count}b}",
            names=lambda index, _count, mask=mask: bool(mask >> index & 1),
            lengths=_always,
            sectors=_never,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Bytes written but not synced; `content` is None where space was only reserved."""

    offset: int
    length: int
    content: bytes | None
    is_direct: bool = False
    is_lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file: what is on the disk, what everybody sees, and what lies between."""

    durable: bytes = b""
    content: bytes = b""
    writes: tuple[Write, ...] = ()
    modified_s: float

    def written(self, write: Write, now_s: float) -> File:
        end = write.offset + write.length
        content = self.content.ljust(end, b"\0")
        if write.content is not None:
            content = content[: write.offset] + write.content + content[end:]
        return replace(self, content=content, writes=(*self.writes, write), modified_s=now_s)

    def synced(self) -> File:
        lost = tuple(write for write in self.writes if write.is_lost)
        if not lost:
            return replace(self, durable=self.content, writes=())
        kept = self.surviving(lambda _: True, has_length=True, filler=b"\0")
        return replace(self, durable=kept, writes=lost)

    def unsyncable(self) -> File:
        """Return the file after an fsync that failed: its pages count as clean, and are not written again."""
        return replace(self, writes=tuple(replace(write, is_lost=True) for write in self.writes))

    def surviving(self, keeps_sector: Callable[[int], bool], *, has_length: bool, filler: bytes) -> bytes:
        length = len(self.content) if has_length else len(self.durable)
        content = bytearray(self.durable + filler * (length - len(self.durable)))
        sector = 0
        for write in self.writes:
            for start in range(0, write.length, SECTOR_BYTES) if write.content is not None else ():
                stop = min(start + SECTOR_BYTES, write.length)
                if not write.is_lost and (write.is_direct or keeps_sector(sector)):
                    begin, end = write.offset + start, min(write.offset + stop, length)
                    content[begin : max(begin, end)] = write.content[start : start + max(0, end - begin)]
                sector += 1
        return bytes(content)

    @property
    def sector_count(self) -> int:
        return sum(-(-write.length // SECTOR_BYTES) for write in self.writes if write.content is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One atomic change of a directory; a rename is both an added and a removed name."""

    number: int
    added: tuple[str, int] | None
    removed: str | None

    def applied(self, entries: Mapping[str, int]) -> dict[str, int]:
        changed = dict(entries)
        if self.removed is not None:
            changed.pop(self.removed, None)
        if self.added is not None:
            changed[self.added[0]] = self.added[1]
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """A directory: the names on the disk, the names that everybody sees, and the changes between them."""

    durable: Mapping[str, int] = field(default_factory=dict)
    entries: Mapping[str, int] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    modified_s: float

    def changed(self, change: Change, now_s: float) -> Directory:
        return replace(self, entries=change.applied(self.entries), changes=(*self.changes, change), modified_s=now_s)

    def synced(self) -> Directory:
        return replace(self, durable=self.entries, changes=())


Node = File | Directory


class Disk:
    """Files and directories by inode number. Not thread-safe: a `ModelFilesystem` locks."""

    def __init__(self, *folders: str) -> None:
        """`folders` are absolute paths that exist durably from the beginning."""
        self.nodes: dict[int, Node] = {ROOT: Directory(modified_s=0.0)}
        self.now_s = 1_000_000.0
        self._next, self._changes = ROOT + 1, 0
        for path in folders:
            parent, number = ROOT, ROOT
            for name in path.strip("/").split("/"):
                number = self.directory(parent).entries.get(name, 0) or self.add(Directory(modified_s=self.now_s))
                self.change(parent, added=(name, number))
                self.nodes[parent] = self.directory(parent).synced()
                parent = number

    def copy(self) -> Disk:
        """Return the disk as a process that comes next finds it: nothing written is lost."""
        twin = Disk.__new__(Disk)
        twin.nodes, twin.now_s = dict(self.nodes), self.now_s
        twin._next, twin._changes = self._next, self._changes
        return twin

    def directory(self, number: int) -> Directory:
        node = self.nodes[number]
        if not isinstance(node, Directory):
            raise NotADirectoryError(20, "not a directory")
        return node

    def file(self, number: int) -> File:
        node = self.nodes[number]
        assert isinstance(node, File)
        return node

    def add(self, node: Node) -> int:
        self._next += 1
        self.nodes[self._next - 1] = node
        return self._next - 1

    def change(self, parent: int, *, added: tuple[str, int] | None = None, removed: str | None = None) -> None:
        self._changes += 1
        change = Change(number=self._changes, added=added, removed=removed)
        self.nodes[parent] = self.directory(parent).changed(change, self.tick())

    def tick(self) -> float:
        self.now_s += 0.001
        return self.now_s

    # Power loss

    def unsynced_names(self) -> int:
        """Return how many changes of directories a power loss may undo."""
        return sum(len(node.changes) for node in self.nodes.values() if isinstance(node, Directory))

    def after_power_loss(self, survival: Survival) -> Disk:
        """Return the disk as it is once the power is back."""
        numbers = sorted(c.number for node in self.nodes.values() if isinstance(node, Directory) for c in node.changes)
        order = {number: index for index, number in enumerate(numbers)}
        unsynced = [number for number, node in sorted(self.nodes.items()) if isinstance(node, File) and node.writes]
        sectors = sum(self.file(number).sector_count for number in unsynced)
        reached = 0
        after = self.copy()
        for number, node in self.nodes.items():
            if isinstance(node, Directory) and node.changes:
                entries = dict(node.durable)
                for change in node.changes:
                    if survival.names(order[change.number], len(order)):
                        entries = change.applied(entries)
                after.nodes[number] = replace(node, durable=entries, entries=entries, changes=())
        for index, number in enumerate(unsynced):
            file, first = self.file(number), reached
            reached += file.sector_count
            content = file.surviving(
                lambda sector, first=first: survival.sectors(first + sector, sectors),
                has_length=survival.lengths(index, len(unsynced)),
                filler=survival.filler,
            )
            after.nodes[number] = replace(file, durable=content, content=content, writes=())
        after._forget_unreachable()
        return after

    def _forget_unreachable(self) -> None:
        reached, pending = {ROOT}, [ROOT]
        while pending:
            node = self.nodes[pending.pop()]
            for number in node.entries.values() if isinstance(node, Directory) else ():
                if number not in reached:
                    reached.add(number)
                    pending.append(number)
        self.nodes = {number: node for number, node in self.nodes.items() if number in reached}

    # Looking

    def walk(self, folder: int = ROOT, path: str = "") -> Iterator[tuple[str, Node]]:
        """Yield the path and node of everything that can be seen, by name."""
        node = self.directory(folder)
        for name, number in sorted(node.entries.items()):
            yield f"{path}/{name}", self.nodes[number]
            if isinstance(self.nodes[number], Directory):
                yield from self.walk(number, f"{path}/{name}")

    def files(self) -> dict[str, bytes]:
        """Return the content of every file that can be seen, by path."""
        return {path: node.content for path, node in self.walk() if isinstance(node, File)}

    def picture(self, *, is_durable: bool = False) -> tuple[object, ...]:
        """Return a value that is equal for disks that no program can tell apart, or no power loss with `is_durable`.

        The random parts of temporary names and of records are left out, so that two runs of one workflow compare.
        """
        rows: list[object] = []
        for path, node in self.walk():
            visible = without_token(node.content) if isinstance(node, File) else None
            row: tuple[object, ...] = (_TEMPORARY.sub("~", path), visible)
            if is_durable:
                row = (*row, *((without_token(node.durable), len(node.writes)) if isinstance(node, File) else ()))
                row = (*row, *(_unnumbered(node) if isinstance(node, Directory) else ()))
            rows.append(row)
        return tuple(rows)


def without_token(content: bytes) -> bytes:
    """Return an incarnation record without what chance has put into it; anything else as it is."""
    return _TOKEN.sub(b"", content) if content.startswith(b'{"body":{"fingerprint"') else content


def _unnumbered(node: Directory) -> tuple[object, ...]:
    def plain(name: str | None) -> str:
        return _TEMPORARY.sub("~", name or "")

    return tuple((plain(c.added[0] if c.added else None), plain(c.removed)) for c in node.changes)
