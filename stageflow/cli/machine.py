"""What this machine lets us use: cores by affinity and quota, memory by cgroup, kinds of shared memory. Reads, never
writes.

The cgroup readers take the folders to look in, so that a test can show them any container.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import psutil

_CGROUP: Final = Path("/sys/fs/cgroup")
_SELF: Final = Path("/proc/self/cgroup")
#: cgroup v1 says "no limit" with a number near 2^63, rounded to pages
_V1_UNLIMITED: Final = 1 << 60
_N = TypeVar("_N", int, float)


class CgroupLimits(msgspec.Struct, frozen=True):
    """What the control groups around this process allow. None where nothing is limited."""

    version: int | None
    cpus: float | None = None
    memory: int | None = None
    memory_used: int | None = None
    pids: int | None = None


class Machine(msgspec.Struct, frozen=True):
    """The facts `doctor` prints, sizes in bytes."""

    system: str
    python: str
    cores: int
    usable_by_affinity: int
    cgroup: CgroupLimits
    memory: int
    memory_available: int
    shared_memory: str
    open_files: int | None

    @property
    def usable_cores(self) -> int:
        """By affinity and quota; half a core and more counts as one."""
        quota = self.cgroup.cpus
        return self.usable_by_affinity if quota is None else max(1, min(self.usable_by_affinity, round(quota)))

    @property
    def usable_memory(self) -> int:
        """What the machine has, or less where a cgroup says so."""
        return self.memory if self.cgroup.memory is None else min(self.memory, self.cgroup.memory)


def survey() -> Machine:
    """Look at this machine."""
    memory = psutil.virtual_memory()
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        cores=os.cpu_count() or 1,
        usable_by_affinity=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cgroup=cgroup_limits(),
        memory=memory.total,
        memory_available=memory.available,
        shared_memory=shared_memory_kind(),
        open_files=_open_files(),
    )


def shared_memory_kind() -> str:
    """How large values travel between processes here."""
    if hasattr(os, "memfd_create"):
        return "anonymous (memfd_create)"
    return "named mapping" if sys.platform == "win32" else "shm_open, unlinked at once"


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def cgroup_limits(root: Path = _CGROUP, membership: Path = _SELF) -> CgroupLimits:
    """The tightest limits between our own group and the root, for cgroup v2, else v1."""
    paths = _membership(membership)
    if (root / "cgroup.controllers").is_file():
        return _version2(root, paths.get("", "/"))
    if any((root / controller).is_dir() for controller in ("cpu", "memory", "cpu,cpuacct")):
        return _version1(root, paths)
    return CgroupLimits(None)


def _membership(file: Path) -> dict[str, str]:
    """Controller -> path of our group; the v2 hierarchy has the name ""."""
    found: dict[str, str] = {}
    for line in (_text(file) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            found[controller.removeprefix("name=")] = path
    return found


def _chain(base: Path, path: str) -> list[Path]:
    """Our group and every one above it.

    In a container our path may name a folder outside; the base itself always counts.
    """
    here = base / path.strip("/")
    return [folder for folder in (here, *here.parents) if folder == base or base in folder.parents]


def _version2(root: Path, path: str) -> CgroupLimits:
    cpus: list[float] = []
    memory: list[int] = []
    pids: list[int] = []
    for folder in _chain(root, path):
        quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        if quota.isdigit() and int(period or 100_000) > 0:
            cpus.append(int(quota) / int(period or 100_000))
        memory += _number(folder / "memory.max")
        pids += _number(folder / "pids.max")
    used = next((n for folder in _chain(root, path) for n in _number(folder / "memory.current")), None)
    return CgroupLimits(2, _least(cpus), _least(memory), used, _least(pids))


def _version1(root: Path, paths: dict[str, str]) -> CgroupLimits:
    cpus: list[float] = []
    base = next((root / name for name in ("cpu", "cpu,cpuacct") if (root / name).is_dir()), root / "cpu")
    for folder in _chain(base, paths.get("cpu", "/")):
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota and period and quota.isdigit() and period.isdigit() and int(period) > 0:  # -1 is no quota
            cpus.append(int(quota) / int(period))
    groups = _chain(root / "memory", paths.get("memory", "/"))
    memory = [n for folder in groups for n in _number(folder / "memory.limit_in_bytes") if n < _V1_UNLIMITED]
    used = next((n for folder in groups for n in _number(folder / "memory.usage_in_bytes")), None)
    pids = [n for folder in _chain(root / "pids", paths.get("pids", "/")) for n in _number(folder / "pids.max")]
    return CgroupLimits(1, _least(cpus), _least(memory), used, _least(pids))


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _number(file: Path) -> list[int]:
    text = _text(file)
    return [int(text)] if text is not None and text.isdigit() else []


def _least(values: list[_N]) -> _N | None:
    return min(values, default=None)
