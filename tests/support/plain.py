"""A real training state without torch, and a real world without gloo, for the production workflows in the crash tests.

`PlainState` holds numbers in plain memory, split over ranks as ZeRO splits masters and moments: dense tensors over all
ranks, experts over their expert-data-parallel ranks. Each optimizer step is a function of the step and the old values,
so any state can be recomputed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import socket
import struct
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moc._native import copy_crc32c
from moc.errors import UsageError
from moc.format.tagged import ArrayValue
from moc.state import Expert, RankCatalog, Shard, shard_order

DENSE_ELEMENTS = 20_011  # a prime: no split is even
EXPERT_ELEMENTS = 3_001
LAYERS, EXPERTS = 2, 4
PARTS = ("exp_avg", "exp_avg_sq", "master")


class ArrayState:
    """What training states over numpy arrays share: `values` are the shards, `noise` is the rank's own small state."""

    step: int
    values: list[np.ndarray]
    noise: np.ndarray
    routes = None
    _shards: tuple[Shard, ...]

    @property
    def needed(self) -> tuple[Shard, ...]:
        return self._shards

    def begin_restore(self) -> None:
        """Everything has its memory already."""

    def write_shard(self, index: int, offset: int, view: memoryview) -> None:
        target = self.values[index]
        source = np.frombuffer(view, dtype=np.uint8)
        ctypes.memmove(target.ctypes.data + 4 * offset, source.ctypes.data, view.nbytes)

    def apply(self, tree: Mapping[str, object]) -> None:
        step = tree["step"]
        assert isinstance(step, int)
        self.step = step

    def derive_weights(self) -> None:
        """The values are the weights."""

    def finish_restore(self, tree: Mapping[str, object], *, exact_rank: bool) -> None:
        noise = tree["noise"]
        assert isinstance(noise, ArrayValue)
        if exact_rank:
            self.noise = np.frombuffer(bytes(noise.data), dtype=np.int64).copy()


class PlainState(ArrayState):
    """TrainingState over numpy arrays; `ranks` share one logical model."""

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        layers: int = LAYERS,
        experts: int = EXPERTS,
        scale: int = 1,
        dense_elements: int = DENSE_ELEMENTS,
        expert_elements: int = EXPERT_ELEMENTS,
        model: str = "plain",
        cut: tuple[Shard, ...] | None = None,
    ) -> None:
        """`cut` are the rank's shards of a model that is cut in another way."""
        self.rank, self.size, self._model = rank, size, model
        shards = []
        for part in PARTS:
            shards.append(split_tensor("embed.weight", part, dense_elements * scale, rank, size, None))
            for layer in range(layers):
                for index in range(experts):
                    # Experts alternate over two expert-parallel ranks where there are two, split over the replicas.
                    ep = 2 if size % 2 == 0 else 1
                    if index % ep == rank % ep:
                        shards.append(
                            split_tensor(
                                f"layers.{layer}.experts.{index}.w",
                                part,
                                expert_elements * scale,
                                rank // ep,
                                size // ep,
                                Expert(layer=layer, index=index),
                            )
                        )
        self._shards = tuple(sorted((s for s in shards if s.length), key=shard_order)) if cut is None else cut
        self.values = [np.zeros(shard.length, dtype=np.float32) for shard in self._shards]
        for shard, value in zip(self._shards, self.values, strict=True):
            value[:] = _initial(shard)
        self._sources = np.array([value.ctypes.data for value in self.values], dtype=np.uint64)
        self._lengths = np.array([value.nbytes for value in self.values], dtype=np.uint64)
        self.step = 0
        self.defect_at: int | None = None
        self.copy_defect_at: int | None = None
        self.is_between = False
        self.noise = np.arange(8, dtype=np.int64) + 100 * rank

    @property
    def catalog(self) -> RankCatalog:
        return RankCatalog(rank=self.rank, shards=self._shards, state_capacity_bytes=65536)

    @property
    def fingerprint(self) -> Mapping[str, object]:
        return {"model": self._model}

    def advance(self) -> None:
        """Do one optimizer step."""
        self.step += 1
        for value in self.values:
            value *= np.float32(0.999)
            value += np.float32(self.step % 97) * np.float32(0.001)
        self.noise = self.noise * 3 % 1_000_003

    def digest(self) -> str:
        """Return a text that is equal for equal states of this rank."""
        return hashlib.sha256(self.tensor_digest().encode() + self.noise.tobytes()).hexdigest()[:16]

    def tensor_digest(self) -> str:
        """Return a text that is equal for equal steps and tensors: what survives a change of the number of ranks."""
        digest = hashlib.sha256(str(self.step).encode())
        for value in self.values:
            digest.update(value.tobytes())
        return digest.hexdigest()[:16]

    def copy_shards(self, targets: array[int], crcs: array[int]) -> None:
        if self.step == self.copy_defect_at:
            raise RuntimeError(f"memory cannot be read at step {self.step}")
        goals, sums = np.frombuffer(targets, dtype=np.uint64), np.frombuffer(crcs, dtype=np.uint32)
        wanted = np.flatnonzero(goals)
        found = np.zeros(len(wanted), dtype=np.uint32)
        copy_crc32c(self._sources[wanted], goals[wanted], self._lengths[wanted], found)
        sums[wanted] = found

    def capture(self) -> dict[str, object]:
        if self.is_between:
            raise UsageError("not at the boundary of a step")
        if self.step == self.defect_at:
            raise RuntimeError(f"what belongs to the loop cannot be saved at step {self.step}")
        noise = ArrayValue(dtype="I64", shape=(8,), kind="numpy", data=memoryview(self.noise).cast("B"))
        return {"step": self.step, "noise": noise, "note": f"rank {self.rank}"}


