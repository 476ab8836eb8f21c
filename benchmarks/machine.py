"""What a figure depends on: the facts of the machine that measured it."""

import os
import platform
from pathlib import Path

__all__ = ["machine_facts"]


def machine_facts(folder: Path) -> dict[str, object]:
    """Return the facts of this machine, with the filesystem of the folder that is written to."""
    rows = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    models = sorted({value.strip() for name, value in rows if name.strip() == "model name"})
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    device, kind = _mount(folder)
    return {
        "cpu": ", ".join(models) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory["MemTotal"].split()[0]) / 1e6, 1),
        "free_gb": round(int(memory["MemAvailable"].split()[0]) / 1e6, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "filesystem": f"{kind} on {device}",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _mount(folder: Path) -> tuple[str, str]:
    """Return device and type of the filesystem that a folder is on."""
    found = [("", "", "")]
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        if folder.resolve().is_relative_to(point):
            found.append((point, device, kind))
    return max(found, key=lambda row: len(row[0]))[1:]
