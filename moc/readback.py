"""Reading back: regions of stored objects against their checksums, in bounded memory and with few requests.

Read-only. Bytes that are wrong or missing are returned as errors; only a store that gives no answer raises.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moc._native import crc32c
from moc.errors import IntegrityError, MocError, ObjectMissingError, ShardCorruptError, UsageError
from moc.format.manifest import ObjectRow
from moc.repository import Repository
from moc.store.port import Progress

__all__ = ["WRONG", "Region", "check_data", "require_crc", "windows"]

WINDOW_BYTES = 16 * 2**20  # of data in memory per reader: more leaves the processor's caches, less asks more often
GAP_BYTES = 2**20  # reading a smaller gap costs less than another request
READERS_LOCAL = 4  # never more than there are cores: the checksum is the cost
READERS_REMOTE = 8  # waiting is the cost

WRONG = (IntegrityError, ObjectMissingError, UsageError)
"""What stored bytes can raise; other storage errors say nothing about the bytes and fly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Bytes of an object's data area that one checksum covers."""

    name: str
    position: int
    length: int
    crc32c: int


def windows(regions: Iterable[Region]) -> Iterator[tuple[Region, ...]]:
    """Yield runs of regions that one read covers; a region larger than a window is a run by itself."""
    run: list[Region] = []
    for region in regions:
        end = region.position + region.length
        if run and (
            end - run[0].position > WINDOW_BYTES or region.position - run[-1].position - run[-1].length > GAP_BYTES
        ):
            yield tuple(run)
            run = []
        run.append(region)
    if run:
        yield tuple(run)


def check_data(
    repository: Repository, work: Iterable[tuple[ObjectRow, tuple[Region, ...]]], progress: Progress | None
) -> tuple[list[tuple[str, MocError]], int]:
    """Read the regions by a few threads that share one queue; each holds one window of bytes at a time.

    Return what is wrong, by key, and how many bytes were read.
    """
    queue = ((row, window) for row, regions in work for window in windows(regions))
    lock = threading.Lock()
    findings: list[tuple[str, MocError]] = []
    counts: list[int] = []

    def read_until_done() -> None:
        bytes_read = 0
        buffer = memoryview(mmap.mmap(-1, WINDOW_BYTES))  # used again and again: fresh pages cost as much as the read
        while True:
            with lock:
                row, window = next(queue, (None, ()))
            if row is None:
                break
            bytes_read += sum(region.length for region in window)
            errors = _check_window(repository, row, window, buffer, progress)
            with lock:
                findings.extend((row.key, error) for error in errors)
        counts.append(bytes_read)

    is_local = repository.store.properties.is_local
    readers = min(READERS_LOCAL, os.cpu_count() or 1) if is_local else READERS_REMOTE
    with ThreadPoolExecutor(readers, thread_name_prefix="moc-verify") as pool:
        for future in [pool.submit(read_until_done) for _ in range(readers)]:
            future.result()
    return findings, sum(counts)


def _check_window(
    repository: Repository, row: ObjectRow, window: Sequence[Region], buffer: memoryview, progress: Progress | None
) -> list[MocError]:
    first, last = window[0].position, max(region.position + region.length for region in window)
    try:
        if last - first > WINDOW_BYTES:
            (region,) = window
            require_crc(row.key, region.name, region.crc32c, _long_crc(repository, row, region, buffer, progress))
            return []
        view = buffer[: last - first]
        repository.read_range(row, first, view)
        if progress is not None:
            progress(view.nbytes)
    except WRONG as error:
        return [error]
    errors: list[MocError] = []
    for region in window:
        start = region.position - first
        try:
            require_crc(row.key, region.name, region.crc32c, crc32c(view[start : start + region.length]))
        except ShardCorruptError as error:
            errors.append(error)
    return errors


def _long_crc(
    repository: Repository, row: ObjectRow, region: Region, buffer: memoryview, progress: Progress | None
) -> int:
    """Return the checksum of a region that is too large to hold."""
    actual = 0
    for offset in range(0, region.length, WINDOW_BYTES):
        piece = buffer[: min(WINDOW_BYTES, region.length - offset)]
        repository.read_range(row, region.position + offset, piece)
        actual = crc32c(piece, actual)
        if progress is not None:
            progress(piece.nbytes)
    return actual


def require_crc(key: str, shard: str, expected: int, actual: int) -> None:
    if expected != actual:
        raise ShardCorruptError(f"checksum mismatch: {key=} {shard=} expected={expected:08x} actual={actual:08x}")
