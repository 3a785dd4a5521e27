"""A reading of every run about once a second, as `engine.sample`, while somebody listens; more often, how far attempts
say they are (`ctx.progress`), as `stage.progress`.

Reads the scheduler's books and decides nothing. Loop thread only.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from stageflow.events import names
from stageflow.pipeline.spec import Role
from stageflow.scheduler.states import ENDED

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.job import Job
    from stageflow.scheduler.books import Run
    from stageflow.scheduler.machine import Machine
    from stageflow.scheduler.streams import Stream

#: seconds between readings, and between looks at the progress of attempts
EVERY: Final = 1.0
PROGRESS_EVERY: Final = 0.25
#: runs of one loop that get a reading of their own, and workers that are looked at
MOST_RUNS: Final = 32
MOST_WORKERS: Final = 64
#: attempts of one loop whose progress is looked at
MOST_ATTEMPTS: Final = 256
#: entries of the queues that are counted by stage; beyond, nobody could read them
_MOST_QUEUED: Final = 5_000
_LIMITS: Final = {
    "concurrency": "its concurrency limit",
    "rate": "its rate limit",
    "memory": "memory",
    "cpu": "free cores",
}
_OUTSIDE: Final = {"approval": "an approval"}
_PAGE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_TICKS: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Sampler:
    """Takes the readings of one driver. `begin` with a run that somebody listens to; ends by itself without one."""

    __slots__ = ("_driver", "_due", "_look", "_since", "_spent", "_timer", "_told")

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._told: dict[int, tuple[float, float]] = {}  # call -> the progress that was told last
        self._due = 0.0
        self._since = 0.0
        self._spent: dict[int, float] = {}  # process -> the CPU seconds it had at the last reading

    def begin(self) -> None:
        """There is a run to be watched."""
        if self._timer is None:
            self._since, self._spent = time.monotonic(), {}
            self._again()
            self._look = self._driver.loop.call_later(PROGRESS_EVERY, self._look_at_progress)

    def end(self) -> None:
        """There is no run any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._told.clear()

    def _again(self) -> None:
        # real time, also under a virtual clock: what is read is the machine's
        self._due = time.monotonic() + EVERY
        self._timer = self._driver.loop.call_later(EVERY, self._tick)

    def _tick(self) -> None:
        self._timer = None
        driver = self._driver
        watched = [job for job in driver.jobs.values() if job.sinks is not None or driver.events.listening]
        if not watched:
            return
        common = self._machine_now()
        for job in watched[:MOST_RUNS]:
            run = driver.machine.runs.get(job.id)
            if run is not None:
                data = {**common, **readings(driver.machine, run, job)}
                driver._event(names.ENGINE_SAMPLE, job, None, None, None, None, data)
        self._again()

    def _look_at_progress(self) -> None:
        """Tell what attempts have published since the last look; nobody sends a message for it."""
        self._look = None
        if self._timer is None:
            return  # nobody listens
        driver, told, now = self._driver, self._told, {}
        for call, running in islice(driver.running.items(), MOST_ATTEMPTS):
            if running.job.sinks is None and not driver.events.listening:
                continue
            said = running.executor.progress_of(call)
            if said is None or said == (0.0, 0.0):
                continue
            now[call] = said
            if told.get(call) != said:
                done, total = said
                driver.event(names.STAGE_PROGRESS, running, {"done": done, "total": total or None, "note": None})
        self._told = now
        self._look = driver.loop.call_later(PROGRESS_EVERY, self._look_at_progress)

    def _machine_now(self) -> dict[str, Any]:
        """What is true of all runs."""
        driver = self._driver
        now = time.monotonic()
        workers: dict[int, int] = {}
        rss, spent = anonymous_bytes("self"), {0: sum(os.times()[:2])}
        supply = getattr(driver.engine, "_supply", None)
        for pid in (supply.idle_pids() if supply is not None else ())[:MOST_WORKERS]:
            workers[pid] = anonymous_bytes(pid)
            spent[pid] = cpu_seconds(pid)
        passed = max(now - self._since, 1e-3)
        # what a worker had spent before it was first seen is nothing of this while
        percent = sum(max(0.0, s - self._spent.get(pid, s)) for pid, s in spent.items()) / passed
        lag = max(0.0, now - self._due)
        self._since, self._spent = now, spent
        return {
            "rss_bytes": rss + sum(workers.values()),
            "live_bytes": driver.machine.live_bytes,
            "memory_limit": driver.memory_limit or None,
            "machine_available": available_bytes(),
            "cpu_percent": round(100.0 * percent, 1),
            "loop_lag_ms": round(lag * 1000.0, 3),
            "workers": workers,
        }


# ---------------------------------------------------------------- the scheduler's books


