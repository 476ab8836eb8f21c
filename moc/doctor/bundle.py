"""The bundle: a compressed archive, readable by its owner only, through whose one gate nothing passes with a secret."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from moc.errors import UsageError
from moc.store.redact import scrub, scrub_value
from moc.store.translate import translate_os_error

__all__ = ["Bundle"]

TEXT_LIMIT_BYTES = 4 << 20  # of one file; the end is kept, because it is the newest


class Bundle:
    """An archive being written. A context manager: after an error nothing is left behind. Raises: StorageError."""

    def __init__(self, path: Path, *, folder: str, secrets: Iterable[str], epoch_s: float) -> None:
        """`path` must be free; all files lie below `folder` in the archive."""
        self.path, self._folder, self._epoch_s = path, folder, int(epoch_s)
        self._secrets = tuple(sorted(secrets))
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise UsageError(f"bundle exists already: path={path} allowed=a free name, see -o") from error
        except FileNotFoundError as error:
            raise UsageError(f"no folder for the bundle: path={path} allowed=a name in a folder that exists") from error
        except OSError as error:
            raise translate_os_error(error, action="create", subject=f"path={path}") from error
        self._file = os.fdopen(handle, "wb")
        self._archive = tarfile.open(fileobj=self._file, mode="w:gz")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._archive.close()
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise translate_os_error(error, action="write", subject=f"path={self.path}") from error
        finally:
            self._file.close()
            if kind is not None:
                self.path.unlink(missing_ok=True)

    def add_json(self, name: str, value: object) -> None:
        """Add a JSON value without its secrets."""
        self._add(name, json.dumps(scrub_value(value, self._secrets), indent=1, default=str))

    def add_text(self, name: str, text: str) -> None:
        """Add a text without its secrets; of a long one the end."""
        self._add(name, scrub(text, self._secrets)[-TEXT_LIMIT_BYTES:])

    def _add(self, name: str, text: str) -> None:
        content = text.encode("utf-8", "replace")
        entry = tarfile.TarInfo(f"{self._folder}/{name}")
        entry.size, entry.mode, entry.mtime = len(content), 0o600, self._epoch_s
        try:
            self._archive.addfile(entry, io.BytesIO(content))
        except OSError as error:
            raise translate_os_error(error, action="write", subject=f"path={self.path}") from error
