"""The installed console script, run as a user runs it, and damage done to repositories."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moc.format.keys import object_key
from moc.repository import Repository
from moc.store.local import LocalStore

MOC = os.path.join(sysconfig.get_path("scripts"), "moc")
DEADLINE_S = 60.0


def moc(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    before_exec: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run one command line to its end."""
    return subprocess.run(
        [MOC, *map(str, arguments)],
        cwd=cwd,
        env=clean_env() | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
        check=False,
        preexec_fn=before_exec,
    )


def moc_json(*arguments: object, code: int = 0, cwd: Path | None = None) -> Any:
    """Run one command line with --json and return what it prints; the exit code must be `code`."""
    result = moc(*arguments, "--json", cwd=cwd)
    assert result.returncode == code, (result.stdout, result.stderr)
    return json.loads(result.stdout)


def clean_env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MOC_")}


def flip_bit(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def shard_place(root: Path, incarnation: int, step: int, *, rank: int, piece: str, index: int) -> tuple[Path, str, int]:
    """Return the file, the shard's name and its first byte in the file."""
    repository = Repository(LocalStore(root))
    name = next(c.name for c in repository.checkpoints() if (c.name.incarnation, c.name.step) == (incarnation, step))
    key = object_key(name, rank, piece)
    row = next(row for row in repository.read_manifest(name).objects if row.key == key)
    stored = repository.read_header(row).shards[index]
    return root / key, stored.shard.name, row.header_bytes + stored.position


def manifest_path(root: Path, incarnation: int, step: int) -> Path:
    (path,) = (root / "manifests").glob(f"{incarnation:06d}-*/{step:012d}-*.json")
    return path
