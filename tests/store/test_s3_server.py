"""The server that the S3 tests need ends with the process that started it, however that ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
HOLDER = """
import sys
from pathlib import Path
from tests.support.s3_server import S3Server
with S3Server(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""


def test_a_killed_test_process_leaves_no_server_behind(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None
        server = os.pidfd_open(int(holder.stdout.readline()))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=DEADLINE_S)

    poller = select.poll()
    poller.register(server, select.POLLIN)
    ended = poller.poll(DEADLINE_S * 1e3)
    os.close(server)
    assert ended
