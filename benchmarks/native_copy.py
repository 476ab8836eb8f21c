"""Print the throughput of moc._native's copy and checksum beside a plain memcpy, on one thread.

Every variant works on the same prefaulted memory; the variants take turns inside each repeat, the first repeat is
discarded, and each figure is a median with its range and its ratio to the memcpy of the same repeat.

    python benchmarks/native_copy.py --mib 512 --piece-kib 1024 --repeats 7
"""

import argparse
import ctypes
import mmap
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from moc import _native

Words = npt.NDArray[np.uint64]


def prefaulted(length: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, length)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _native.populate(address, length)
    return memory, address


def split(address: int, length: int, piece: int) -> tuple[Words, Words]:
    offsets = np.arange(0, length, piece, dtype=np.uint64)
    lengths = np.minimum(np.uint64(piece), np.uint64(length) - offsets)
    return offsets + np.uint64(address), lengths


def variants(source: int, target: int, length: int, piece: int) -> dict[str, Callable[[], object]]:
    sources, lengths = split(source, length, piece)
    targets, _ = split(target, length, piece)
    crcs = np.zeros(len(lengths), dtype=np.uint32)
    calls: dict[str, Callable[[], object]] = {"memcpy": lambda: ctypes.memmove(target, source, length)}
    for name in _native.KERNELS:
        calls[f"copy+crc {name}"] = lambda name=name: _native.copy_crc32c(sources, targets, lengths, crcs, kernel=name)
        calls[f"crc {name}"] = lambda name=name: _native.crc32c_gather(sources, lengths, crcs, kernel=name)
    calls["all_finite F32"] = lambda: _native.all_finite(source, length // 4, "F32")
    return calls


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat > 0:  # the first repeat warms caches and the clock of the core
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="throughput of moc._native beside memcpy, one thread")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--piece-kib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    length = options.mib << 20
    source_memory, source = prefaulted(length)
    target_memory, target = prefaulted(length)
    np.frombuffer(source_memory, dtype=np.uint32)[:] = np.arange(length // 4, dtype=np.uint32) & 0x3FFFFFFF
    seconds = measure(variants(source, target, length, options.piece_kib << 10), options.repeats)
    print(
        f"{platform.machine()}, 1 thread, {options.mib} MiB in pieces of {options.piece_kib} KiB, n={options.repeats}"
    )
    for name, values in seconds.items():
        rates = sorted(length / 1e9 / value for value in values)
        ratio = statistics.median(base / value for base, value in zip(seconds["memcpy"], values, strict=True))
        spread = f"{rates[0]:6.2f} .. {rates[-1]:6.2f}"
        print(f"{name:20s} {statistics.median(rates):6.2f} GB/s  ({spread})  {ratio:5.2f} x memcpy")
    del source_memory, target_memory


if __name__ == "__main__":
    main()