def readings(machine: Machine, run: Run, job: Job) -> dict[str, Any]:
    """Queue lengths, what runs, what each stage waits for and how much there will be, by stage name."""
    specs = job.graph.specs
    queued: dict[str, int] = {}
    running: dict[str, int] = {}
    waiting: dict[str, str] = {}
    totals: dict[str, int] = {}
    for task in run.tasks.values():
        name = specs[task.stage].name
        running[name] = running.get(name, 0) + max(1, task.items)
    parked = _parked(machine, run)
    for number, stream in run.streams.items():
        name = specs[number].name
        if stream.ended:
            continue
        if stream.ready_count:
            queued[name] = stream.ready_count
        total = stream.in_total if stream.in_total >= 0 else _length(job.pumps.get(number))
        if total is not None and total >= 0 and not stream.is_source:
            totals[name] = total
        why = parked.get(number) or (_why(machine, run, stream, job) if stream.flowing else None)
        if why is not None:
            waiting[name] = why
    if run.queued <= _MOST_QUEUED:
        for lane in machine.lanes.values():
            for entry in lane.entries():
                if entry[4] is run and entry[6] is None:
                    name = specs[entry[5]].name
                    queued[name] = queued.get(name, 0) + 1
                    waiting.setdefault(name, f"a free slot of lane {lane.name}")
    for number, why in parked.items():
        waiting[specs[number].name] = why
    for name, tally in job.stats.tallies.items():
        if tally.held:  # its attempts said so (`ctx.waiting`)
            reason, (_, attempts) = next(iter(tally.held.items()))
            if len(attempts) >= running.get(name, 0):
                waiting[name] = _OUTSIDE.get(reason, reason)
    return {"queued": queued, "running": running, "waiting": waiting, "totals": totals}


def _parked(machine: Machine, run: Run) -> dict[int, str]:
    """Stages that a limit of theirs keeps from starting, and which."""
    found: dict[int, str] = {}
    for limit, entry in islice(machine.admission.waiting(), _MOST_QUEUED):
        if entry[4] is run:
            found[entry[5]] = _LIMITS.get(limit[0]) or f"token {limit[1]}"
    return found


def _why(machine: Machine, run: Run, stream: Stream, job: Job) -> str | None:
    """What a stage that could run more is waiting for; None while it is at work."""
    specs, layout = job.graph.specs, run.layout
    lane = machine.lanes[layout.lanes[stream.stage]]
    if stream.is_source:
        if stream.pull_open or stream.stopped:
            return None  # it is the source's turn to give
        if machine.pressure or (machine.memory and machine.live_bytes >= machine.memory):
            return machine.pressure_reason or "memory"
        return _slow_readers(stream, job) or None
    if stream.blocked:
        if machine.pressure >= 2 or (machine.memory and machine.live_bytes + stream.avg_bytes > machine.memory):
            return machine.pressure_reason or "memory"
        return _slow_readers(stream, job) or "memory"
    if stream.ready_count or stream.jobs:
        return f"a free slot of lane {lane.name}" if lane.used >= lane.slots and not stream.running else None
    if stream.running:
        return None
    if stream.delayed or stream.delayed_folds:
        return "its next attempt"
    if layout.roles[stream.stage] == Role.REDUCE or layout.elements.get(stream.stage):
        slow = [
            specs[producer].name for producer in layout.elements.get(stream.stage, ()) if run.state[producer] < ENDED
        ]
        if slow:
            return f"items of {', '.join(slow[:3])}"
    return "items"


def _slow_readers(stream: Stream, job: Job) -> str:
    full = [reader for reader in stream.readers if reader.ready_count]
    if not full:
        return ""
    slowest = max(full, key=lambda reader: reader.ready_count)
    return f"{job.graph.specs[slowest.stage].name} to catch up"


def _length(pump: Any) -> int | None:
    """Elements of a value that is laid out, where it has a length."""
    values = getattr(pump, "_values", None)
    return len(values) if values is not None and hasattr(values, "__len__") else None


# ---------------------------------------------------------------- the machine


def anonymous_bytes(pid: int | str) -> int:
    """Anonymous memory of a process (resident less shared), 0 where that cannot be told."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm", "rb") as file:
        pieces = file.read(128).split()
        return max(0, int(pieces[1]) - int(pieces[2])) * _PAGE
    return 0


def cpu_seconds(pid: int | str) -> float:
    """CPU time of a process so far, 0 where that cannot be told."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        pieces = file.read(1024).rpartition(b")")[2].split()
        return (int(pieces[11]) + int(pieces[12])) / _TICKS
    return 0.0


def available_bytes() -> int | None:
    """Memory that the machine could still give, None where that cannot be told."""
    with suppress(OSError, ValueError, IndexError), open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
