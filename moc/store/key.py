"""Which keys are legal, in every store alike: pure functions, no I/O.

The alphabet leaves out NUL, backslash, blanks and ``~``; a local store's temporary files have a ``~``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from moc.errors import UsageError
from moc.store.port import Segment

__all__ = ["KEY_LENGTH_LIMIT", "SEGMENT_LENGTH_LIMIT", "byte_views", "is_key", "require_key", "require_prefix"]

KEY_LENGTH_LIMIT = 800  # S3 allows 1024 bytes, and the repository's own prefix needs some
SEGMENT_LENGTH_LIMIT = 200  # file names end at 255 bytes, and a temporary name is longer than the final one

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_ALLOWED = (
    "segments of [A-Za-z0-9._-] joined by '/', none empty, '.' or '..', "
    f"at most {SEGMENT_LENGTH_LIMIT} characters each and {KEY_LENGTH_LIMIT} in all"
)


def is_key(key: str) -> bool:
    """Return whether `key` is legal."""
    if len(key) > KEY_LENGTH_LIMIT:
        return False
    return all(
        _SEGMENT.fullmatch(segment) is not None and segment not in {".", ".."} and len(segment) <= SEGMENT_LENGTH_LIMIT
        for segment in key.split("/")
    )


def require_key(key: str) -> str:
    """Return `key`; raises UsageError when it is not legal."""
    if not is_key(key):
        raise UsageError(f"illegal key key={key[:KEY_LENGTH_LIMIT]!r} allowed={_ALLOWED}")
    return key


def require_prefix(prefix: str) -> str:
    """Return `prefix`, which is a legal key or empty; raises UsageError otherwise."""
    return require_key(prefix) if prefix else prefix


def byte_views(segments: Sequence[Segment]) -> list[memoryview]:
    """Return the non-empty segments as flat views of bytes; raises UsageError for one that is not contiguous."""
    views = []
    for index, segment in enumerate(segments):
        view = memoryview(segment)
        if not view.c_contiguous:
            raise UsageError(f"segment is not contiguous index={index} shape={view.shape} strides={view.strides}")
        if view.nbytes:
            views.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
    return views
