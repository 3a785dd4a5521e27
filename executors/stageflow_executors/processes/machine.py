"""What this machine, or the container we are in, allows: cores, memory, and whether the kernel killed for want of it.

May import the standard library only.
"""

from __future__ import annotations

import os
from typing import Final

#: variables by which numeric libraries take their number of threads
THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def _read(path: str) -> str:
    try:
        with open(path) as file:  # pathlib would cost 5 ms of every start
            return file.read()
    except OSError:
        return ""


def _cgroup_folders() -> list[str]:
    """Folders of this process's cgroup and its ancestors, version 2, innermost first."""
    for line in _read("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            return _upwards("/sys/fs/cgroup", line[3:])
    return ["/sys/fs/cgroup"]


def _memory_folders() -> list[str]:
    """The same for the memory controller of version 1. Inside a container its own folder may be the mount itself."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _upwards("/sys/fs/cgroup/memory", path)
    return ["/sys/fs/cgroup/memory"]


def _upwards(mount: str, path: str) -> list[str]:
    parts = [part for part in path.strip().split("/") if part]
    return ["/".join([mount, *parts[:n]]) for n in range(len(parts), -1, -1)]


def usable_cores() -> int:
    """Cores by affinity and cgroup quota; at least one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    for folder in _cgroup_folders():
        quota, _, period = _read(folder + "/cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            cores = min(cores, max(1, round(int(quota) / int(period))))
    quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return max(1, cores)


def usable_memory() -> int:
    """Bytes of memory by machine and cgroup limit."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    except (ValueError, OSError, AttributeError):
        total = 4 << 30
    for text in [_read(f + "/memory.max") for f in _cgroup_folders()] + [
        _read(f + "/memory.limit_in_bytes") for f in _memory_folders()
    ]:
        if text.strip().isdigit():
            total = min(total, int(text))
    return total


def oom_kills() -> int:
    """How often the kernel killed for want of memory, in our cgroup where that is counted, else on the machine."""
    for folder in _cgroup_folders():
        for line in _read(folder + "/memory.events").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    paths = [folder + "/memory.oom_control" for folder in _memory_folders()]
    for path in [*paths, "/proc/vmstat"]:
        for line in _read(path).splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
