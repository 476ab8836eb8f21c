"""A store in this process's memory: for tests, simulations and dry runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from moc.errors import ClosedError, FencedError, IntegrityError, ObjectMissingError, StoreFullError, UsageError
from moc.store.key import byte_views, require_key, require_prefix
from moc.store.port import Entry, Segment, StoreProperties

__all__ = ["MemoryStore"]


class MemoryStore:
    """Objects in a dictionary, with an optional limit on their total size. Thread: any."""

    def __init__(self, *, capacity_bytes: int | None = None, name: str = "") -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._capacity_bytes = capacity_bytes
        self._is_closed = False
        self._properties = StoreProperties(url=f"in-memory://{name}", create_only=True, is_local=False)

    @property
    def properties(self) -> StoreProperties:
        return self._properties

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        require_key(key)
        content = b"".join(byte_views(segments))
        with self._lock:
            self._require_open()
            present = self._objects.get(key)
            if create_only and present is not None and present != content:
                raise FencedError(f"object exists with other bytes {key=} url={self._properties.url}")
            free_bytes = self._free_bytes()
            if free_bytes is not None and len(content) - len(present or b"") > free_bytes:
                raise StoreFullError(
                    f"no space left {key=} size_bytes={len(content)} {free_bytes=} url={self._properties.url}"
                )
            self._objects[key] = content

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        content = self._content(key)
        if len(content) > limit_bytes:
            raise IntegrityError(f"object is too large {key=} size_bytes={len(content)} {limit_bytes=}")
        return content

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        if offset < 0 or view.readonly or not view.c_contiguous:
            raise UsageError(
                f"cannot read into this view {offset=} readonly={view.readonly} allowed=writable, contiguous"
            )
        content = self._content(key)
        wanted = offset + view.nbytes
        if wanted > len(content):
            raise IntegrityError(f"object ends early {key=} wanted_bytes={wanted} size_bytes={len(content)}")
        view.cast("B")[:] = memoryview(content)[offset:wanted]

    def size_bytes(self, key: str) -> int:
        return len(self._content(key))

    def list(self, prefix: str) -> list[Entry]:
        start = f"{require_prefix(prefix)}/" if prefix else ""
        with self._lock:
            self._require_open()
            sizes = {key: len(content) for key, content in self._objects.items() if key.startswith(start)}
        return [Entry(key=key, size_bytes=sizes[key], modified_s=0.0) for key in sorted(sizes)]

    def delete(self, key: str) -> None:
        require_key(key)
        with self._lock:
            self._require_open()
            self._objects.pop(key, None)

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        return 0  # a put is one assignment: nothing can be left behind

    def sync(self, prefix: str) -> None:
        require_prefix(prefix)
        with self._lock:
            self._require_open()  # and nothing else: this store has no power to lose

    def free_bytes(self) -> int | None:
        with self._lock:
            self._require_open()
            return self._free_bytes()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True

    def _free_bytes(self) -> int | None:
        if self._capacity_bytes is None:
            return None
        return self._capacity_bytes - sum(len(content) for content in self._objects.values())

    def _content(self, key: str) -> bytes:
        require_key(key)
        with self._lock:
            self._require_open()
            try:
                return self._objects[key]
            except KeyError:
                raise ObjectMissingError(f"object does not exist {key=} url={self._properties.url}") from None

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"store is closed url={self._properties.url}")
