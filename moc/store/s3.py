"""What S3 needs beyond fsspec: bounds on requests, the size of parts, and uploads that a dead process has left.

s3fs is reached only through the filesystem object that it made; nothing here imports it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

__all__ = ["PART_BYTES", "PART_LIMIT", "S3_SCHEMES", "PartedContent", "bound_requests", "stale_uploads"]

S3_SCHEMES = frozenset({"s3", "s3a"})
REQUEST_TRIES = 4  # of one request, by botocore, within about 4 s: one part of many should not fail the whole object
SILENCE_S = 60.0  # until a request without an answer is given up; joining the parts of a huge object takes long
PART_BYTES = 16 * 2**20  # large enough for a fast stream, small enough to send many of them at once
PART_LIMIT = 9000  # S3 takes 10000 parts
PAGE_LIMIT = 100  # of 1000 uploads each, that one sweep looks at


class PartedContent:
    """An object's bytes for a client that cuts them into slices: only the slices are copied, never the whole.

    After `release` nothing refers to the views any more, and a slice raises ValueError.
    """

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views: list[memoryview] | None = list(views)
        self._starts = [0]
        for view in views:
            self._starts.append(self._starts[-1] + view.nbytes)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> bytes:
        if self._views is None:
            raise ValueError("the content was released while it was being sent")
        begin, end, step = part.indices(len(self))
        assert step == 1, f"only whole ranges are sent {part=}"
        pieces = []
        for index in range(bisect_right(self._starts, begin) - 1, len(self._views)):
            start = self._starts[index]
            if start >= end:
                break
            pieces.append(self._views[index][max(begin - start, 0) : end - start])
        return b"".join(pieces)

    def release(self) -> None:
        self._views = None


def bound_requests(files: Any) -> None:
    """Let botocore alone repeat requests, a few times; what the user has set in `config_kwargs` stays.

    s3fs repeats what botocore has repeated, and whoever calls repeats again: 125 requests before an error is seen.
    """
    files.retries = 1
    files.config_kwargs = {
        "retries": {"mode": "standard", "total_max_attempts": REQUEST_TRIES},
        "read_timeout": SILENCE_S,
        **files.config_kwargs,
    }


def stale_uploads(files: Any, base: str, *, older_than_s: float, timeout: float) -> list[dict[str, str]]:
    """Return bucket, key and upload id of multipart uploads below `base` that were begun longer ago than this."""
    bucket, key, _ = files.split_path(base)
    begun_before = datetime.now(timezone.utc) - timedelta(seconds=older_than_s)
    found: list[dict[str, str]] = []
    page: dict[str, str] = {}
    for _ in range(PAGE_LIMIT):
        answer = files.call_s3(
            "list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/" if key else "", **page, timeout=timeout
        )
        found += [
            {"Bucket": bucket, "Key": row["Key"], "UploadId": row["UploadId"]}
            for row in answer.get("Uploads", [])
            if row["Initiated"] < begun_before
        ]
        if not answer.get("IsTruncated"):
            break
        page = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
    return found
