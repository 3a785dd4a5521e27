"""Looks at the machine while runs are active, and tells the scheduler how short memory is.

What is read: the container's limits (cgroup v2, then v1) or the machine's, pressure stall information where the kernel
has it, the workers' own memory, open descriptors, and how late the loop is. psutil is imported where /proc is missing.
Loop thread only; a look takes some tenths of a millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.events import names
from stageflow.runtime.sampling import anonymous_bytes
from stageflow.runtime.tuner import Tuner
from stageflow.scheduler import signals as sig
from stageflow.scheduler.backpressure import Ladder, LadderState, Reading, climb

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver

_log = logging.getLogger("stageflow")
EVERY: Final = 0.25  # seconds between looks
RISING: Final = 0.05  # the same while memory grows or is short
STEEP: Final = 0.02  # growth of the used share between two looks that calls for the shorter time
CGROUPS: Final = "/sys/fs/cgroup"
#: seconds between two kills: the memory of a killed worker has to come back first
BETWEEN_KILLS: Final = 2.0


class Sources(msgspec.Struct, frozen=True):
    """Where the numbers come from; tests give folders of their own."""

    cgroup: str = CGROUPS
    proc: str = "/proc"


HERE: Final = Sources()


def _text(path: str) -> str:
    try:
        with open(path) as file:  # pathlib would cost 5 ms of every start
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _field(text: str, key: str) -> int:
    """The number behind `key` at the start of a line; 0 where there is none."""
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if name.rstrip(":") == key:
            number = rest.split()[0] if rest.split() else ""
            return int(number) if number.isdigit() else 0
    return 0


def _folders(sources: Sources) -> list[str]:
    """Our cgroup and its ancestors, version 2, innermost first."""
    for line in _text(f"{sources.proc}/self/cgroup").splitlines():
        if line.startswith("0::"):
            parts = [part for part in line[3:].strip().split("/") if part]
            return ["/".join((sources.cgroup, *parts[:n])) for n in range(len(parts), -1, -1)]
    return [sources.cgroup]


def memory(sources: Sources = HERE) -> tuple[int, int]:
    """(used, total) bytes of the tightest limit above us: a cgroup's, or the machine's. Page cache that can be dropped
    does not count as used."""
    info = _text(f"{sources.proc}/meminfo")
    total = _field(info, "MemTotal") * 1024
    if total:
        best = (total - _field(info, "MemAvailable") * 1024, total)
    else:
        best = _by_psutil()
    for folder in _folders(sources):
        limit, used = _number(f"{folder}/memory.max"), _number(f"{folder}/memory.current")
        if limit is not None and used is not None:
            used -= _field(_text(f"{folder}/memory.stat"), "inactive_file")
            best = _tighter(best, (max(0, used), limit))
    limit = _number(f"{sources.cgroup}/memory/memory.limit_in_bytes")
    used = _number(f"{sources.cgroup}/memory/memory.usage_in_bytes")
    if limit is not None and used is not None and limit < 1 << 60:
        used -= _field(_text(f"{sources.cgroup}/memory/memory.stat"), "total_inactive_file")
        best = _tighter(best, (max(0, used), limit))
    return best


def _tighter(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return b if b[1] and (not a[1] or b[0] / b[1] > a[0] / a[1]) else a


def _by_psutil() -> tuple[int, int]:
    try:
        import psutil
    except ImportError:
        return 0, 0
    found = psutil.virtual_memory()
    return int(found.total - found.available), int(found.total)


def stalled(sources: Sources = HERE) -> float:
    """Share of the last 10 s in which every process waited for memory; 0 where the kernel does not say."""
    for path in (f"{_folders(sources)[0]}/memory.pressure", f"{sources.proc}/pressure/memory"):
        for line in _text(path).splitlines():
            if line.startswith("full "):
                for part in line.split()[1:]:
                    key, _, value = part.partition("=")
                    if key == "avg10":
                        return float(value) / 100.0
    return 0.0


def throttled(sources: Sources = HERE) -> float:
    """Seconds, since it began, in which the CPU quota of the container held its processes; 0 without one."""
    folder = _folders(sources)[0]
    for path, key, unit in (
        (f"{folder}/cpu.stat", "throttled_usec", 1e-6),
        (f"{sources.cgroup}/cpu/cpu.stat", "throttled_time", 1e-9),
    ):
        if found := _field(_text(path), key):
            return found * unit
    return 0.0


def descriptors(sources: Sources = HERE) -> float:
    """Share of the allowed descriptors of this process that are open."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return len(os.listdir(f"{sources.proc}/self/fd")) / most if most > 0 else 0.0
    except (ImportError, OSError):
        return 0.0


