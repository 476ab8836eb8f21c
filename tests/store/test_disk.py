"""A store on a real disk that fills up, becomes read-only, or goes away."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moc.errors import StoreDeniedError, StoreFullError, StoreUnavailableError
from moc.store.local import LocalStore


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def put(store: LocalStore, key: str, content: bytes, *, create_only: bool = False) -> None:
    store.put(key, [memoryview(content)], create_only=create_only)


def test_a_full_disk_is_found_before_anything_is_visible(small_disk: Path) -> None:
    store = LocalStore(small_disk / "repository")
    put(store, "a", bytes(2**20))
    before = store.free_bytes()

    with pytest.raises(StoreFullError, match="errno=ENOSPC"):
        put(store, "b", bytes(8 * 2**20))

    assert files_below(small_disk) == ["repository/a"]
    assert store.free_bytes() == before
    assert before is not None
    assert 2 * 2**20 < before < 3 * 2**20 + 2**19
    put(store, "c", bytes(2**20))


def test_a_read_only_disk_denies_puts_and_deletes_but_reads(small_disk: Path) -> None:
    store = LocalStore(small_disk / "repository")
    put(store, "a", b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    with pytest.raises(StoreDeniedError, match="errno=EROFS"):
        put(store, "b", b"x")
    with pytest.raises(StoreDeniedError, match="errno=EROFS"):
        store.delete("a")

    assert store.read("a", limit_bytes=1) == b"x"


def test_an_unmounted_repository_is_unavailable_and_never_empty_or_recreated(small_disk: Path) -> None:
    store = LocalStore(small_disk)
    put(store, "a", b"x")
    subprocess.run(["umount", "--lazy", str(small_disk)], check=True)

    for call in _all_calls(store):
        with pytest.raises(StoreUnavailableError, match="another folder"):
            call()

    assert files_below(small_disk) == []


def test_a_removed_repository_is_unavailable_and_not_recreated(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    store = LocalStore(root)
    put(store, "a", b"x")
    root.rename(tmp_path / "elsewhere")

    for call in _all_calls(store):
        with pytest.raises(StoreUnavailableError, match="has gone"):
            call()

    assert not root.exists()


def _all_calls(store: LocalStore) -> list[Callable[[], object]]:
    return [
        lambda: put(store, "b", b"x"),
        lambda: put(store, "b", b"x", create_only=True),
        lambda: store.read("a", limit_bytes=1),
        lambda: store.read_into("a", 0, memoryview(bytearray(1))),
        lambda: store.size_bytes("a"),
        lambda: store.list(""),
        lambda: store.delete("a"),
        store.free_bytes,
        lambda: store.sweep(older_than_s=0.0),
    ]
