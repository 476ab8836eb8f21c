"""The `Store` port over a bucket in memory that behaves as an object store does, with a fault at a chosen request.

Faults, at request n (counted from 1):

- `error`: the request is not served and fails once
- `applied`: a put or delete is served, and its answer is lost
- `late`: a put fails now and is served long after, when its writer may be gone; its condition is looked at then
- `dead`: this request and every later one fails
- `stale`: a listing answers what was there before the last change under its prefix

Otherwise a put shows the whole object or nothing, and every request sees all that were served before it. There is
nothing to sync: what was served is durable. An observer sees the bucket before and after every request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from moc.errors import FencedError, IntegrityError, ObjectMissingError, StoreUnavailableError
from moc.store.port import Entry, Segment, Store, StoreProperties

__all__ = ["Bucket", "FaultyStore", "Request", "StoreFault", "StoreFaultKind"]

T = TypeVar("T")
StoreFaultKind = Literal["error", "applied", "late", "dead", "stale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFault:
    kind: StoreFaultKind
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    number: int
    name: str
    key: str

    @property
    def is_change(self) -> bool:
        return self.name in ("put", "delete")

    def __str__(self) -> str:
        return f"{self.number} {self.name} {self.key}"


@dataclass(slots=True)
class Bucket:
    """What the service holds; `late` are puts that it has received and not yet served."""

    objects: dict[str, bytes] = field(default_factory=dict)
    late: list[tuple[str, bytes, bool]] = field(default_factory=list)

    def copy(self) -> Bucket:
        return Bucket(dict(self.objects), list(self.late))

    def put(self, key: str, content: bytes, *, create_only: bool) -> bool:
        """Serve a put; returns False where its condition does not hold."""
        if create_only and self.objects.get(key, content) != content:
            return False
        self.objects[key] = content
        return True

    def serve_late(self) -> None:
        for key, content, create_only in self.late:
            self.put(key, content, create_only=create_only)
        self.late.clear()


class FaultyStore(Store):
    """Counts and reports the requests of one process, and has one of them fail. Thread: any."""

    def __init__(
        self,
        bucket: Bucket,
        fault: StoreFault | None = None,
        *,
        observe: Callable[[Request, str], None] | None = None,
    ) -> None:
        self.bucket, self._fault, self._observe = bucket, fault, observe
        self.requests: list[Request] = []
        self.has_fired = False
        self._former: dict[str, dict[str, bytes]] = {}
        self._lock = threading.RLock()

    def arm(self, fault: StoreFault | None, observe: Callable[[Request, str], None] | None) -> None:
        """Count from here on, and have this fault happen."""
        self.requests.clear()
        self._fault, self._observe = fault, observe

    @property
    def properties(self) -> StoreProperties:
        return StoreProperties(url="model://bucket", create_only=True, is_local=False)

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        content = b"".join(segments)

        def act() -> None:
            self._remember(key)
            if not self.bucket.put(key, content, create_only=create_only):
                raise FencedError(f"object exists with other bytes {key=}")

        def receive() -> None:
            self.bucket.late.append((key, content, create_only))

        self._run("put", key, act, receive=receive)

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        content = self._run("read", key, lambda: self._content(key))
        if len(content) > limit_bytes:
            raise IntegrityError(f"object is too large {key=}")
        return content

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        part = self._run("read_into", key, lambda: self._content(key)[offset : offset + view.nbytes])
        if len(part) != view.nbytes:
            raise IntegrityError(f"object ends early {key=}")
        view[:] = part

    def size_bytes(self, key: str) -> int:
        return len(self._run("size_bytes", key, lambda: self._content(key)))

    def list(self, prefix: str) -> list[Entry]:
        def act() -> list[Entry]:
            objects = self.bucket.objects
            if self._is_now("stale") and prefix in self._former:
                self.has_fired = True
                objects = self._former[prefix]
            start = f"{prefix}/" if prefix else ""
            return [
                Entry(key=key, size_bytes=len(content), modified_s=0.0)
                for key, content in sorted(objects.items())
                if key.startswith(start)
            ]

        return self._run("list", prefix, act)

    def delete(self, key: str) -> None:
        def act() -> None:
            self._remember(key)
            self.bucket.objects.pop(key, None)

        self._run("delete", key, act)

    def sync(self, prefix: str) -> None:
        """Nothing to do: no request."""

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        return 0

    def free_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        """Nothing is held."""

    # Faults

    def _content(self, key: str) -> bytes:
        if key not in self.bucket.objects:
            raise ObjectMissingError(f"object does not exist {key=}")
        return self.bucket.objects[key]

    def _remember(self, key: str) -> None:
        if self._fault is not None and self._fault.kind == "stale":
            self._former[key.partition("/")[0]] = dict(self.bucket.objects)

    def _is_now(self, kind: StoreFaultKind) -> bool:
        return self._fault is not None and self._fault.kind == kind and self._fault.number == len(self.requests)

    def _run(self, name: str, key: str, act: Callable[[], T], *, receive: Callable[[], None] | None = None) -> T:
        with self._lock:
            self.requests.append(Request(number=len(self.requests) + 1, name=name, key=key))
            is_over = (
                self._fault is not None and self._fault.kind == "dead" and len(self.requests) >= self._fault.number
            )
            if is_over or self._is_now("error"):
                self._fail()
            if receive is not None and self._is_now("late"):
                receive()
                self._fail()
            if self._observe is not None:
                self._observe(self.requests[-1], "before")
            result = act()
            if self._observe is not None:
                self._observe(self.requests[-1], "after")
            if self._is_now("applied"):
                self._fail()
            return result

    def _fail(self) -> None:
        self.has_fired = True
        raise StoreUnavailableError(f"no answer: {self.requests[-1]}")
