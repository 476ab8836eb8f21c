"""Every function that works on a range lets other threads run meanwhile."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moc import _native
from tests.native.memory import Memory, mapped, words

LENGTH = 32 << 20
ATTEMPT_LIMIT = 500  # a busy machine may not schedule the other thread within one call

crcs = np.zeros(1, dtype=np.uint32)

CALLS: dict[str, Callable[[Memory, Memory, int], object]] = {
    "crc32c": lambda source, *_: _native.crc32c(source.view, kernel="portable"),
    "crc32c_at": lambda source, *_: _native.crc32c_at(source.address, LENGTH, kernel="portable"),
    "crc32c_gather": lambda source, *_: _native.crc32c_gather(words([source.address]), words([LENGTH]), crcs),
    "copy_crc32c": lambda source, target, _: _native.copy_crc32c(
        words([source.address]), words([target.address]), words([LENGTH]), crcs
    ),
    "all_finite": lambda source, *_: _native.all_finite(source.address, LENGTH // 2, "BF16"),
    "write_aligned": lambda source, _, fd: _native.write_aligned(fd, 0, words([source.address]), words([LENGTH])),
    "read_aligned": lambda _, target, fd: _native.read_aligned(fd, 0, target.address, LENGTH),
    "populate": lambda source, *_: _native.populate(source.address, LENGTH),
    "touch": lambda source, *_: _native.touch(source.address, LENGTH),
}


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """Let a thread lose the GIL only by giving it up itself."""
    previous = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(previous)


@pytest.mark.usefixtures("no_forced_switches")
@pytest.mark.parametrize("name", sorted(CALLS))
def test_another_thread_runs_during_the_call(name: str, tmp_path: Path) -> None:
    go = threading.Lock()
    go.acquire()
    seen: list[bool] = []

    def watch() -> None:
        go.acquire()
        seen.append(True)

    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, LENGTH)
    with mapped(LENGTH) as source, mapped(LENGTH) as target:
        watcher = threading.Thread(target=watch)
        watcher.start()
        go.release()  # from here on the watcher needs nothing but the GIL

        for _ in range(ATTEMPT_LIMIT):
            CALLS[name](source, target, fd)
            if seen:
                break
        ran_during_the_call = bool(seen)

        watcher.join(timeout=30)
    os.close(fd)
    assert ran_during_the_call
