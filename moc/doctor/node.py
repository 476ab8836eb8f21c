"""Facts of this machine that decide how moc runs on it. Nothing here waits for a network or a foreign process."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import moc
from moc._native import KERNELS
from moc.agent.memory import available_memory
from moc.store.redact import redact_url

__all__ = ["allowed_environment", "environment_of", "mount_of", "node_facts", "secrets_of"]

PACKAGES = ("moc", "torch", "deepspeed", "numpy", "fsspec", "s3fs", "gcsfs", "adlfs", "safetensors")
CPU_FLAGS = ("sse4_2", "pclmulqdq", "avx2", "avx512f", "avx512vl", "vpclmulqdq", "crc32", "pmull")
LIMITS = ("AS", "CORE", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC")
MEMORY = ("MemTotal", "MemFree", "MemAvailable", "Shmem", "SwapTotal", "SwapFree", "Committed_AS", "CommitLimit")
KERNEL = ("core_pattern", "pid_max", "yama/ptrace_scope", "random/boot_id")
ALLOWED = re.compile(
    r"MOC_\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|CROSS_(RANK|SIZE)|MASTER_PORT|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING"
    r"|OMP_NUM_THREADS|MKL_NUM_THREADS|PYTHONHASHSEED|PYTHONUNBUFFERED|PYTORCH_\w*ALLOC_CONF|TORCH_NCCL_\w+|TORCHELASTIC_\w+"
    r"|NCCL_(DEBUG|TIMEOUT|SOCKET_IFNAME|IB_DISABLE|P2P_DISABLE|ASYNC_ERROR_HANDLING)|GLOO_SOCKET_IFNAME"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|NNODES|NTASKS|PROCID|LOCALID|NODEID|RESTART_COUNT)|TMPDIR|LANG|TZ"
)
"""Names whose values go into a bundle. Everything else is not even named: the name of a secret can be one too."""
SECRET_NAME = re.compile(r"key|secret|token|passw|credential|sas|auth|cookie|connection_string", re.IGNORECASE)
SECRET_LENGTH_MINIMUM = 6


def node_facts() -> dict[str, object]:
    """Return versions, processor, memory and limits, clocks and the allowed part of the environment."""
    return {
        "versions": {"moc": moc.__version__, "python": sys.version, **_packages()},
        "executable": sys.executable,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "memory_bytes": _memory(),
        "available_bytes": available_memory().size_bytes,
        "cgroups": _cgroups(),
        "oom_kills_since_boot": _oom_kills(),
        "limits": {name: list(resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))) for name in LIMITS},
        "shm": _space("/dev/shm"),
        "tmp": _space("/tmp"),
        "sysctl": {name: _text(Path("/proc/sys/kernel") / name) for name in KERNEL},
        "clock": {"epoch_s": time.time(), "monotonic_s": time.monotonic(), "timezone": time.tzname[0]},
        "uid": os.getuid(),
        "pid_namespace": _link("/proc/self/ns/pid"),
        "environment": allowed_environment(os.environ),
    }


def allowed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that may be shown, URLs among them without secrets. Pure."""
    return {name: redact_url(value) for name, value in sorted(environment.items()) if ALLOWED.fullmatch(name)}


def environment_of(pid: int | str) -> dict[str, str]:
    """Return the environment that a process was started with, empty if it may not be seen."""
    rows = _text(Path(f"/proc/{pid}/environ")).split("\0")
    return dict(row.split("=", 1) for row in rows if "=" in row)


def secrets_of(environment: Mapping[str, str]) -> set[str]:
    """Return the values that must not appear in a bundle, wherever they come from. Pure."""
    return {
        value
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= SECRET_LENGTH_MINIMUM and not ALLOWED.fullmatch(name)
    }


def mount_of(path: str) -> dict[str, object]:
    """Return where a path is mounted from and how much room there is; the path need not exist."""
    folder = Path(os.path.abspath(path))
    while not folder.exists():
        folder = folder.parent
    found: dict[str, object] = {"path": str(folder), **_space(str(folder))}
    longest = -1
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if folder.is_relative_to(point) and len(point) >= longest:
            longest = len(point)
            kind, source = right.split()[:2]
            found |= {"mounted_at": point, "kind": kind, "source": redact_url(source), "flags": left.split()[5]}
    return found


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> dict[str, object]:
    text = _text(Path("/proc/cpuinfo"))
    flags = set((re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE) or [""])[0].split())
    model = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return {
        "model": model[0] if model else "",
        "count": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "checksum_kernels": list(KERNELS),
        "load": list(os.getloadavg()),
    }


def _memory() -> dict[str, int]:
    rows = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines() if ":" in line)
    return {name: int(rows[name].split()[0]) * 1024 for name in MEMORY if name in rows}


def _cgroups() -> list[dict[str, str]]:
    """Return the limits of every cgroup from this process's up to the root, and what the out-of-memory killer did."""
    path = next((row[3:] for row in _text(Path("/proc/self/cgroup")).splitlines() if row.startswith("0::")), "/")
    folder = Path("/sys/fs/cgroup") / path.lstrip("/")
    names = ("memory.max", "memory.high", "memory.current", "memory.events", "cpu.max", "pids.max", "pids.current")
    levels = [level for level in (folder, *folder.parents) if level.is_relative_to("/sys/fs/cgroup")]
    return [
        {"path": str(level), **{name: _text(level / name) for name in names if (level / name).exists()}}
        for level in levels
    ]


def _oom_kills() -> int | None:
    """Return how many processes of this machine the kernel has killed for memory, None if it does not tell."""
    found = re.search(r"^oom_kill (\d+)$", _text(Path("/proc/vmstat")), re.MULTILINE)
    return None if found is None else int(found[1])


def _space(path: str) -> dict[str, object]:
    try:
        facts = os.statvfs(path)
    except OSError as error:
        return {"error": str(error)}
    return {
        "free_bytes": facts.f_bavail * facts.f_frsize,
        "size_bytes": facts.f_blocks * facts.f_frsize,
        "free_files": facts.f_favail,
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # not on this kernel, or not for this user
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
