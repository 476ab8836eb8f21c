"""A real cgroup that limits memory, of either version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["MemoryCgroup"]

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryCgroup:
    """Use as a context manager; skips the test where no cgroup can be made. Its processes must end before it."""

    def __init__(self, name: str) -> None:
        controllers = V2 / "cgroup.controllers"
        is_v2 = controllers.exists() and "memory" in controllers.read_text().split()
        self.folder = (V2 if is_v2 else V1) / f"moc-test-{os.getpid()}-{name}"
        self._limit = "memory.max" if is_v2 else "memory.limit_in_bytes"
        self._used = "memory.current" if is_v2 else "memory.usage_in_bytes"
        self._kills = "memory.events" if is_v2 else "memory.oom_control"

    def __enter__(self) -> MemoryCgroup:
        try:
            self.folder.mkdir()
            self.limit(1 << 40)  # refused where the controller is not passed on
        except OSError as error:
            # Cgroups need rights that a user's container may not give; with them (CI runs as root) this always runs.
            pytest.skip(f"cannot limit memory by a cgroup: {error}")
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()

    def limit(self, size_bytes: int) -> None:
        (self.folder / self._limit).write_text(str(size_bytes))

    def used_bytes(self) -> int:
        return int((self.folder / self._used).read_text())

    def add(self, pid: int) -> None:
        """Charge what this process takes from now on."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed here for want of memory."""
        rows = dict(line.split() for line in (self.folder / self._kills).read_text().splitlines())
        return int(rows["oom_kill"])