def look(at: float, pids: Iterable[int] = (), lag: float = 0.0, sources: Sources = HERE) -> Reading:
    """One look at everything."""
    used, total = memory(sources)
    workers = [anonymous_bytes(pid) for pid in pids]
    return Reading(
        at=at,
        used=used,
        total=total,
        stalled=stalled(sources),
        workers=sum(workers),
        fattest=max(workers, default=0),
        loop_lag=lag,
        descriptors=descriptors(sources),
        throttled=throttled(sources),
    )


class Suspect(msgspec.Struct, frozen=True):
    """A running task that could be ended to get memory back."""

    pid: int
    stage: str
    since: float  #: monotonic second of its start
    over: int  #: bytes that its worker holds above what the stage is expected to need


def victim(suspects: Iterable[Suspect]) -> Suspect | None:
    """The youngest task of the stage that is most over its estimate: least work is lost there."""
    listed = list(suspects)
    if not listed:
        return None
    stage = max(listed, key=lambda one: one.over).stage
    return max((one for one in listed if one.stage == stage), key=lambda one: one.since)


class Monitor:
    """Watches for one driver. `begin` and `end` with each run; looks only in between."""

    def __init__(self, driver: Driver, ladder: Ladder | None = None, sources: Sources | None = None) -> None:
        self._driver = driver
        self.ladder = ladder if ladder is not None else Ladder()
        self.sources = sources if sources is not None else Sources()
        self.state = LadderState()
        self.reading: Reading | None = None
        self.tuner = Tuner(driver) if driver.engine.config.adaptive else None
        self._runs = 0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._killed = 0.0

    def begin(self) -> None:
        """One more run is active."""
        self._runs += 1
        if self._timer is None:
            self._again(EVERY)

    def end(self) -> None:
        """One run less."""
        self._runs -= 1
        if self._runs <= 0:
            self._runs = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self.state.level:
                self._enter(LadderState())
            if self.tuner is not None:
                self.tuner.reset()

    def close(self) -> None:
        """No run is active any more."""
        self._runs = 0
        self.end()

    def _again(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds
        self._timer = self._driver.loop.call_later(seconds, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        before = self.reading
        reading = self.reading = look(now, self._pids(), max(0.0, now - self._due), self.sources)
        state = climb(self.state, reading, self.ladder)
        if state is not self.state:
            self._enter(state)
        if state.level >= 4:
            self._shed(now)
        if self.tuner is not None:
            self.tuner.look(reading)
        rising = before is not None and reading.fraction - before.fraction > STEEP
        if self._runs > 0:
            self._again(RISING if rising or state.level else EVERY)

    def _pids(self) -> list[int]:
        supply = getattr(self._driver.engine, "_supply", None)
        found: list[int] = supply.idle_pids() if supply is not None else []
        return found[:64]

    def _enter(self, state: LadderState) -> None:
        """Tell the scheduler and the sinks; from step 3 on give back what is only kept warm."""
        before, self.state = self.state, state
        if before.level == state.level:
            return
        driver = self._driver
        driver.signal(sig.PressureChanged(state.level, state.reason))
        kind = names.BACKPRESSURE_ENTERED if state.level > before.level else names.BACKPRESSURE_LEFT
        if bool(before.level) != bool(state.level) or kind == names.BACKPRESSURE_ENTERED:
            for job in list(driver.jobs.values()):
                driver._event(kind, job, None, None, None, None, {"reason": "memory", "level": state.level})
        if state.level > before.level:
            _log.warning("memory is short (step %d of 4): %s", state.level, state.reason)
        if state.level >= 3 > before.level:
            supply = getattr(driver.engine, "_supply", None)
            if supply is not None:
                supply.trim()

    def _shed(self, now: float) -> None:
        """End one task, by ending its worker: the scheduler sees a lost worker and runs the task again, alone."""
        if now - self._killed < BETWEEN_KILLS:
            return
        chosen = victim(self.suspects())
        if chosen is None:
            return
        self._killed = now
        _log.warning(
            "memory is about to run out: ending the youngest task of stage %r (worker %d, %d MiB over its estimate); "
            "it will run again by itself",
            chosen.stage,
            chosen.pid,
            chosen.over >> 20,
        )
        self._driver.engine.supply().shed(chosen.pid)

    def suspects(self) -> list[Suspect]:
        """The running tasks of the process lane."""
        driver = self._driver
        lane: Any = driver.executors.get("process")
        running_in = getattr(lane, "running_in", None)
        if running_in is None:
            return []
        found = []
        for call, pid in running_in():
            running = driver.running.get(call)
            task = driver.machine.tasks.get(call)
            if running is None or task is None:
                continue
            name = running.job.graph.specs[running.action.stage].name
            found.append(Suspect(pid, name, running.since, anonymous_bytes(pid) - task.expected))
        return found
