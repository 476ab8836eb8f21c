"""A process killed at any step of a put or delete leaves the old state or the new one, and a later store goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moc.store.local import LocalStore

VICTIM = """
import os, signal, sys
from pathlib import Path
from moc.store.local import LocalStore
from moc.trace import Trace

root, action, fatal = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0

def sink(event, span, fields):
    global count
    if count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1

store = LocalStore(root, trace=Trace(sink))
content = memoryview(b"new" * 1000)
if action == "delete":
    store.delete("folder/present")
else:
    store.put("folder/deeper/object", [content], create_only=action == "create")
print(count)
"""

EVENT_LIMIT = 60  # more than any of these actions has


def run_victim(root: Path, action: str, fatal: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", VICTIM, str(root), action, str(fatal)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("action", ["put", "create", "delete"])
def test_a_kill_at_any_span_leaves_the_old_or_the_new_state(tmp_path: Path, action: str) -> None:
    before = {"folder/present": b"old"}
    after = {} if action == "delete" else before | {"folder/deeper/object": b"new" * 1000}
    seen = []

    for fatal in range(EVENT_LIMIT):
        root = tmp_path / f"{action}-{fatal}"
        LocalStore(root).put("folder/present", [memoryview(b"old")])
        done = run_victim(root, action, fatal)
        store = LocalStore(root)
        state = {entry.key: store.read(entry.key, limit_bytes=10_000) for entry in store.list("")}
        assert state in (before, after), json.dumps({"fatal": fatal, "keys": sorted(state)})
        seen.append(state == after)
        _repeat(store, action)
        assert store.sweep(older_than_s=0.0) <= 1
        assert {entry.key for entry in store.list("")} == set(after)
        assert not list(root.rglob(".*~*"))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr

    assert done.returncode == 0, "the action has more events than this test tries"
    assert fatal == int(done.stdout)
    assert seen == sorted(seen), "once visible, always visible"
    assert seen[0] is False
    assert seen[-1] is True


def _repeat(store: LocalStore, action: str) -> None:
    """Do what the dead process wanted to do, as its successor would."""
    if action == "delete":
        store.delete("folder/present")
    else:
        store.put("folder/deeper/object", [memoryview(b"new" * 1000)], create_only=action == "create")
