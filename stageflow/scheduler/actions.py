"""What the scheduler wants done. The driver performs actions in the order they come and decides nothing."""

from __future__ import annotations

from typing import Any, Final

import msgspec


class Action(msgspec.Struct, gc=False):
    """Base of all actions."""


class StartAttempt(Action):
    """Run one attempt of a plain stage; tell the sinks that it started."""

    task: int
    run: int
    stage: int
    lane: str
    attempt: int = 1
    alone: bool = False
    short: bool = False
    tokens: dict[str, tuple[int, ...]] | None = None
    feedback: dict[str, Any] | None = None


class StartBlock(Action):
    """Run a block of items of a map or sink. `segments` are (lo, hi, mask, ((handle, position or positions), ...)).
    `region`: take them through these stages, of which `stage` is the first. `skip`: pass over so many values of the one
    item, which readers have already."""

    task: int
    run: int
    stage: int
    lane: str
    segments: tuple[tuple[int, int, int, tuple[tuple[int, int | tuple[int, ...]], ...]], ...]
    attempt: int = 1
    alone: bool = False
    short: bool = False
    tokens: dict[str, tuple[int, ...]] | None = None
    region: tuple[int, ...] | None = None
    skip: int = 0


class StartFold(Action):
    """Run one step of a reduce: "fold" (a block), "continue" (a block onto an accumulator) or "merge"
    (accumulators)."""

    task: int
    run: int
    stage: int
    lane: str
    job: str
    segments: tuple[tuple[int, int, int, tuple[tuple[int, int | tuple[int, ...]], ...]], ...] = ()
    accumulators: tuple[int, ...] = ()
    attempt: int = 1
    alone: bool = False
    tokens: dict[str, tuple[int, ...]] | None = None


class StopAttempt(Action):
    """Ask an attempt to stop; with `force`, by the strongest means its lane has."""

    task: int
    reason: str
    force: bool = False
    timeout: float | None = None  #: the limit in seconds that was used up, where that is why
    item: int = -1  #: only this item of its block is meant; the block ends behind the item it is at


class Stand(Action):
    """The call of a flat-map's item stands still behind the part it has given: its place may be another's meanwhile."""

    task: int


class GoOn(Action):
    """Let a call that stands, or is about to, go on."""

    task: int


class SetTimer(Action):
    """Send TimerDue(timer) at monotonic second `at`. `task` is set for an attempt's own timeout."""

    timer: int
    at: float
    task: int = 0


class CancelTimer(Action):
    """The timer is not wanted any more."""

    timer: int


class PullSource(Action):
    """Let a source give up to `count` more items, and no more once they weigh `nbytes` (0 = whatever they weigh). The
    first pull starts it, past the `skip` items that an earlier `attempt` has given."""

    run: int
    stage: int
    count: int
    nbytes: int = 0
    attempt: int = 1
    skip: int = 0


class StopSource(Action):
    """Close a source; SourceEnded follows."""

    run: int
    stage: int
    reason: str


class Decide(Action):
    """Evaluate the `when` predicate of a stage."""

    run: int
    stage: int


class Release(Action):
    """Nobody needs these values of a run any more."""

    run: int
    handles: tuple[int, ...]


class Emit(Action):
    """Tell the sinks."""

    type: str
    run: int
    stage: int = -1
    item: tuple[int, ...] | None = None
    attempt: int | None = None
    data: dict[str, Any] = {}


class Completed(Action):
    """Attempts of plain stages have succeeded, and their stages with them: book them, tell the sinks. `rows` has
    the fields of `ROW` of each, one row after the other (a container less per stage is one less for the collector to
    walk); times are monotonic seconds, `now` and `duration` as the scheduler saw them."""

    run: int
    rows: list[Any]


#: the fields of a row of `Completed`
ROW: Final = ("stage", "attempt", "now", "duration", "seconds", "cpu_seconds", "bytes_in", "bytes_out", "worker_pid",
              "started")  # fmt: skip


class KeepItems(Action):
    """The survivors of [lo, hi) of a stream lie in `handle` from place `at` on, and stay until it is released."""

    run: int
    stage: int
    lo: int
    hi: int
    mask: int
    handle: int
    at: int


class Spill(Action):
    """Move a kept list of values to disk; Spilled follows."""

    run: int
    stage: int
    handle: int


class KeepAccumulator(Action):
    """The value of a reduce is the accumulator `handle` (0: there was no element, the value is `initial`)."""

    run: int
    stage: int
    handle: int


class FinishRun(Action):
    """The run is over; nothing of it is running. `status` is completed, failed or cancelled."""

    run: int
    status: str
    reason: str | None = None
    error: Any = None
