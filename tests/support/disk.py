"""A real ext4 filesystem in a file, whose disk can fail (EIO everywhere, unflushed data are gone) and be repaired."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path

import pytest

__all__ = ["FailingDisk"]

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_DROP_UNFLUSHED = 2  # as a power failure would
REMOUNT_DEADLINE_S = 20.0


class FailingDisk:
    """Use as a context manager; skips the test where loop devices cannot be mounted."""

    def __init__(self, folder: Path, *, size_mb: int = 64) -> None:
        self.folder, self._image = folder / "disk", folder / "image"
        self.folder.mkdir()
        with self._image.open("wb") as stream:
            stream.truncate(size_mb << 20)

    def __enter__(self) -> FailingDisk:
        made = subprocess.run(["mkfs.ext4", "-q", "-F", self._image], capture_output=True, check=False)
        if made.returncode or not self._mount():
            # Mounting needs rights that a user's container may not give; with them (CI runs as root) this always runs.
            pytest.skip("cannot mount a filesystem in a file")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=False)

    def fail(self) -> None:
        """Lose what was not flushed and answer everything with EIO from now on."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _DROP_UNFLUSHED))
        finally:
            os.close(handle)

    def repair(self) -> None:
        """Come back with what had been flushed."""
        subprocess.run(["umount", "--lazy", self.folder], check=True)
        assert self._mount()

    def make_read_only(self) -> None:
        """As the kernel does after an error, or an administrator; waits for a moment in which nobody writes."""
        ends_s = time.monotonic() + REMOUNT_DEADLINE_S
        while subprocess.run(["mount", "-o", "remount,ro", self.folder], capture_output=True, check=False).returncode:
            assert time.monotonic() < ends_s, "somebody always writes"

    def make_writable(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", self.folder], check=True)

    def freeze(self) -> None:
        """Let everybody who writes wait in the kernel, where no signal reaches them, until `thaw`."""
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True)

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", self.folder], check=True)

    def _mount(self) -> bool:
        command = ["mount", "-o", "loop", self._image, self.folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
