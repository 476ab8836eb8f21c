"""A real ext4 filesystem in a file, whose disk can fail (EIO everywhere, unflushed data are gone) and be repaired."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

__all__ = ["FailingDisk"]

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_DROP_UNFLUSHED = 2  # as a power failure would


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

    def _mount(self) -> bool:
        command = ["mount", "-o", "loop", self._image, self.folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
