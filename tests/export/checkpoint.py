"""Puts small synthetic checkpoints of two ranks together, value by value."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from moc._native import crc32c
from moc.format.keys import CheckpointName
from moc.format.manifest import Manifest
from moc.format.stale import StaleExpert
from moc.format.tagged import ArrayValue
from moc.repository import Repository
from moc.state import Expert, RankCatalog, Shard, catalog_digest, check_coverage
from moc.store.memory import MemoryStore
from tests.export.writer import write_rank

NATIVE = "moe.deepspeed_moe.experts.deepspeed_experts."
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint of two ranks being put together: every tensor is cut in two unless it belongs to an expert."""

    store: MemoryStore = field(default_factory=MemoryStore)
    fingerprint: Mapping[str, object] = field(default_factory=lambda: {"dtype": ["bfloat16", "float32"]})
    trees: list[dict[str, object]] = field(default_factory=lambda: [{}, {}])
    contents: list[list[tuple[Shard, bytes, int]]] = field(default_factory=lambda: [[], []])

    def add(self, tensor: str, part: str, value: torch.Tensor, *, cut: int | None = None) -> None:
        """Add a tensor; the first `cut` elements, half of them by default, go to rank 0."""
        expert = None
        if NATIVE in tensor:
            expert = Expert(layer=0, index=int(tensor.partition(NATIVE)[2].partition(".")[0]))
            cut = value.numel() if expert.index < 2 else 0
        cut = value.numel() // 2 if cut is None else cut
        for rank, (first, end) in enumerate(((0, cut), (cut, value.numel()))):
            if end > first or (rank == 0 and not value.numel()):
                raw = value.reshape(-1)[first:end].view(torch.uint8).numpy().tobytes()
                shard = Shard(
                    tensor=tensor,
                    part=part,
                    dtype=next(name for name, dtype in DTYPES.items() if dtype == value.dtype),
                    shape=tuple(value.shape),
                    offset=first,
                    length=end - first,
                    expert=expert,
                )
                self.contents[rank].append((shard, raw, crc32c(raw)))

    def commit(
        self, *, base: Manifest | None = None, incarnation: int = 1, step: int = 7
    ) -> tuple[Repository, Manifest]:
        """Write the checkpoint; with a base one whose other experts are the base's, which is whole."""
        repository = Repository(self.store)
        repository.create()
        name = CheckpointName(run="export", incarnation=incarnation, step=step, attempt="0123abcd")
        shards = [[shard for shard, _, _ in rows] for rows in self.contents]
        rows = [
            row for rank in (0, 1) for row in write_rank(repository, name, rank, self.contents[rank], self.trees[rank])
        ]
        written = {shard.expert for mine in shards for shard in mine}
        stale = []
        if base is not None:
            rows += [row for row in base.objects if row.key.endswith("-e00.safetensors")]
            stale = [
                StaleExpert(expert=expert, step=base.name.step, source=base.name, routed=0)
                for expert in (Expert(layer=0, index=index) for index in range(4))
                if expert not in written
            ]
        manifest = Manifest(
            name=name,
            parent=None,
            topology={"world_size": 2, "node_of_rank": [0, 0], "ep_sizes": [["ep_size_2", 2]]},
            catalog_digest=catalog_digest(RankCatalog(rank=r, shards=(), state_capacity_bytes=1) for r in (0, 1)),
            tensors=base.tensors if base else check_coverage(shard for mine in shards for shard in mine),
            objects=tuple(sorted(rows, key=lambda row: row.key)),
            fingerprint=self.fingerprint,
            versions={},
            is_finite=True,
            stale_experts=tuple(stale),
        )
        repository.put_manifest(manifest)
        return repository, manifest


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(value: torch.Tensor) -> ArrayValue:
    names = {dtype: name for name, dtype in DTYPES.items()}
    data = memoryview(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return ArrayValue(dtype=names[value.dtype], shape=tuple(value.shape), kind="torch", data=data)


@contextlib.contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Make writes beyond so many bytes of a file fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
