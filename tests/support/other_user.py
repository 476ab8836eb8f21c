"""Runs a function as another user of this machine, in a forked child that has given up root for good."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["NOBODY", "as_nobody", "needs_root"]

NOBODY = 65534

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def as_nobody(act: Callable[[], object]) -> Any:
    """Return the JSON value that `act` returns as an unprivileged user, or "ErrorClass: words" if it raises.

    `act` finds everything imported that this process has imported: the other user need not be able to read it.
    """
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                answer = act()
            except BaseException as error:  # noqa: BLE001 - told to the parent
                answer = f"{type(error).__name__}: {error}"
            os.write(send, json.dumps(answer).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        answer = stream.read()
    os.waitpid(pid, 0)
    return json.loads(answer)
