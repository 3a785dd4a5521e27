"""What limited a run, in one sentence, and what to do about it.

Reads numbers; every claim names the number it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from stageflow.observability.stats import RunStats, StageStats
from stageflow.report.text import duration, percent, plural

#: Below this a process attempt costs about as much as handing it over (measured: 50-100 us under load).
HAND_OFF: Final = 0.0002
#: A run shorter than this says nothing about bottlenecks.
SHORT: Final = 0.05
#: The loop is blocked when a stage holds it this long without waiting.
BLOCKING: Final = 0.1

_FOR: Final = {
    "slot": "a free slot of its lane",
    "token": "a resource token",
    "cpu": "free cores",
    "concurrency": "its concurrency limit",
    "rate": "its rate limit",
    "bytes": "room in the byte budget",
    "memory": "memory of the machine",
    "upstream": "items from upstream",
    "downstream": "the stages after it",
    "approval": "an approval",
    "retry": "the delay before a retry",
}

#: what there could be more of, where a stage waits for it
_MORE: Final = {
    "token": "more of that token",
    "cpu": "more cores",
    "concurrency": "a higher concurrency=",
    "rate": "a higher rate=",
    "bytes": "a larger memory_limit or smaller items",
    "memory": "more memory or smaller items",
}
#: of the time of a stage that is CPU time: above, it computes; below, it waits for something else
COMPUTES: Final = 0.8
WAITS: Final = 0.1

_NOTHING: Final[Mapping[str, str]] = {}


class Advice(msgspec.Struct, frozen=True):
    """One thing to do. `weight` orders it: about the share of the run it concerns."""

    stage: str
    text: str
    weight: float


def verdict(
    stats: Mapping[str, StageStats], totals: RunStats, workers: int = 0, waiting: Mapping[str, str] = _NOTHING
) -> str:
    """One sentence on what the run spent its time on. `waiting` is what each stage of a run that goes on waits for."""
    wall = totals.wall_seconds
    ran = [s for s in stats.values() if s.attempts]
    if not ran:
        return "Nothing ran."
    if wall < SHORT:
        return f"The run took {duration(wall)}: too short to name a bottleneck."
    # What waits for the stages after it holds up nobody, however much it could do at once.
    leading = [
        s for s in ran if s.wait.get("downstream", 0.0) <= 0.5 * wall and "catch up" not in waiting.get(s.stage, "")
    ]
    busiest = max(leading, key=lambda s: s.busy_seconds, default=ran[0])
    if busiest.busy_seconds <= 0:
        busiest = max(ran, key=lambda s: s.busy_seconds)
    if busiest.busy_seconds <= 0:
        return (
            f"The run took {duration(wall)} and its stages next to nothing: the time went into waiting and scheduling."
        )
    workers = workers or totals.workers_started
    process_busy = sum(s.busy_seconds for s in ran if s.lane == "process")
    held = [s for s in ran if s is not busiest and s.wait.get("downstream", 0.0) > 0.2 * wall]
    if workers and process_busy >= 0.75 * workers * wall:
        top = max((s for s in ran if s.lane == "process"), key=lambda s: s.busy_seconds)
        who = f"{plural(workers, 'worker')} {'was' if workers == 1 else 'were'}"
        used = min(1.0, process_busy / (workers * wall))
        computing = sum(s.cpu_seconds for s in ran if s.lane == "process") / process_busy
        text = (
            f"The {'cores' if computing > WAITS else 'workers'} are the limit: {who} busy {percent(used)} of"
            f" the time, {percent(top.busy_seconds / process_busy)} of it with {top.stage}"
        )
        text += f", and {held[0].stage} waited {_share(held[0], 'downstream', wall)} for it." if held else "."
        return text + _of_cores(computing)
    reason, waited = _longest_wait(busiest)
    if waited > 0.3 * wall and (reason == "approval" or reason not in _FOR):  # it said so itself: that was no work
        why = _FOR.get(reason, reason)
        return f"{busiest.stage} is the bottleneck: it waited {percent(min(1.0, waited / wall))} of the run for {why}."
    if waited > 0.3 * wall and reason not in ("upstream", "downstream"):
        return (
            f"{busiest.stage} is the bottleneck: it was busy for {duration(busiest.busy_seconds)} and waited"
            f" {percent(min(1.0, waited / wall))} of the run for {_FOR.get(reason, reason)}"
            + (f"; {more} would help." if (more := _more(reason, busiest.lane)) else ".")
        )
    share = busiest.busy_seconds / wall
    if _share_one_interpreter(busiest, wall):
        return (
            f"{busiest.stage} is the bottleneck: it computed for {duration(busiest.cpu_seconds)} of {duration(wall)} in"
            " threads that share one interpreter; executor='process' would use the other cores."
        )
    if share >= 0.6:
        text = f"{busiest.stage} is the bottleneck: {duration(busiest.busy_seconds)} of work"
        text += f" in {duration(wall)}" if share <= 1.05 else f", {share:.1f} at a time on average, in {duration(wall)}"
        text += f", and {held[0].stage} waited {_share(held[0], 'downstream', wall)} for it." if held else "."
        behind = bool(held) or busiest.queued_seconds > busiest.busy_seconds
        return text + (_of_work(busiest, share) if behind else "")
    pressure = max(totals.backpressure_seconds.items(), key=lambda kv: kv[1], default=None)
    if pressure is not None and pressure[1] > 0.3 * wall:
        return f"The run was held back {percent(pressure[1] / wall)} of the time by {pressure[0]}."
    busy = totals.busy_seconds / wall
    return (
        f"No stage was busy all the time: on average {busy:.2g} attempts ran at once, most of it {busiest.stage}"
        f" ({percent(share)} of the run)."
    )


def _more(reason: str, lane: str) -> str:
    """What to have more of; "" where that is not known."""
    if reason == "slot":
        return {"process": "more workers (processes=)", "thread": "more threads (threads=)"}.get(lane, "")
    return _MORE.get(reason, "")


def _of_cores(computing: float) -> str:
    """What would help where the workers are always busy, by the share of CPU time in it."""
    if computing >= COMPUTES:
        return f" {percent(computing)} of that was computing: more cores would help."
    if computing <= WAITS:
        return (
            f" Only {percent(computing)} of that was computing, the rest waiting: for cores that other programs had, or"
            " for something outside, and then more workers (processes=) or executor='thread' would help."
        )
    return ""


def _of_work(s: StageStats, share: float) -> str:
    """What would help where others wait for a stage, by how much of it ran at once and how much was computing. On the
    loop CPU time is not counted by stage."""
    computing = s.cpu_seconds / s.busy_seconds if s.busy_seconds > 0 else 0.0
    alone = share <= 1.05
    at_once = "one at a time" if alone else f"{share:.1f} at a time"
    if s.lane == "process" and computing >= COMPUTES:
        return f" {percent(computing)} of it was computing: more {'of it at once' if alone else 'cores'} would help."
    if s.lane == "async":
        return f" It ran {at_once}: more at once, larger batches (batch=) or a faster far end would help."
    if s.lane in ("thread", "process") and computing <= WAITS:
        return (
            f" Only {percent(computing)} of it was computing, the rest waiting, {at_once}: more at once, larger batches"
            " (batch=) or a faster far end would help."
        )
    return ""


def _share(stats: StageStats, reason: str, wall: float) -> str:
    return f"{percent(min(1.0, stats.wait[reason] / wall))} of the run"


def _share_one_interpreter(s: StageStats, wall: float) -> bool:
    """Whether threads that compute in Python hold each other up: one core is busy, however many of them run."""
    return s.lane == "thread" and 0.5 * wall < s.cpu_seconds < 1.3 * wall and s.busy_seconds > 2 * s.cpu_seconds


def _longest_wait(stats: StageStats) -> tuple[str, float]:
    return max(stats.wait.items(), key=lambda kv: kv[1], default=("", 0.0))


def advice(stats: Mapping[str, StageStats], totals: RunStats, workers: int = 0) -> list[Advice]:
    """What to change, most worthwhile first; at most ten lines."""
    wall = totals.wall_seconds or sum(s.wall_seconds for s in stats.values())
    found: list[Advice] = []
    if wall <= 0:
        return found
    for s in stats.values():
        if not s.attempts:
            continue
        found.extend(_of_stage(s, wall))
    started = workers or totals.workers_started
    process = [s for s in stats.values() if s.lane == "process" and s.attempts]
    busy = sum(s.busy_seconds for s in process)
    if started > 1 and process and wall > 1.0 and busy < 0.3 * started * wall:
        found.append(
            Advice(
                "",
                f"{plural(started, 'worker')} were busy {percent(busy / (started * wall))} of the time: fewer processes"
                " would do, or the stages before them are too slow to feed them.",
                0.2,
            )
        )
    if totals.workers_lost:
        found.append(
            Advice(
                "", f"{plural(totals.workers_lost, 'worker')} died: see the notes for the signal and the stage.", 0.5
            )
        )
    return sorted(found, key=lambda a: -a.weight)[:10]


def _of_stage(s: StageStats, wall: float) -> list[Advice]:
    found: list[Advice] = []

    def say(text: str, weight: float) -> None:
        found.append(Advice(s.stage, text, weight))

    share = min(1.0, s.busy_seconds / wall)
    mean = s.busy_seconds / s.attempts
    cpu_bound = s.cpu_seconds > 0.8 * s.busy_seconds and s.busy_seconds > 0.05 * wall
    if s.lane == "process" and s.attempts >= 50 and mean < HAND_OFF:
        say(
            f"an item takes {duration(mean)}, less than handing it to a worker: give it batch= or executor='thread'.",
            0.3 + share,
        )
    if s.lane == "thread" and not cpu_bound and _share_one_interpreter(s, wall):
        say(
            f"it computed for {duration(s.cpu_seconds)} of {duration(wall)} and its threads waited for each other the"
            " rest of their time: give it executor='process'.",
            0.4 + share,
        )
    if s.lane == "thread" and cpu_bound and s.attempts > 1:
        say(
            f"{percent(s.cpu_seconds / s.busy_seconds)} of its time is computing, which threads cannot do side by side:"
            " give it executor='process'.",
            0.4 + share,
        )
    if s.lane == "async" and s.max_seconds > BLOCKING and cpu_bound:
        say(
            f"it computes for up to {duration(s.max_seconds)} on the event loop while everything else waits:"
            " make it a plain function or give it executor='thread'.",
            0.6 + share,
        )
    if s.retried >= 3 and s.retried > 0.1 * s.attempts:
        say(f"{plural(s.retried, 'attempt')} of {s.attempts:,} had to be repeated.", 0.2 + s.retried / s.attempts)
    reason, waited = _longest_wait(s)
    if reason in ("token", "rate", "approval") and waited > 0.3 * wall:
        say(f"it waited {percent(min(1.0, waited / wall))} of the run for {_FOR[reason]}.", 0.3 + waited / wall)
    if reason in ("bytes", "memory") and waited > 0.3 * wall:
        say(
            f"it waited {percent(min(1.0, waited / wall))} of the run for {_FOR[reason]}:"
            " raise memory_limit or make its items smaller.",
            0.3 + waited / wall,
        )
    if s.items_in >= 20 and s.max_seconds > 20 * s.p50_seconds and s.max_seconds > 0.25 * wall:
        say(
            f"its slowest item took {duration(s.max_seconds)}, the middle one {duration(s.p50_seconds)}: split the"
            " large ones, or start them first.",
            s.max_seconds / wall,
        )
    if s.failed and s.items_in and s.failed > 0.05 * s.items_in:
        say(f"{plural(s.failed, 'item')} of {s.items_in:,} failed.", 0.5)
    return found
