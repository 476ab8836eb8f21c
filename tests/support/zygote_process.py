"""A process that imports torch and DeepSpeed once and forks the ranks of every test world, which then cost no imports.

The first engine of a process imports torch's compiler, which takes longer than torch itself: that is done here too.

python -m tests.support.zygote_process: reads one JSON request per line, {"module": ..., "spec": ..., "environment":
..., "log": PATH}, and answers {"pid": n}: a child that calls the module's `main(spec)`. When one has ended it writes
{"ended": pid, "code": n}, negative for a signal. When its input ends, so do it and its children. Process groups are
created after the fork, and no thread runs before it.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

import moc.manager  # noqa: F401
import moc_train.training  # noqa: F401

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until the input ends."""
    _end_with_parent()
    torch.set_num_threads(1)
    for builder in (CPUAdamBuilder, FusedAdamBuilder, ShareMemCommBuilder):
        builder().load(verbose=False)  # children find them loaded: no compiler, no lock, no look at the processor
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not a reply
    wake_receive, wake_send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_send, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake_receive, selectors.EVENT_READ)
    replies.write(json.dumps({"ready": os.getpid()}) + "\n")
    pending = b""
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if wake_receive in ready:
            os.read(wake_receive, 4096)
            _report_ended(replies)
        if 0 in ready:
            received = os.read(0, 1 << 16)
            if not received:
                os._exit(0)  # the kernel kills the children
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                request = json.loads(line)
                importlib.import_module(request["module"])
                gc.freeze()  # DeepSpeed collects garbage for every engine: what is imported is none
                replies.write(json.dumps({"pid": _fork(request)}) + "\n")


def _report_ended(replies: Any) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        replies.write(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}) + "\n")


def _fork(request: Mapping[str, Any]) -> int:
    parent = os.getpid()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"threads would be lost in a fork: {len(threads)}"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become_rank(request, parent)
        sys.modules[request["module"]].main(request["spec"])
        code = 0
    except BaseException:  # noqa: BLE001  the process's top: what went wrong is in its log, exit functions run
        traceback.print_exc()
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _become_rank(request: Mapping[str, Any], parent: int) -> None:
    _end_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    limit = os.sysconf("SC_OPEN_MAX")
    os.closerange(3, min(limit, 1024))
    faulthandler.enable()  # SIGABRT writes the stacks of all threads
    os.environ.update(request["environment"])


if __name__ == "__main__":
    main()
