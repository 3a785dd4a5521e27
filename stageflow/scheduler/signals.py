"""What the scheduler is told. Every measured number and every roll of the dice is in the signal, so a log of them
replays exactly."""

from __future__ import annotations

import msgspec

from stageflow.context.pieces import Done
from stageflow.core.output import ErrorInfo
from stageflow.scheduler.layout import Layout


class Signal(msgspec.Struct, gc=False):
    """Base of all signals."""


class RunSubmitted(Signal):
    """A run begins. `deadline` is seconds from now; `parent` is the attempt of this machine that waits for it."""

    run: int
    run_id: str
    layout: Layout
    mode: str = "fail_fast"
    deadline: float | None = None
    listening: bool = False
    parent: int = 0


class AttemptEnded(Signal):
    """An attempt of a plain stage, a fold or a merge ended. `status` is a StageStatus value, "lost" or "refused".

    `handle` names the value (0 = none). `retry` is the driver's verdict where the policy has strategies of its own
    (None = the
    scheduler decides), `wait` their delay; `roll` is the jitter in [0, 1). `skip_hint` is the `skip_reason` found in
    mapping data.
    """

    task: int
    status: str = "ok"
    handle: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_in: int = 0
    worker_pid: int = 0
    started: float = 0.0
    route: tuple[str, ...] | None = None
    error: ErrorInfo | None = None
    reason: str | None = None
    retryable: bool = False
    retry: bool | None = None
    wait: float | None = None
    retry_after: float | None = None
    roll: float = 1.0
    suspect: bool = False
    skip_hint: str | None = None
    digest: str | None = None  #: of the failing output, for guards
    abandoned: bool = False
    broken: ErrorInfo | None = None  #: what a strategy of the policy raised while it judged


class BlockPart(Signal):
    """Part of a block of items. `final` says the task is over; what it had not finished goes back to its queue."""

    task: int
    done: Done
    handle: int = 0
    nbytes: int = 0
    final: bool = False
    status: str = "ok"  #: of the final part: ok | error | lost | cancelled | refused
    error: ErrorInfo | None = None
    retries: tuple[tuple[bool | None, float | None, float], ...] = ()  #: (retry, wait, roll) of each failure in `done`
    suspect: bool = False
    abandoned: bool = False
    position: int = -1  #: of a lost block: how many of its items were surely finished
    paths: dict[int, tuple[int, ...]] | None = None  #: of its items, where the index does not say it, if it went wrong
    bytes_in: int = 0
    worker_pid: int = 0
    started: float = 0.0
    broken: ErrorInfo | None = None  #: what a strategy of the policy raised while it judged


class ItemsArrived(Signal):
    """A source gave `count` more items (or the elements of a value were laid out for a map over it). `enough`: the pull
    is over, its bytes are spent."""

    run: int
    stage: int
    count: int
    handle: int
    nbytes: int = 0
    seconds: float = 0.0
    enough: bool = False


class SourceEnded(Signal):
    """A source is exhausted, failed, or was stopped."""

    run: int
    stage: int
    status: str = "ok"  #: ok | error | cancelled
    error: ErrorInfo | None = None
    reason: str | None = None
    retry: bool | None = None
    wait: float | None = None
    roll: float = 1.0
    seconds: float = 0.0


class Spilled(Signal):
    """A kept list of values lies on disk (or could not be written: then it stays in memory)."""

    run: int
    stage: int
    handle: int
    ok: bool = True


class Decided(Signal):
    """A `when` predicate was evaluated."""

    run: int
    stage: int
    go: bool = True
    error: ErrorInfo | None = None


class TimerDue(Signal):
    """A timer fired. `elapsed` is the time inside the function for an attempt's timer (None: it has not begun)."""

    timer: int
    elapsed: float | None = None


class CapacityChanged(Signal):
    """A lane has another number of slots."""

    lane: str
    slots: int


class PressureChanged(Signal):
    """The monitor's verdict: 0 none, 1 pull no sources, 2 start nothing that grows, 3 shed."""

    level: int
    reason: str = ""


class CancelRequested(Signal):
    """Stop a run. `force` skips the grace; `status` is what the run ends as."""

    run: int
    reason: str = "cancelled"
    force: bool = False


class StopStage(Signal):
    """Stop one stage of a run, whether it waits or runs."""

    run: int
    stage: int
    reason: str = "cancelled"


class StopItem(Signal):
    """Stop one item of a map or sink, by its index there, whether it has come in yet, waits or runs."""

    run: int
    stage: int
    index: int
    reason: str = "cancelled"


class ChildrenWait(Signal):
    """A running attempt waits for one more child run (its slot is free meanwhile), or for one less."""

    task: int
    waiting: bool
