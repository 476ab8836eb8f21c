"""Print how fast moc's store puts and reads objects on S3, beside s3fs by itself on the same server.

The server is the real one that the tests use, on this machine, with files in a temporary folder. All variants take
turns inside each repeat; the first repeat is thrown away. `put_file` reads a file in /dev/shm, `get_file` writes one.

    python benchmarks/s3_throughput.py
    python benchmarks/s3_throughput.py --mib 8 --repeats 3         a look, not a result
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: the repository's root must be searched, not this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fsspec

from benchmarks.machine import machine_facts
from moc.store.remote import RemoteStore
from tests.support.s3_server import S3Server

MIB = 2**20
SEGMENTS = 16  # a put gets its object in pieces, as a snapshot lies in its slot

Variant = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[8, 64, 256], help="sizes of objects")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the server keeps its files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moc-bench-", dir=options.folder) as folder:
        for name, value in machine_facts(Path(folder)).items():
            print(f"{name}: {value}")
        with S3Server(Path(folder)) as server, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            for mib in options.mib:
                report(mib, measure(make_variants(server, Path(memory), mib), options.repeats))
    return 0


def make_variants(server: S3Server, memory: Path, mib: int) -> dict[str, Variant]:
    """Return what is compared; each puts or reads one object of this size."""
    place = f"{server.make_bucket()}/run"
    store = RemoteStore(f"s3://{place}", server.options())
    plain = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **server.options())
    content = os.urandom(mib * MIB)
    step = len(content) // SEGMENTS
    segments = [memoryview(content)[begin : begin + step] for begin in range(0, len(content), step)]
    target = bytearray(len(content))
    (memory / "source").write_bytes(content)
    return {
        "put moc": lambda: store.put("object", segments),
        "put s3fs.put_file": lambda: plain.put_file(str(memory / "source"), f"{place}/object"),
        "put s3fs.pipe_file": lambda: plain.pipe_file(f"{place}/object", content),
        "read moc": lambda: store.read_into("object", 0, memoryview(target)),
        "read s3fs.get_file": lambda: plain.get_file(f"{place}/object", str(memory / "target")),
        "read s3fs.cat_file": lambda: plain.cat_file(f"{place}/object"),
    }


def measure(variants: dict[str, Variant], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each variant in each repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, act in variants.items():
            started_s = time.monotonic()
            act()
            if repeat:
                seconds[name].append(time.monotonic() - started_s)
    return seconds


def report(mib: int, seconds: dict[str, list[float]]) -> None:
    print(f"\n{mib} MiB{'':16} median MB/s   range              moc is faster by, median (range) of the pairs")
    for name, rows in seconds.items():
        rates = sorted(mib * MIB / 1e6 / row for row in rows)
        ours = seconds[f"{name.split()[0]} moc"]
        ratios = sorted(row / own for row, own in zip(rows, ours, strict=True))
        text = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})" if rows is not ours else ""
        print(f"{name:22} {statistics.median(rates):12.0f}   {rates[0]:.0f} - {rates[-1]:.0f}".ljust(60) + text)


if __name__ == "__main__":
    raise SystemExit(main())
