"""From a URL to a store: the only place that knows which implementation serves which URL."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from moc.clock import Clock, SystemClock
from moc.errors import StorageError, StoreDeniedError, UsageError
from moc.store.local import LocalStore
from moc.store.port import Store
from moc.store.redact import redact_url
from moc.trace import Trace

__all__ = ["absolute_url", "open_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(/)?")
_ALLOWED = "a path, file:///path, s3://bucket/path or the URL of any other filesystem that fsspec knows"


def open_store(
    url: str,
    *,
    must_exist: bool = False,
    storage_options: Mapping[str, object] | None = None,
    trace: Trace | None = None,
    clock: Clock | None = None,
    chance: random.Random | None = None,
) -> Store:
    """Open the store that a URL or a path names; a relative path counts from the present working directory.

    `storage_options` go to the fsspec filesystem (credentials, endpoint) and are refused for paths. With `must_exist`,
    raises UsageError where there is nothing. Blocks: one look at the folder, or with `must_exist` one request.
    """
    if not url.strip() or "\0" in url:
        raise UsageError(f"storage URL is empty or has a NUL url={redact_url(url)!r} allowed={_ALLOWED}")
    path = _local_path(url)
    if path is not None:
        if storage_options:
            names = sorted(storage_options)
            raise UsageError(f"a path takes no storage options {path=} options={names} allowed=none")
        return _open_local(path, must_exist=must_exist, trace=trace)
    from moc.store.remote import RemoteStore
    from moc.store.retry import RetryingStore

    remote = RemoteStore(url, storage_options, trace=trace)
    try:
        if must_exist and not remote.exists():
            raise UsageError(f"nothing is stored there url={remote.properties.url} allowed=the URL of a repository")
    except (StorageError, UsageError):
        remote.close()
        raise
    return RetryingStore(remote, clock or SystemClock(), chance=chance, trace=trace)


def absolute_url(url: str) -> str:
    """Return a URL that means the same from every working directory, such as the agent's."""
    path = _local_path(url)
    return url if path is None else os.path.abspath(path)


def _local_path(url: str) -> str | None:
    """Return the path that the URL names on this machine, or None for another kind of storage."""
    if "::" in url and "://" in url:
        raise UsageError(f"no chain of filesystems in a storage URL url={redact_url(url)} allowed={_ALLOWED}")
    match = _SCHEME.match(url)
    if match is None:
        if url.startswith("~"):
            raise UsageError(f"'~' is not expanded here url={redact_url(url)} allowed={_ALLOWED}")
        return url
    scheme = match.group(1).lower()
    if scheme in {"file", "local"}:
        host, slash, path = url[match.end() :].partition("/") if match.group(2) else ("", "/", url[match.end() :])
        if host not in {"", "localhost"} or not slash or not path:
            raise UsageError(f"file URL names no absolute path url={redact_url(url)} allowed=file:///path")
        return unquote(f"/{path}")
    if match.group(2) is None:
        raise UsageError(f"only one slash after the scheme url={redact_url(url)} allowed={scheme}://... or ./PATH")
    return None


def _open_local(path: str, *, must_exist: bool, trace: Trace | None) -> LocalStore:
    """Open a folder, after a look at what stands at the path: a mistake should show before training starts."""
    root = Path(os.path.abspath(path))
    if not os.path.lexists(root) and must_exist:
        raise UsageError(f"folder does not exist path={root} allowed=the folder of a repository")
    store = LocalStore(root, trace=trace)
    if root.is_dir():
        if not os.access(root, os.R_OK | os.X_OK):
            raise StoreDeniedError(f"no rights to read this folder path={root} allowed=a folder with r and x rights")
        return store
    nearest = next(parent for parent in root.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise UsageError(f"not a folder path={nearest} allowed=a path below a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StoreDeniedError(f"no rights to make this folder path={root} denied_by={nearest}")
    return store
