"""The records the scheduler keeps: a task under way, a run, a lane. Plain state; the rules are in `machine` and its
parts."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

import msgspec

from stageflow.core.output import ErrorInfo
from stageflow.scheduler import signals as sig
from stageflow.scheduler.streams import Segment, Stream

#: lanes whose calls share the loop with everything else
ON_LOOP: Final = ("async", "inline")
#: what waits for a slot: (-priority, -depth, the run's age, its own age, run, stage, stream, since when)
Entry = tuple[int, int, int, int, "Run", int, "Stream | None", float]


class Task(msgspec.Struct, eq=False, gc=False):
    """One attempt under way. `segments` and `job` are set for blocks and folds. A Struct: made in C,
    and not known to the collector, which would walk all that run: it is taken out by hand when the attempt ends."""

    id: int
    run: Run
    stage: int
    lane: str
    attempt: int
    since: float = 0.0
    stream: Stream | None = None
    segments: list[Segment] | None = None
    items: int = 0
    region: tuple[int, ...] | None = None  # the stages its items are taken through
    expected: int = 0  # bytes it is expected to add while it runs
    job: str | None = None
    node: Any = None
    accumulators: tuple[int, ...] = ()
    timer: int = 0
    begun: float = 0.0  # when it was handed to its lane
    deadline: float | None = None  # of the stage in total, all attempts and waits
    limit: float = 0.0  # the time that was used up, in seconds
    total: bool = False  # it was that of the stage in total, not of the attempt
    stopping: str | None = None  # "timeout" or the reason of a cancel
    tokens: dict[str, tuple[int, ...]] | None = None
    reported: list[tuple[int, int]] | None = None  # index ranges whose outcome is booked
    spawning: int = 0  # child runs it waits for
    doomed: dict[int, tuple[int, str]] | None = None  # item -> (stage, reason) of its cancel
    slots: int = 1  # of its lane
    item: int = -1  # of a flat-map: the one whose values go on
    gave: int = 0  # bytes of them since it last asked
    stood: float | None = None  # since when it stands
    paused: float = 0.0  # seconds for which it stood before


class Run:
    """One run's books."""

    __slots__ = (
        "blocked",
        "blocked_by",
        "cancelled_items",
        "clean",
        "culprit",
        "deaths",
        "decisions",
        "ending",
        "error",
        "failed_items",
        "feedback",
        "first_start",
        "grace_timer",
        "guards",
        "held",
        "id",
        "layout",
        "listening",
        "live_bytes",
        "mode",
        "open",
        "parent",
        "plain",
        "previous_delay",
        "pulling",
        "queued",
        "reason",
        "retry_timers",
        "run_id",
        "running",
        "seq",
        "skip_hints",
        "sources",
        "spilling",
        "standing",
        "started_at",
        "state",
        "streams",
        "tasks",
        "timers",
        "tries",
        "waiting",
        "waits",
    )

    def __init__(self, signal: sig.RunSubmitted, seq: int, now: float) -> None:
        layout = signal.layout
        self.id = signal.run
        self.run_id = signal.run_id
        self.layout = layout
        self.mode = signal.mode
        self.listening = signal.listening
        self.seq = seq
        self.parent = signal.parent  # the attempt that waits for it (0 = none)
        self.started_at = now
        self.state = bytearray(layout.size)
        self.waiting = array("i", layout.waits)
        self.open = layout.size
        self.running = 0
        self.standing = 0  # of those, calls of flat-maps that stand still
        self.tasks: dict[int, Task] = {}
        self.streams: dict[int, Stream] = {}
        self.sources: list[Stream] = []
        self.pulling = 0
        self.timers: dict[int, Callable[[sig.TimerDue, float], None]] = {}
        self.retry_timers = 0
        self.tries: dict[int, int] = {}
        self.deaths: dict[Any, int] = {}
        self.previous_delay: dict[Any, float] = {}
        self.first_start: dict[Any, float] = {}
        self.decisions: dict[int, tuple[str, ...]] = {}
        self.skip_hints: dict[int, str] = {}
        self.blocked_by: dict[int, int] = {}  # stage -> the failed stage that blocks it
        self.blocked: list[Stream] = []
        self.failed_items: dict[int, int] = {}
        self.cancelled_items = 0
        self.guards: dict[int, Any] = {}
        self.feedback: dict[int, dict[str, Any]] = {}
        self.held: dict[int, tuple[str, float]] = {}  # plain stage -> the limit at which it waits, since when
        self.waits: dict[int, dict[str, float]] = {}  # plain stage -> what it waited for, where that is not plain
        self.clean = True  # nothing has failed
        self.plain = True  # nothing has failed or been skipped: readiness needs no look at the dependencies
        self.queued = 0  # entries of this run that wait for a slot or at a limit
        self.culprit = -1  # the stage whose lost item ended the run
        self.ending: str | None = None
        self.reason: str | None = None
        self.error: ErrorInfo | None = None
        self.grace_timer = 0
        self.live_bytes = 0
        self.spilling: dict[int, Any] = {}  # handle -> the chunk that is being written to disk


class Lane:
    """Slots of one lane and what waits for them."""

    __slots__ = ("fifo", "heap", "name", "slots", "used")

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = slots
        self.used = 0
        self.heap: list[Entry] = []
        self.fifo: deque[Entry] = deque()  # ascending: what came in order need not be sorted again

    def push(self, entry: Entry) -> None:
        """Queue an entry."""
        fifo = self.fifo
        if not fifo or fifo[-1] < entry:
            fifo.append(entry)
        else:
            heappush(self.heap, entry)

    def first(self) -> Entry:
        """The entry that is next."""
        heap, fifo = self.heap, self.fifo
        if not heap:
            return fifo[0]
        return heap[0] if not fifo or heap[0] < fifo[0] else fifo[0]

    def pop(self) -> Entry:
        """Take out the entry that is next: by priority, then depth, then age."""
        heap, fifo = self.heap, self.fifo
        if not heap:
            return fifo.popleft()
        return heappop(heap) if not fifo or heap[0] < fifo[0] else fifo.popleft()

    def entries(self) -> list[Entry]:
        """Everything that waits, in no order."""
        return [*self.heap, *self.fifo]

    def __bool__(self) -> bool:
        return bool(self.fifo or self.heap)
