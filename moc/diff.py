"""What differs between two checkpoints: tensors by their stored checksums, small state value by value.

Without data only headers and state blobs are read. A tensor whose shards are cut alike on both sides is equal exactly
if all checksums agree (up to a collision of CRC-32C); one that is cut differently is unknown until its data are read.
With data, every tensor that is not known to be equal is read and compared element by element, in bounded memory.
Read-only; bytes are not verified here, that is `moc.verify`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from moc._native import crc32c
from moc.format.contents import live_shards
from moc.format.manifest import Manifest, ObjectRow
from moc.format.object import ObjectHeader, StoredShard
from moc.format.relative import whole_state
from moc.format.tagged import ArrayValue
from moc.repository import Repository
from moc.state import DTYPE_BYTES
from moc.store.port import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "DIFFERENT",
    "EQUAL",
    "UNKNOWN",
    "CheckpointDiff",
    "Side",
    "StateDiff",
    "TensorDiff",
    "compare_checkpoints",
    "compare_elements",
    "layer_of",
    "open_side",
    "read_differences",
]

EQUAL, DIFFERENT, UNKNOWN = "equal", "different", "unknown"
READABLE = (DIFFERENT, UNKNOWN)
ONLY_A, ONLY_B, RESHAPED = "only in A", "only in B", "other shape"
CHUNK_ELEMENTS = 2**20  # compared at once: at most 8 MiB from each side, and twice that in double precision
READERS_LOCAL = 4
READERS_REMOTE = 8
MISSING = "(none)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two checkpoints: where it is, its manifest, and its headers in the order of the manifest."""

    repository: Repository
    manifest: Manifest
    headers: tuple[tuple[ObjectRow, ObjectHeader], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDiff:
    """One tensor of one part.

    With data: `differing` elements have other bits, and `max_abs` is the largest absolute difference of those where
    both are finite; None where it was not computed, or means nothing (dtypes of 8 bits).
    """

    tensor: str
    part: str
    dtype: str
    expert: tuple[int, int] | None
    verdict: str
    elements: int
    differing: int | None = None
    max_abs: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDiff:
    """One value of a rank's small state that differs, as text."""

    rank: int
    path: str
    a: str
    b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDiff:
    """Everything that was compared; `facts` are the manifests' fields that differ, as (name, a, b)."""

    a: Manifest
    b: Manifest
    facts: tuple[tuple[str, object, object], ...]
    shared_objects: int
    shared_bytes: int
    tensors: tuple[TensorDiff, ...]
    state: tuple[StateDiff, ...]
    state_values: int

    @property
    def is_equal(self) -> bool | None:
        """Return whether tensors and small state are the same bits; None where that is not known."""
        verdicts = {diff.verdict for diff in self.tensors}
        if self.state or verdicts - {EQUAL, UNKNOWN}:
            return False
        return None if UNKNOWN in verdicts else True

    @property
    def unequal_bytes(self) -> int:
        """Return the size of the tensors that both have and that are not known to be equal."""
        return sum(t.elements * DTYPE_BYTES[t.dtype] for t in self.tensors if t.verdict in READABLE)


def open_side(repository: Repository, manifest: Manifest) -> Side:
    """Read the headers of a checkpoint. Raises: IntegrityError, StorageError."""
    rows = manifest.objects
    with ThreadPoolExecutor(_readers(repository)) as pool:
        headers = tuple(pool.map(repository.read_header, rows))
    return Side(repository=repository, manifest=manifest, headers=tuple(zip(rows, headers, strict=True)))


def compare_checkpoints(a: Side, b: Side) -> CheckpointDiff:
    """Compare without reading data. Raises: IntegrityError, StorageError."""
    pieces_a, pieces_b = _pieces(a), _pieces(b)
    tensors = [_compare_cuts(key, pieces_a.get(key), pieces_b.get(key)) for key in sorted({*pieces_a, *pieces_b})]
    state_a, state_b = _states(a), _states(b)
    sizes_a = {row.key: row.size_bytes for row in a.manifest.objects}
    shared = [sizes_a[row.key] for row in b.manifest.objects if row.key in sizes_a]
    return CheckpointDiff(
        a=a.manifest,
        b=b.manifest,
        facts=tuple(_facts(a.manifest, b.manifest)),
        shared_objects=len(shared),
        shared_bytes=sum(shared),
        tensors=tuple(tensors),
        state=tuple(
            StateDiff(rank=rank, path=path, a=state_a.get((rank, path), MISSING), b=state_b.get((rank, path), MISSING))
            for rank, path in sorted({*state_a, *state_b})
            if state_a.get((rank, path)) != state_b.get((rank, path))
        ),
        state_values=len({*state_a, *state_b}),
    )


def read_differences(diff: CheckpointDiff, a: Side, b: Side, progress: Progress | None = None) -> CheckpointDiff:
    """Read what both have and is not known to be equal, and measure it.

    `progress` gets bytes of A, at most `CheckpointDiff.unequal_bytes`. Raises: IntegrityError, StorageError.
    """
    pieces_a, pieces_b = _pieces(a), _pieces(b)

    def measure(tensor: TensorDiff) -> TensorDiff:
        if tensor.verdict not in READABLE:
            return tensor
        key = (tensor.part, tensor.tensor)
        return _compare_data(tensor, a, b, pieces_a[key], pieces_b[key], progress)

    with ThreadPoolExecutor(min(_readers(a.repository), _readers(b.repository))) as pool:
        return replace(diff, tensors=tuple(pool.map(measure, diff.tensors)))


def layer_of(diff: TensorDiff) -> str:
    """Return the name up to its first number ("layers.3"), or its first word: what people call a layer."""
    match = re.match(r"(.*?\.\d+)(?:\.|$)", diff.tensor)
    return match[1] if match else diff.tensor.split(".")[0]


# Headers

Piece = tuple[ObjectRow, StoredShard]


def _pieces(side: Side) -> dict[tuple[str, str], list[Piece]]:
    """Return the shards of every (part, tensor), by offset."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for row, header in side.headers:
        for stored in live_shards(side.manifest, row, header):
            pieces.setdefault((stored.shard.part, stored.shard.tensor), []).append((row, stored))
    for group in pieces.values():
        group.sort(key=lambda piece: (piece[1].shard.offset, piece[1].shard.length))
    return pieces


def _compare_cuts(key: tuple[str, str], a: list[Piece] | None, b: list[Piece] | None) -> TensorDiff:
    """Return what the headers alone tell."""
    part, tensor = key
    present = a or b
    assert present, f"no shard of {tensor}"
    shard = present[0][1].shard
    expert = None if shard.expert is None else (shard.expert.layer, shard.expert.index)
    elements = sum(stored.shard.length for _, stored in present)
    if a is None or b is None:
        verdict = ONLY_B if a is None else ONLY_A
    elif (shard.dtype, shard.shape) != (b[0][1].shard.dtype, b[0][1].shard.shape):
        verdict = RESHAPED
    else:
        sums_a, sums_b = _checksums(a), _checksums(b)
        if any(sums_a[cut] != sums_b[cut] for cut in sums_a if cut in sums_b):
            verdict = DIFFERENT
        else:
            verdict = EQUAL if sums_a.keys() == sums_b.keys() else UNKNOWN
    return TensorDiff(tensor=tensor, part=part, dtype=shard.dtype, expert=expert, verdict=verdict, elements=elements)


def _checksums(pieces: Sequence[Piece]) -> dict[tuple[int, int], int]:
    return {(stored.shard.offset, stored.shard.length): stored.crc32c for _, stored in pieces if stored.shard.length}


def _facts(a: Manifest, b: Manifest) -> Iterator[tuple[str, object, object]]:
    """Yield the fields of the manifests that differ, mappings key by key."""
    plain = ("size_bytes", "tensors", "catalog_digest", "is_finite")
    for name in plain:
        if getattr(a, name) != getattr(b, name):
            yield name, getattr(a, name), getattr(b, name)
    stale_a, stale_b = ([row.to_json() for row in manifest.stale_experts] for manifest in (a, b))
    if stale_a != stale_b:
        yield "stale_experts", stale_a, stale_b
    if a.routing != b.routing:
        yield "plt", a.routing and a.routing.to_json(), b.routing and b.routing.to_json()
    for name in ("topology", "versions", "fingerprint"):
        left: Mapping[str, object] = getattr(a, name)
        right: Mapping[str, object] = getattr(b, name)
        for key in sorted({*left, *right}):
            if left.get(key) != right.get(key):
                yield f"{name}.{key}", left.get(key), right.get(key)


# Small state


def _states(side: Side) -> dict[tuple[int, str], str]:
    """Return every value of the small state as text, by rank and path."""
    dense = {header.rank: (row, header) for row, header in side.headers if header.state is not None}

    @lru_cache(maxsize=2)  # a rank's own, and the one that most are relative to
    def fetch(rank: int) -> bytes:
        return side.repository.read_state(*dense[rank])

    return {(rank, path): text for rank in dense for path, text in _leaves(whole_state(rank, dense, fetch), "")}


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of every value of a tree that holds no other; empty containers are values."""
    items: list[tuple[object, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
    if isinstance(value, ArrayValue):
        yield path, f"{value.dtype}{list(value.shape)} crc32c={crc32c(value.data):08x}"
    elif not items:
        yield path, repr(value)


# Data


def _compare_data(
    diff: TensorDiff, a: Side, b: Side, pieces_a: list[Piece], pieces_b: list[Piece], progress: Progress | None
) -> TensorDiff:
    """Read what may differ and count."""
    sums_b = _checksums(pieces_b)
    width = DTYPE_BYTES[diff.dtype]
    differing, largest = 0, None
    for piece in pieces_a:
        shard = piece[1].shard
        if sums_b.get((shard.offset, shard.length)) == piece[1].crc32c:
            continue  # the same cut with the same checksum
        end = shard.offset + shard.length
        for first in range(shard.offset, end, CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, end - first)
            left, right = (_read(side, own, first, count, width) for side, own in ((a, [piece]), (b, pieces_b)))
            found, most = compare_elements(left, right, diff.dtype)
            differing += found
            largest = most if largest is None else largest if most is None else max(largest, most)
            if progress is not None:
                progress(count * width)
    if not differing:
        return replace(diff, verdict=EQUAL, differing=0, max_abs=0.0)
    return replace(diff, verdict=DIFFERENT, differing=differing, max_abs=largest)


def _read(side: Side, pieces: Sequence[Piece], first: int, count: int, width: int) -> bytearray:
    """Return elements `first` to `first + count` of a tensor, from however many shards they lie in."""
    data = bytearray(count * width)
    view = memoryview(data)
    for row, stored in pieces:
        start = max(first, stored.shard.offset)
        end = min(first + count, stored.shard.offset + stored.shard.length)
        if start < end:
            position = stored.position + (start - stored.shard.offset) * width
            side.repository.read_range(row, position, view[(start - first) * width : (end - first) * width])
    return data


def compare_elements(left: bytearray, right: bytearray, dtype: str) -> tuple[int, float | None]:
    """Return how many elements differ in their bits, and the largest difference where both are finite. Pure."""
    import numpy as np  # only with --read-data: comparing headers stays quick

    word = f"<u{DTYPE_BYTES[dtype]}"
    bits = np.frombuffer(left, word) != np.frombuffer(right, word)
    differing = int(np.count_nonzero(bits))
    decode = _decoder(dtype)
    if not differing or decode is None:
        return differing, None
    a, b = decode(left)[bits], decode(right)[bits]
    are_finite = np.isfinite(a) & np.isfinite(b)
    finite = np.abs(a[are_finite] - b[are_finite])
    return differing, float(finite.max()) if finite.size else None


def _decoder(dtype: str) -> Callable[[bytearray], npt.NDArray[np.float64]] | None:
    """Return how to read a dtype as double precision; None for the floats of 8 bits, which numpy does not know."""
    import numpy as np

    if dtype == "BF16":
        return lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype.startswith("F8"):
        return None
    code = "u1" if dtype == "BOOL" else f"<{dtype[0].lower()}{DTYPE_BYTES[dtype]}"
    return lambda data: np.frombuffer(data, code).astype(np.float64)


def _readers(repository: Repository) -> int:
    return min(READERS_LOCAL, os.cpu_count() or 1) if repository.store.properties.is_local else READERS_REMOTE
