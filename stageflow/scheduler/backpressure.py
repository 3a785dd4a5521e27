"""Who may start or pull now, and if not, why not: pure functions of what is live, promised and measured.

Bytes that exist are `live`; bytes that running work is expected to add are `promised`; their sum is held below `limit`.
The deeper a stage, the more of the limit it may use: sources half, the last stage nearly all, so that what was begun
can be finished. Draining is never refused: if nothing of a run is running, its deepest ready task starts whatever is
said here.

May not import: asyncio, threading, time, random, logging, `stageflow.runtime`, any executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

#: of the limit, for what sources have given and nobody has finished; the rest is for outputs of what runs
SOURCE_SHARE: Final = 0.5
#: of the limit, for the last stage: the rest is for what is not counted (rounding, heaps, blocks freed late)
LAST_SHARE: Final = 0.8
#: of the limit, above which kept values go to disk
SPILL_SHARE: Final = 0.5
#: bytes that allocators keep of values which are gone: 25 MiB with eight threads and two workers, whatever the limit
HEAPS: Final = 32 << 20
#: a source whose items were never seen is asked for so many bytes at most (of the limit: one eighth)
FIRST_SHARE: Final = 0.125
#: bytes that one block takes in or gives: more would only keep them live for longer, and be promised all at once
BLOCK_BYTES: Final = 1 << 20


class View(msgspec.Struct, frozen=True):
    """What a policy sees. `what` is "pull" (a source is asked for items) or "start" (a task of a stage)."""

    what: str
    stage: str
    limit: int  #: bytes; 0 = no limit
    live: int  #: bytes of values that exist
    promised: int  #: bytes that running work is expected to add
    need: int  #: bytes this would add
    waiting: int  #: items that wait at the stage (or at the readers of the source)
    running: int  #: tasks of the run that are running
    level: int  #: of the ladder of memory pressure, 0 to 4
    depth: float  #: of the stage in the graph, 0 (source) to 1 (last)


#: a policy of the user's own: None to admit, or why to wait
Policy = Callable[[View], str | None]


def share(depth: float) -> float:
    """Of the limit, for a stage at this depth (0 to 1)."""
    return SOURCE_SHARE + (LAST_SHARE - SOURCE_SHARE) * min(1.0, 0.5 + 0.5 * depth)


def admit(view: View) -> str | None:
    """Whether a task may start: None, or "memory" (of the machine) or "bytes" (of the run's budget)."""
    if view.level >= 2 and view.need > 0:
        return "memory"
    if view.limit and view.live + view.promised + view.need > view.limit * share(view.depth):
        return "bytes"
    return None


def countable(limit: int) -> int:
    """Of a memory limit, the bytes that values may take: less what heaps keep, at most a quarter of it."""
    return limit - min(limit >> 2, HEAPS)


def pull_bytes(limit: int, live: int, promised: int) -> int:
    """Bytes that sources may add now; meaningless without a limit."""
    return int(limit * SOURCE_SHARE) - live - promised


def pull_count(wanted: int, each: float, room: int, limit: int) -> tuple[int, int]:
    """(items, bytes) to ask a source for: as many as are wanted and fit; (0, 0) to wait."""
    if not limit:
        return wanted, 0
    if room <= 0:
        return 0, 0
    if each <= 0:
        return wanted, min(room, max(1, int(limit * FIRST_SHARE)))
    fitting = min(wanted, int(room / each))
    return fitting, room if fitting else 0


def unseen_bytes(limit: int) -> int:
    """What one result of a stage is taken for until the first has been seen: of a thousand that may start at once, a
    small budget lets a few go ahead; a large one is not worth the wait."""
    return min(limit >> 5, 1 << 20)


def strictest(policies: Iterable[Policy], view: View) -> str | None:
    """The first policy that says wait; the built-in one is asked first."""
    said = admit(view)
    if said is not None:
        return said
    for policy in policies:
        said = policy(view)
        if said is not None:
            return said
    return None


# ---------------------------------------------------------------- the ladder


class Ladder(msgspec.Struct, frozen=True, kw_only=True):
    """When memory of the machine or container calls for what. Fractions of what may be used; each step is left at
    `slack` below where it is entered. `deadline` seconds after it was entered a step is left whatever is measured,
    for at least `rest` seconds: nothing stays paused for ever because of somebody else's memory."""

    pull: float = 0.80  #: 1: pull no sources
    grow: float = 0.86  #: 2: start nothing that adds bytes
    recycle: float = 0.90  #: 3: replace the fattest idle worker
    kill: float = 0.95  #: 4: end the youngest task of the stage most over its estimate
    slack: float = 0.05
    stalled: float = 0.30  #: share of time that all processes waited for memory (PSI full, 10 s) that counts as step 2
    deadline: float = 30.0
    rest: float = 5.0


class Reading(msgspec.Struct, frozen=True):
    """One look at the machine."""

    at: float  #: monotonic second
    used: int  #: bytes in use of `total`: of the container if it is limited, else of the machine
    total: int
    stalled: float = 0.0  #: PSI: share of the last 10 s in which all processes waited for memory
    workers: int = 0  #: anonymous bytes of all workers
    fattest: int = 0  #: of one of them
    loop_lag: float = 0.0  #: seconds by which the loop was late
    descriptors: float = 0.0  #: share of the allowed descriptors that are open
    throttled: float = 0.0  #: seconds so far in which the CPU quota held the container

    @property
    def fraction(self) -> float:
        """Used of total."""
        return self.used / self.total if self.total > 0 else 0.0


class LadderState(msgspec.Struct, frozen=True):
    """Where on the ladder we are: level, since when, and until when it must not be entered again."""

    level: int = 0
    since: float = 0.0
    resting: float = 0.0
    reason: str = ""


def climb(state: LadderState, reading: Reading, ladder: Ladder) -> LadderState:
    """The next state. Up at once, down only below the step minus slack, and off the ladder at the deadline."""
    steps = (ladder.pull, ladder.grow, ladder.recycle, ladder.kill)
    fraction = reading.fraction
    up = sum(1 for step in steps if fraction >= step)
    if reading.stalled >= ladder.stalled:
        up = max(up, 2)
    if up == 4:  # the machine is about to fail: neither rest nor deadline count
        return _at(state, 4, reading, _why(reading))
    if reading.at < state.resting:
        return state if state.level == 0 else LadderState(0, reading.at, state.resting, "")
    if up > state.level:
        return _at(state, up, reading, _why(reading))
    if state.level and reading.at - state.since > ladder.deadline:
        return LadderState(0, reading.at, reading.at + ladder.rest, "")
    stay = sum(1 for step in steps if fraction >= step - ladder.slack)
    if reading.stalled >= ladder.stalled / 2:
        stay = max(stay, min(2, state.level))
    if stay < state.level:
        return LadderState(stay, reading.at if stay == 0 else state.since, state.resting, _why(reading) if stay else "")
    return state


def _at(state: LadderState, level: int, reading: Reading, reason: str) -> LadderState:
    since = state.since if state.level else reading.at
    return state if state.level == level else LadderState(level, since, state.resting, reason)


def _why(reading: Reading) -> str:
    if reading.stalled > 0.3 and reading.fraction < 0.8:
        return f"processes waited for memory {reading.stalled:.0%} of the last 10 s"
    return f"{reading.fraction:.0%} of {reading.total / 2**20:.0f} MiB of memory are in use"