def expected_digest(rank: int, size: int, step: int) -> str:
    """Return the digest of a rank after `step` undisturbed steps."""
    return _undisturbed(rank, size).at(step)[0]


def expected_tensors(rank: int, size: int, step: int) -> str:
    """Return the digest of a rank's tensors after `step` undisturbed steps."""
    return _undisturbed(rank, size).at(step)[1]


def mixed_tensors(rank: int, size: int, step: int, versions: Mapping[Expert, int], further: int = 0) -> str:
    """Return the digest of a rank's tensors after `step` undisturbed steps, some experts having done only as many as
    said, and `further` steps from there.
    """
    state = PlainState(rank, size)
    values: dict[int, np.ndarray] = {}
    for done in range(step + 1):
        for index, shard in enumerate(state.needed):
            if done == (step if shard.expert is None else versions.get(shard.expert, step)):
                values[index] = state.values[index].copy()
        if done < step:
            state.advance()
    for index, value in values.items():
        state.values[index][:] = value
    for _ in range(further):
        state.advance()
    return state.tensor_digest()


class _Undisturbed:
    """The digests of an undisturbed run, computed as far as somebody has asked."""

    def __init__(self, rank: int, size: int) -> None:
        self._state = PlainState(rank, size)
        self._digests = [(self._state.digest(), self._state.tensor_digest())]

    def at(self, step: int) -> tuple[str, str]:
        while len(self._digests) <= step:
            self._state.advance()
            self._digests.append((self._state.digest(), self._state.tensor_digest()))
        return self._digests[step]


@functools.cache
def _undisturbed(rank: int, size: int) -> _Undisturbed:
    return _Undisturbed(rank, size)


def split_tensor(tensor: str, part: str, elements: int, index: int, count: int, expert: Expert | None) -> Shard:
    """Return part `index` of `count` nearly equal parts of a tensor."""
    share = -(-elements // count)
    offset = min(index * share, elements)
    length = min(share, elements - offset)
    return Shard(tensor=tensor, part=part, dtype="F32", shape=(elements,), offset=offset, length=length, expert=expert)


def _initial(shard: Shard) -> np.ndarray:
    seed = sum(map(ord, shard.tensor + shard.part))
    return np.random.default_rng(seed).standard_normal(shard.shape[0], dtype=np.float32)[
        shard.offset : shard.offset + shard.length
    ]


class SocketWorld:
    """World over Unix sockets: rank 0 gathers and answers. A dead rank ends every call with ConnectionError."""

    def __init__(self, rank: int, size: int, path: Path, *, timeout_s: float = 60.0) -> None:
        self._rank, self._size = rank, size
        self._peers: list[socket.socket] = []
        self._pending: list[int] | None = None
        if size == 1:
            return
        if rank == 0:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            staged = path.with_suffix(".new")
            listener.bind(str(staged))
            listener.listen(size)
            listener.settimeout(timeout_s)
            staged.rename(path)
            arrived: dict[int, socket.socket] = {}
            while len(arrived) < size - 1:
                peer, _ = listener.accept()
                peer.settimeout(timeout_s)
                arrived[int.from_bytes(_receive(peer), "little")] = peer
            self._peers = [arrived[r] for r in range(1, size)]
            listener.close()
        else:
            self._peers = [_connect(path, timeout_s)]
            _send(self._peers[0], rank.to_bytes(4, "little"))

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_gather(self, payload: bytes) -> list[bytes]:
        if self._size == 1:
            return [payload]
        if self._rank == 0:
            rows = [payload, *(_receive(peer) for peer in self._peers)]
            packed = b"".join(struct.pack("<Q", len(row)) + row for row in rows)
            for peer in self._peers:
                _send(peer, packed)
            return rows
        _send(self._peers[0], payload)
        packed, rows = _receive(self._peers[0]), []
        while packed:
            (length,) = struct.unpack_from("<Q", packed)
            rows.append(packed[8 : 8 + length])
            packed = packed[8 + length :]
        return rows

    def broadcast(self, payload: bytes | None) -> bytes:
        return self.all_gather(payload if payload is not None else b"")[0]

    def start_max(self, values: Sequence[int]) -> None:
        assert self._pending is None, "one agreement at a time"
        self._pending = list(values)

    def finish_max(self) -> tuple[int, ...] | None:
        if self._pending is None:
            return None
        mine, self._pending = self._pending, None
        rows = [struct.unpack(f"<{len(mine)}q", row) for row in self.all_gather(struct.pack(f"<{len(mine)}q", *mine))]
        return tuple(max(column) for column in zip(*rows, strict=True))

    def sum_up(self, values: array[int]) -> array[int]:
        rows = [array("q", row) for row in self.all_gather(values.tobytes())]
        return array("q", (sum(column) for column in zip(*rows, strict=True)))

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


def _connect(path: Path, timeout_s: float) -> socket.socket:
    import time

    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(timeout_s)
        if peer.connect_ex(str(path)) == 0:
            return peer
        peer.close()
        # rank 0 binds a moment later: its name appears by a rename, watched here
        time.sleep(0.005)  # noqa: TID251  # polls for the rendezvous, with a deadline
    raise TimeoutError(f"rank 0 did not listen: path={path}")


def _send(peer: socket.socket, payload: bytes) -> None:
    peer.sendall(struct.pack("<Q", len(payload)) + payload)


def _receive(peer: socket.socket) -> bytes:
    (length,) = struct.unpack("<Q", _exactly(peer, 8))
    return _exactly(peer, length)


def _exactly(peer: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = peer.recv(min(length, 1 << 20))
        if not part:
            raise ConnectionError("a rank is gone")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
