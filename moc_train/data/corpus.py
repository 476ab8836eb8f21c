"""Documents, in a fixed order, from text and JSONL files or from Python's own standard library."""

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec

__all__ = ["CorpusError", "read_documents"]

# Other people's packages, and tests, which some distributions leave out.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class CorpusError(ValueError):
    """Text that cannot be read; the message names the file and line."""


def read_documents(paths: Sequence[str], *, max_bytes: int) -> Iterator[str]:
    """Yield whole documents until their UTF-8 size passes `max_bytes` (0: no limit).

    A .txt file is one document; a .jsonl file has one per line, in the field `text`. No paths: the standard library.
    """
    total = 0
    for document in _read_all(paths):
        if not document.strip():
            continue
        yield document
        total += len(document.encode())
        if max_bytes and total >= max_bytes:
            return


def _read_all(paths: Sequence[str]) -> Iterator[str]:
    if not paths:
        yield from _read_standard_library()
    for path in paths:
        try:
            with fsspec.open(path, "rt", encoding="utf-8", errors="replace") as stream:
                if path.endswith(".jsonl"):
                    yield from _read_jsonl(path, stream)
                else:
                    yield stream.read()
        except OSError as e:
            raise CorpusError(f"corpus file cannot be read path={path} reason={e}") from e


def _read_jsonl(path: str, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as e:
            raise CorpusError(f"corpus line is not JSON path={path} line={number}") from e
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CorpusError(f"corpus line needs an object with a string in 'text' path={path} line={number}")
        yield text


def _read_standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]  # they may hold far more than the rest
        names += [os.path.join(folder, name) for name in files if name.endswith(".py")]
    for name in sorted(names, key=lambda name: Path(name).relative_to(root).as_posix()):
        yield Path(name).read_text(encoding="utf-8", errors="replace")
