"""A store on any fsspec filesystem: object stores above all.

A put is one call that sends the whole content (object stores upload parts concurrently and publish at the end), then a
look at the stored length. Nothing is cached between calls, nothing is moved, and fsspec's transactions are not used.
Object stores publish whole objects only; on filesystems that write in place (sftp, hdfs, ...) a reader may see a part
of an object while it is being written, which the checksums of manifest and shards tell.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from moc.errors import (
    ClosedError,
    FencedError,
    IntegrityError,
    MocError,
    ObjectMissingError,
    StorageError,
    StoreUnavailableError,
    UsageError,
)
from moc.store.key import byte_views, is_key, require_key, require_prefix
from moc.store.port import Entry, Segment, StoreProperties
from moc.store.redact import ambient_secrets, redact_text, redact_url, secret_values
from moc.store.s3 import PART_BYTES, PART_LIMIT, S3_SCHEMES, PartedContent, bound_requests, stale_uploads
from moc.store.translate import class_for_remote, is_precondition_failure, translate_remote_error
from moc.trace import Trace

__all__ = ["RemoteStore"]

READ_BYTES = 64 * 2**20  # one request; larger reads are several
LISTING_BYTES = 600 * 2**20  # more than a listing of a million objects transfers
SLOWEST_BYTES_PER_S = 2**20  # a transfer that is slower than this for long is taken for hung
OBJECT_SCHEMES = S3_SCHEMES | {"gs", "gcs", "abfs", "abfss", "az", "oss", "oci"}
CONDITION_SCHEMES = S3_SCHEMES | {"gs", "gcs"}  # a put can be made to depend on the key's absence
CREATE_ONLY_SCHEMES = frozenset({"gs", "gcs"})  # S3 is not: many servers of its protocol ignore the condition


class RemoteStore:
    """Objects below a URL. Thread: any. Memory: one copy of an object during a put (on S3 of the parts that are being
    sent), `READ_BYTES` during a read.

    On S3 an object of two `part_bytes` or more is sent in parts, and every request ends within `patience_s` and the
    time that its bytes take at `SLOWEST_BYTES_PER_S`.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, object] | None = None,
        *,
        patience_s: float = 120.0,
        part_bytes: int = PART_BYTES,
        trace: Trace | None = None,
    ) -> None:
        options = dict(storage_options or {})
        self._url = redact_url(url)
        self._secrets = secret_values(url, options) | ambient_secrets()
        self._patience_s = patience_s
        self._part_bytes = part_bytes
        self._trace = trace or Trace()
        self._files, self._base = self._connect(url, options)
        protocol = self._files.protocol
        schemes = {protocol} if isinstance(protocol, str) else set(protocol)
        self._is_s3 = bool(schemes & S3_SCHEMES)
        self._writes_objects = bool(schemes & OBJECT_SCHEMES)
        self._takes_condition = bool(schemes & CONDITION_SCHEMES)
        if self._is_s3:
            bound_requests(self._files)
        self._properties = StoreProperties(
            url=self._url, create_only=bool(schemes & CREATE_ONLY_SCHEMES), is_local=False
        )
        # Filesystems that write in place truncate first: two puts of one key must not overlap.
        self._in_place_lock = threading.Lock()

    @property
    def properties(self) -> StoreProperties:
        return self._properties

    def put(self, key: str, segments: Sequence[Segment], *, create_only: bool = False) -> None:
        path = self._path(key)
        content = self._content(byte_views(segments))
        turn = contextlib.nullcontext() if self._writes_objects else self._in_place_lock
        try:
            # The span is around the translation: what it reports of an error has no secrets in it.
            with (
                turn,
                self._trace.span("store.put", key=key, bytes=len(content)),
                self._translated("put", key) as files,
            ):
                if create_only:
                    self._pipe_new(files, path, key, content)
                else:
                    self._pipe(files, path, content)
                stored_bytes = self._size(files, path, key)
        except ObjectMissingError as error:
            # Gateways to filesystems answer so when a delete removes the folder that the put needs: it helps to repeat.
            raise StoreUnavailableError(f"put had no effect: {error}") from None
        finally:
            if isinstance(content, PartedContent):
                content.release()  # an upload that was given up may still run, and the segments' memory changes
        if stored_bytes != len(content):
            raise StoreUnavailableError(
                f"wrong length after put {self._subject(key)} total_bytes={len(content)} {stored_bytes=}"
            )

    def read(self, key: str, *, limit_bytes: int) -> bytes:
        path = self._path(key)
        with self._translated("read", key) as files:
            size_bytes = self._size(files, path, key)
            if size_bytes > limit_bytes:
                raise IntegrityError(f"object is too large {self._subject(key)} {size_bytes=} {limit_bytes=}")
            return self._read_range(files, path, key, 0, size_bytes) if size_bytes else b""

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        if offset < 0 or view.readonly or not view.c_contiguous:
            raise UsageError(
                f"cannot read into this view {offset=} readonly={view.readonly} allowed=writable, contiguous"
            )
        path = self._path(key)
        target = view.cast("B")
        with self._translated("read", key) as files:
            if not target.nbytes:
                self._require_reach(files, path, key, offset)
            for begin in range(0, target.nbytes, READ_BYTES):
                part = target[begin : begin + READ_BYTES]
                part[:] = self._read_range(files, path, key, offset + begin, part.nbytes)

    def size_bytes(self, key: str) -> int:
        path = self._path(key)
        with self._translated("stat", key) as files:
            return self._size(files, path, key)

    def list(self, prefix: str) -> list[Entry]:
        require_prefix(prefix)
        directory = f"{self._base}/{prefix}" if prefix else self._base
        entries = []
        try:
            with self._translated("list", prefix) as files:
                for path, row in self._rows(files, directory):
                    key = path[len(self._base) + 1 :]
                    if path.startswith(f"{directory}/") and is_key(key):
                        entries.append(Entry(key=key, size_bytes=int(row["size"]), modified_s=_modified_s(row)))
        except ObjectMissingError as error:
            # S3 answers 200 where nothing is; whatever says 404 is not the store, and does not make it an empty one.
            raise StoreUnavailableError(f"listing was not served: {error}") from None
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._trace.span("store.delete", key=key), self._translated("delete", key) as files:
            try:
                files.rm_file(path, **self._bound())
            except Exception as error:
                if class_for_remote(error) is not ObjectMissingError:
                    raise

    def sweep(self, *, older_than_s: float, is_dry_run: bool = False) -> int:
        if not self._is_s3:
            return 0  # parts of interrupted uploads are invisible here; stores expire them by themselves or by a rule
        done = 0
        try:
            with self._translated("sweep") as files:
                for upload in stale_uploads(files, self._base, older_than_s=older_than_s, **self._bound()):
                    if not is_dry_run:
                        files.call_s3("abort_multipart_upload", **upload, **self._bound())
                    done += 1
        except StorageError as error:
            if error.retryable:
                raise
            # A right that users seldom have, or a call that the server does not know: the bucket's rule must do it.
            with self._trace.span("store.skip_sweep", reason=str(error)):
                pass
        return done

    def sync(self, prefix: str) -> None:
        require_prefix(prefix)
        with self._translated("sync"):
            return  # what a service has answered is durable, whoever asked

    def free_bytes(self) -> int | None:
        with self._translated("free"):
            return None

    def exists(self) -> bool:
        """Return whether anything is stored below the URL."""
        with self._translated("exists") as files:
            return self._is_there(files, self._base)

    def close(self) -> None:
        self._files = None

    def _connect(self, url: str, options: Mapping[str, object]) -> tuple[Any, str]:
        """Return the filesystem, which no other code shares, and the path that the URL names in it."""
        if any(mark in url for mark in "?#") or "::" in url:
            raise UsageError(
                f"no query, fragment or chain in a storage URL url={self._url} allowed=scheme://place/path"
            )
        try:
            from fsspec.core import url_to_fs

            files, base = url_to_fs(url, **{**options, "skip_instance_cache": True, "use_listings_cache": False})
        except ImportError as error:
            scheme = url.partition("://")[0]
            raise UsageError(
                f"a package for this kind of storage is not installed {scheme=} missing={error.name} "
                "allowed=s3 after `pip install moc[s3]`; others after installing their fsspec package"
            ) from error
        except (ValueError, TypeError) as error:
            reason = redact_text(str(error), self._secrets)
            raise UsageError(f"storage URL or options not understood url={self._url} {reason=}") from None
        except Exception as error:  # noqa: BLE001 - client libraries raise anything; translated, never dropped
            raise translate_remote_error(
                error, action="open", subject=f"url={self._url}", secrets=self._secrets
            ) from None
        base = str(base).rstrip("/")
        if not base and "memory" not in files.protocol:
            raise UsageError(f"storage URL names no place url={self._url} allowed=scheme://bucket/path")
        return files, base

    def _content(self, views: Sequence[memoryview]) -> bytes | PartedContent:
        if self._is_s3 and sum(view.nbytes for view in views) >= 2 * self._part_bytes:
            return PartedContent(views)
        return b"".join(views)

    def _pipe(self, files: Any, path: str, content: bytes | PartedContent) -> None:
        if self._is_s3:
            part_bytes = max(self._part_bytes, -(-len(content) // PART_LIMIT))
            files.pipe_file(path, content, chunksize=part_bytes, **self._bound(len(content)))
            return
        try:
            files.pipe_file(path, content)
        except FileNotFoundError:
            if self._writes_objects:
                raise
            files.makedirs(path.rpartition("/")[0], exist_ok=True)
            files.pipe_file(path, content)

    def _pipe_new(self, files: Any, path: str, key: str, content: bytes | PartedContent) -> None:
        """Put unless other bytes are there; where the store may not enforce it, a look before narrows the window."""
        try:
            is_free = self._properties.create_only or not self._is_there(files, path)
            if is_free and self._takes_condition:
                files.pipe_file(path, content[:], mode="create", **self._bound(len(content)))
            elif is_free:
                self._pipe(files, path, content)
            if is_free:
                return
        except Exception as error:
            if not is_precondition_failure(error):
                raise
        size_bytes = self._size(files, path, key)
        if size_bytes != len(content) or any(
            self._read_range(files, path, key, begin, min(READ_BYTES, size_bytes - begin))
            != content[begin : begin + READ_BYTES]
            for begin in range(0, size_bytes, READ_BYTES)
        ):
            raise FencedError(f"object exists with other bytes {self._subject(key)}")

    def _is_there(self, files: Any, path: str) -> bool:
        """Return whether an object or a folder has this path; not by `exists()`, which takes some errors for a no."""
        files.invalidate_cache()
        try:
            files.info(path, **self._bound())
        except Exception as error:
            if class_for_remote(error) is not ObjectMissingError:
                raise
            return False
        return True

    def _size(self, files: Any, path: str, key: str) -> int:
        files.invalidate_cache()
        row = files.info(path, **self._bound())
        if row["type"] != "file":
            raise ObjectMissingError(f"object does not exist {self._subject(key)}")
        return int(row["size"])

    def _read_range(self, files: Any, path: str, key: str, offset: int, length: int) -> bytes:
        try:
            content = bytes(files.cat_file(path, start=offset, end=offset + length, **self._bound(length)))
        except Exception:
            # Stores answer in many ways to a range behind the end.
            self._require_reach(files, path, key, offset + length)
            raise
        if len(content) != length:
            self._require_reach(files, path, key, offset + length)
            raise StoreUnavailableError(
                f"answer was cut off {self._subject(key)} {offset=} wanted_bytes={length} found_bytes={len(content)}"
            )
        return content

    def _require_reach(self, files: Any, path: str, key: str, wanted_bytes: int) -> None:
        size_bytes = self._size(files, path, key)
        if size_bytes < wanted_bytes:
            raise IntegrityError(f"object ends early {self._subject(key)} {wanted_bytes=} {size_bytes=}")

    def _rows(self, files: Any, directory: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the path and the facts of every file below a directory, straight from the server."""
        files.invalidate_cache()
        try:
            if self._writes_objects:
                for path, row in files.find(directory, detail=True, **self._bound(LISTING_BYTES)).items():
                    if row["type"] == "file":
                        yield str(path), row
                return
            # Not find(): on other filesystems it passes over directories that it may not read.
            pending = [directory]
            while pending:
                for row in files.ls(pending.pop(), detail=True):
                    if row["type"] == "directory":
                        pending.append(row["name"])
                    else:
                        yield str(row["name"]).rstrip("/"), row
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._is_s3 or class_for_remote(error) is not ObjectMissingError:
                raise

    def _bound(self, length: int = 0) -> dict[str, float]:
        """Return the argument that ends a call which transfers so many bytes, where the client is known to take it."""
        return {"timeout": self._patience_s + length / SLOWEST_BYTES_PER_S} if self._is_s3 else {}

    def _path(self, key: str) -> str:
        return f"{self._base}/{require_key(key)}"

    def _subject(self, key: str) -> str:
        return f"{key=} url={self._url}"

    @contextlib.contextmanager
    def _translated(self, action: str, key: str = "") -> Iterator[Any]:
        files = self._files
        if files is None:
            raise ClosedError(f"store is closed url={self._url}")
        try:
            yield files
        except MocError:
            raise
        except Exception as error:  # noqa: BLE001 - client libraries raise anything; translated, never dropped
            # Not chained: the foreign message, which a traceback would print, may quote signed URLs or keys.
            raise translate_remote_error(
                error, action=action, subject=self._subject(key), secrets=self._secrets
            ) from None


def _modified_s(row: Mapping[str, Any]) -> float:
    """Return when the store says that the object was written, under any of the names that filesystems use."""
    for name in ("LastModified", "mtime", "last_modified", "updated", "modified", "created"):
        value = row.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    return 0.0
