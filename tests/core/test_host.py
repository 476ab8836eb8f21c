"""What a process gets from its operating system."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from moc.host import SystemHost


def test_an_agent_that_hangs_before_it_listens_is_not_waited_for_without_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {note}\n")  # has left its parent, and holds the pipe
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    try:
        with pytest.raises(TimeoutError, match="listening"):
            SystemHost().start_agent(tmp_path, run="run-7", idle_s=1.0, log=tmp_path / "log", timeout_s=2.0)
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)
