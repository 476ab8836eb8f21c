"""A storage whose URL has a password in it, and whose errors and log lines quote it, as those of client libraries do.

Registered with fsspec in every process by `site/sitecustomize.py`; files lie in a folder of this machine.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem

log = logging.getLogger("vault")


class VaultFileSystem(LocalFileSystem):
    """``vault://user:password@place/folder``, for who has the password. Every 7th put fails, and says why."""

    protocol = "vault"
    cachable = False

    def __init__(self, username: str = "", password: str = "", **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)
        if password != os.environ["VAULT_EXPECTED"]:
            raise PermissionError(f"wrong password for {username}: {password}")
        self._password = password
        self._puts = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        path = str(path)
        return "/" + path.partition("@")[2].partition("/")[2] if path.startswith("vault:") else path

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        user, _, password = path.removeprefix("vault://").rpartition("@")[0].partition(":")
        return {"username": user, "password": password}

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._puts += 1
        log.info("PUT %s Authorization: Bearer %s", path, self._password)
        log.warning("retrying https://place%s?X-Amz-Signature=%s", path, self._password)
        if self._puts % 7 == 0 and "objects" in path:
            raise OSError(f"403 for vault://me:{self._password}@place{path}?signature={self._password}")
        super().pipe_file(path, value, mode=mode, **options)
