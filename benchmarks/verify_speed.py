"""Print how fast `moc verify --read-data` reads a repository on a disk, beside plain reads of the same files.

The variants take turns inside each repeat, each after the files were dropped from the page cache (except `cached`),
and read by the same number of threads. The first repeat is discarded; figures are medians with their range, and the
ratio to the plain reads of the same repeat.

    python benchmarks/verify_speed.py --folder /data/tmp --mib 2048 --repeats 5
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moc._native import crc32c
from moc.format.keys import CheckpointName, object_key
from moc.format.manifest import Incarnation, Manifest, ObjectRow
from moc.format.object import ObjectHeader, StoredShard, encode_header
from moc.format.tagged import encode_state
from moc.readback import READERS_LOCAL
from moc.repository import Repository
from moc.state import Shard
from moc.store.local import LocalStore
from moc.verify import verify_repository

CHUNK_BYTES = 4 * 2**20
ALIGNMENT = 4096


def write_repository(root: Path, size_bytes: int, shard_bytes: int, ranks: int) -> None:
    repository = Repository(LocalStore(root))
    repository.create()
    repository.put_incarnation(
        Incarnation(run="bench", number=1, token="00000001", parent=None, reason="start", fingerprint={})
    )
    name = CheckpointName(run="bench", incarnation=1, step=1, attempt="00000001")
    per_rank = max(size_bytes // ranks // shard_bytes, 1)
    noise = memoryview(os.urandom(shard_bytes))
    checksum, rows = crc32c(noise), []
    blob = encode_state({"step": 1}).to_bytes()
    for rank in range(ranks):
        stored = tuple(
            StoredShard(
                shard=Shard(
                    tensor=f"layers.{rank:02d}.{index:05d}",
                    part="master",
                    dtype="F32",
                    shape=(shard_bytes // 4,),
                    offset=0,
                    length=shard_bytes // 4,
                    expert=None,
                ),
                step=1,
                position=index * shard_bytes,
                crc32c=checksum,
            )
            for index in range(per_rank)
        )
        state_position = per_rank * shard_bytes
        header = encode_header(
            ObjectHeader(
                name=name,
                rank=rank,
                piece="d",
                shards=stored,
                state=(state_position, len(blob), crc32c(blob)),
                data_bytes=state_position + ALIGNMENT,
            )
        )
        key = object_key(name, rank, "d")
        repository.put_object(key, [memoryview(header), *[noise] * per_rank, memoryview(blob.ljust(ALIGNMENT, b"\0"))])
        size = len(header) + state_position + ALIGNMENT
        rows.append(ObjectRow(key=key, size_bytes=size, header_bytes=len(header), header_crc32c=crc32c(header)))
    repository.put_manifest(
        Manifest(
            name=name,
            parent=None,
            topology={"world_size": ranks, "node_of_rank": [0] * ranks, "ep_sizes": []},
            catalog_digest="0" * 16,
            tensors=ranks * per_rank,
            objects=tuple(rows),
            fingerprint={},
            versions={},
            is_finite=True,
        )
    )


def forget(root: Path) -> None:
    """Drop the files from the page cache."""
    for path in root.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(root: Path, threads: int) -> None:
    """Read every object by `threads` threads into memory that is used again."""

    def read(path: Path) -> None:
        view = memoryview(array("B", bytes(CHUNK_BYTES)))
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(view):
                pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, sorted(root.rglob("*.safetensors"))))


def verify(root: Path) -> None:
    report = verify_repository(Repository(LocalStore(root)), read_data_fraction=1.0)
    assert not report.all_findings, report.all_findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--shard-kib", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    threads = min(READERS_LOCAL, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="moc-verify-", dir=options.folder) as folder:
        root = Path(folder) / "repository"
        write_repository(root, options.mib * 2**20, options.shard_kib * 2**10, options.ranks)
        size = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
        calls: dict[str, tuple[bool, Callable[[], None]]] = {
            "plain read": (True, lambda: read_plainly(root, threads)),
            "verify": (True, lambda: verify(root)),
            "plain read, cached": (False, lambda: read_plainly(root, threads)),
            "verify, cached": (False, lambda: verify(root)),
        }
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(options.repeats + 1):
            for name, (is_cold, call) in calls.items():
                if is_cold:
                    forget(root)
                start = time.perf_counter()
                call()
                if repeat > 0:
                    rates[name].append(size / (time.perf_counter() - start) / 1e9)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads} threads, {size / 1e9:.2f} GB"
    )
    for name, values in rates.items():
        roof = rates["plain read, cached" if name.endswith("cached") else "plain read"]
        ratio = statistics.median(value / base for value, base in zip(values, roof, strict=True))
        spread = f"{min(values):5.2f} to {max(values):5.2f}"
        print(f"{name:20}{statistics.median(values):6.2f} GB/s ({spread}), {ratio:.2f} x the plain reads")


if __name__ == "__main__":
    main()
