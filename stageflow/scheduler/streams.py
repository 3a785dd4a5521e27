"""The rows of a stream: which items of a map, sink or reduce wait, run, are done. No item has an object of its own
unless it failed.

Items are known by index in their index space; they move in segments (index ranges with a mask of who is there), so
the cost of a
finished block does not depend on the length of the stream, and the state is O(stages + segments in flight).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import Any, Final

from stageflow.core.errors import InvariantError
from stageflow.core.output import ErrorInfo

#: seconds of work a block aims at; 0.25 to 4 ms cannot be told apart for no-ops, longer ones cost the tail
BLOCK_SECONDS: Final = 0.002
#: as much where more is waiting than every slot needs: a hand-over costs the one parent 0.3 ms, whoever does the work
AMPLE_SECONDS: Final = 0.04
#: the same in the lanes of the parent itself, where a block keeps others from the loop or the interpreter
NEAR_SECONDS: Final = 0.02
#: as much of what blocks on something outside: a thread for each item gains nothing where starting it takes as long
BRIEF_SECONDS: Final = 0.001
SMOOTHING: Final = 0.3
#: one late answer says little of what blocks outside, several in a row say that it is slow: most that one may add
DOUBT: Final = 0.5


class Chunk:
    """One encoded list of values. `left` counts reads still to come: items x readers (+1 while it is kept)."""

    __slots__ = ("each", "handle", "left", "nbytes")

    def __init__(self, handle: int, left: int, nbytes: int, items: int = 1) -> None:
        self.handle = handle
        self.left = left
        self.nbytes = nbytes
        self.each = nbytes / items if items > 0 else 0.0  # bytes of one item


Column = tuple[Chunk, "int | tuple[int, ...]"]


class Segment:
    """Indices [lo, hi) of which `mask` are there (-1: all), and where their values lie: one column per element-wise
    parameter.

    A column's position is the place of the segment's first item in the chunk's list, or the places of all of them.
    `deaths` counts workers lost while they ran it; `attempt` is the number of the attempt to come; `apart` keeps it
    from sharing a block with others.
    """

    __slots__ = ("apart", "attempt", "columns", "deaths", "hi", "lo", "mask", "since")

    def __init__(
        self,
        lo: int,
        hi: int,
        mask: int,
        columns: tuple[Column, ...],
        since: float,
        deaths: int = 0,
        attempt: int = 1,
        apart: bool = False,
    ) -> None:
        self.lo = lo
        self.hi = hi
        self.mask = mask
        self.columns = columns
        self.since = since
        self.deaths = deaths
        self.attempt = attempt
        self.apart = apart

    def count(self) -> int:
        """How many items are there."""
        return self.hi - self.lo if self.mask < 0 else self.mask.bit_count()

    def cut(self, lo: int, hi: int) -> Segment:
        """The part with indices [lo, hi), which must lie inside."""
        if lo == self.lo and hi == self.hi:
            return self
        mask = self.mask
        if mask < 0:
            before, kept = lo - self.lo, -1
            there = hi - lo
        else:
            below = mask & ((1 << (lo - self.lo)) - 1)
            before = below.bit_count()
            kept = (mask >> (lo - self.lo)) & ((1 << (hi - lo)) - 1)
            there = kept.bit_count()
            if kept == (1 << (hi - lo)) - 1:
                kept = -1
        columns = tuple(
            (chunk, at + before if isinstance(at, int) else at[before : before + there]) for chunk, at in self.columns
        )
        return Segment(lo, hi, kept, columns, self.since, self.deaths, self.attempt, self.apart)

    def split_at(self, count: int) -> tuple[Segment, Segment | None]:
        """The first `count` items (with the gaps between and after them up to the next item), and the rest."""
        if count >= self.count():
            return self, None
        if self.mask < 0:
            middle = self.lo + count
        else:
            mask = self.mask
            for _ in range(count):
                mask &= mask - 1
            middle = self.lo + (mask & -mask).bit_length() - 1
        return self.cut(self.lo, middle), self.cut(middle, self.hi)

    def has(self, index: int) -> bool:
        """Whether this item is there."""
        return self.lo <= index < self.hi and (self.mask < 0 or bool(self.mask >> (index - self.lo) & 1))

    def take_out(self, index: int) -> tuple[Column, ...]:
        """Leave a gap where the item `index` is, which must be there; the columns that were its own."""
        own = self.cut(index, index + 1).columns
        count, offset = self.count(), index - self.lo
        mask = self.mask if self.mask >= 0 else (1 << (self.hi - self.lo)) - 1
        place = (mask & ((1 << offset) - 1)).bit_count()
        self.mask = mask & ~(1 << offset)
        columns: list[Column] = []
        for chunk, at in self.columns:
            places = range(at, at + count) if isinstance(at, int) else at
            columns.append((chunk, (*places[:place], *places[place + 1 :])))
        self.columns = tuple(columns) if self.mask else ()
        return own

    def nbytes(self) -> float:
        """Bytes of its items, over all columns."""
        count = self.count()
        return sum(chunk.each for chunk, _ in self.columns) * count

    def wire(self) -> tuple[int, int, int, tuple[tuple[int, int | tuple[int, ...]], ...]]:
        """The segment as an action carries it."""
        return self.lo, self.hi, self.mask, tuple((chunk.handle, at) for chunk, at in self.columns)


def mask_and(lo: int, hi: int, a: int, b: int) -> int:
    """Intersection of two masks of the same range."""
    if a < 0:
        return b
    if b < 0:
        return a
    both = a & b
    return -1 if both == (1 << (hi - lo)) - 1 else both


class Frontier:
    """Puts ranges that finish in any order back into order: `add` them, `take` what has become the next."""

    __slots__ = ("_early", "next")

    def __init__(self) -> None:
        self.next = 0
        self._early: dict[int, object] = {}

    def add(self, lo: int, what: object) -> None:
        """A range that begins at `lo`; `what` knows its end."""
        if lo in self._early or lo < self.next:
            raise InvariantError(f"index {lo} was finished twice")
        self._early[lo] = what

    def take(self, end_of: Callable[[object], int]) -> Iterator[object]:
        """Everything that now lies without a gap after what was taken before."""
        while (found := self._early.pop(self.next, None)) is not None:
            self.next = end_of(found)
            yield found

    def drain(self) -> list[object]:
        """Give up on the order: everything that still waits."""
        early, self._early = self._early, {}
        return [early[lo] for lo in sorted(early)]

    def waiting(self) -> list[object]:
        """What has come too early."""
        return list(self._early.values())

    def __len__(self) -> int:
        return len(self._early)


class Join:
    """Brings the columns of an element-wise join together: inner join by index."""

    __slots__ = ("dropped", "pending", "spent", "width")

    def __init__(self, width: int) -> None:
        self.width = width
        self.pending: list[list[Segment]] = [[] for _ in range(width)]
        self.dropped = 0  #: items that one side had and another lacked
        self.spent: list[Chunk] = []  #: chunks of which nobody needs anything any more, to be freed by the caller

    def add(self, column: int, segment: Segment) -> list[Segment]:
        """One side has these indices; the segments that are now complete."""
        self.pending[column].append(segment)
        ready: list[Segment] = []
        progress = True
        while progress:
            progress = False
            common = self._overlap()
            if common is not None:
                ready.append(self._merge(*common))
                progress = True
        return ready

    def _overlap(self) -> tuple[int, int] | None:
        """A range that every side has."""
        for first in self.pending[0]:
            lo, hi = first.lo, first.hi
            for side in self.pending[1:]:
                best: tuple[int, int] | None = None
                for other in side:
                    start, stop = max(lo, other.lo), min(hi, other.hi)
                    if start < stop:
                        best = (start, stop)
                        break
                if best is None:
                    break
                lo, hi = best
            else:
                return lo, hi
        return None

    def _merge(self, lo: int, hi: int) -> Segment:
        parts: list[Segment] = []
        for side in self.pending:
            for place, segment in enumerate(side):
                if segment.lo <= lo and hi <= segment.hi:
                    side.pop(place)
                    if segment.lo < lo:
                        side.append(segment.cut(segment.lo, lo))
                    if hi < segment.hi:
                        side.append(segment.cut(hi, segment.hi))
                    parts.append(segment.cut(lo, hi))
                    break
        mask = -1
        for part in parts:
            mask = mask_and(lo, hi, mask, part.mask)
        there = hi - lo if mask < 0 else mask.bit_count()
        columns: list[Column] = []
        for part in parts:
            chunk, at = part.columns[0]
            lost = part.count() - there
            if lost == 0:
                columns.append((chunk, at))
                continue
            self.dropped += lost
            chunk.left -= lost
            if chunk.left <= 0:
                self.spent.append(chunk)
            positions = []
            seen = 0
            for offset in range(hi - lo):
                if part.mask < 0 or part.mask >> offset & 1:
                    if mask < 0 or mask >> offset & 1:
                        positions.append(at + seen if isinstance(at, int) else at[seen])
                    seen += 1
            columns.append((chunk, tuple(positions)))
        return Segment(lo, hi, mask, tuple(columns), parts[0].since)


class Fold:
    """The books of a reduce: items by fixed blocks of their index, accumulators by a fixed tree over block numbers.

    A node (level, i) covers blocks [i * FAN ** level, ...); FAN binary levels are merged inside one task, in the
    binary order.
    """

    __slots__ = ("block", "blocks", "jobs", "nodes", "sizes", "total_blocks")
    FAN: Final = 8

    def __init__(self, block: int) -> None:
        self.block = block
        self.blocks: dict[int, tuple[int, list[Segment]]] = {}  # number -> indices finished, segments
        self.nodes: dict[tuple[int, int], int] = {}  # (level, i) -> handle of its accumulator; 0 = empty
        self.jobs: deque[tuple[str, object]] = deque()
        self.sizes: dict[int, int] = {}  # bytes of the accumulators that are held
        self.total_blocks = -1

    def add(self, segment: Segment) -> None:
        """Indices of the reduced stream are final; a block that is whole becomes a job."""
        lo = segment.lo
        while lo < segment.hi:
            number = lo // self.block
            hi = min(segment.hi, (number + 1) * self.block)
            seen, parts = self.blocks.get(number, (0, []))
            part = segment.cut(lo, hi)
            if part.count():
                parts.append(part)
            seen += hi - lo
            if seen == self.block:
                self.blocks.pop(number, None)
                self.ready(number, parts)
            else:
                self.blocks[number] = (seen, parts)
            lo = hi

    def ready(self, number: int, parts: list[Segment]) -> None:
        """Block `number` is complete: fold it, or note it as empty."""
        if parts:
            parts.sort(key=lambda part: part.lo)
            self.jobs.append(("fold", (number, parts)))
        else:
            self.settle(0, number, 0)

    def close(self, total: int) -> None:
        """The stream has `total` indices: the last block may be short."""
        self.total_blocks = -(-total // self.block)
        for number in sorted(self.blocks):
            _, parts = self.blocks.pop(number)
            self.ready(number, parts)
        self.merge_all()

    def settle(self, level: int, i: int, handle: int) -> None:
        """The accumulator of a node is known; merge its group if that is whole."""
        self.nodes[level, i] = handle
        self._try_merge(level, i // self.FAN)

    def width(self, level: int) -> int:
        """Nodes of a level, once the number of blocks is known."""
        width = self.total_blocks
        for _ in range(level):
            width = -(-width // self.FAN)
        return width

    def _try_merge(self, level: int, group: int) -> None:
        first = group * self.FAN
        if self.total_blocks >= 0:
            width = self.width(level)
            if width <= 1:
                return
            last = min(first + self.FAN, width)
        else:
            last = first + self.FAN
        if first >= last or any((level, i) not in self.nodes for i in range(first, last)):
            return
        handles = [self.nodes.pop((level, i)) for i in range(first, last)]
        present = [handle for handle in handles if handle]
        if len(present) <= 1:
            self.settle(level + 1, group, present[0] if present else 0)
        else:
            self.jobs.append(("merge", (level + 1, group, tuple(handles))))

    def merge_all(self) -> None:
        """Look at every waiting group again: the ragged right edge can only be merged once the end is known."""
        for level, group in sorted({(level, i // self.FAN) for level, i in self.nodes}):
            self._try_merge(level, group)

    def root(self) -> int | None:
        """Handle of the final accumulator (0 = there was no item); None while it is not known."""
        if self.total_blocks < 0 or self.jobs:
            return None
        if self.total_blocks == 0:
            return 0
        level, width = 0, self.total_blocks
        while width > 1:
            width = -(-width // self.FAN)
            level += 1
        return self.nodes.get((level, 0))


class Stream:
    """One source, map, sink or reduce of one run."""

    __slots__ = (
        "ample",
        "arrived",
        "attempt",
        "avg_bytes",
        "avg_seconds",
        "batch",
        "batch_frontier",
        "batch_group",
        "batch_timer",
        "blocked",
        "brief",
        "came",
        "can_block",
        "cancelled",
        "collected",
        "delayed",
        "delayed_folds",
        "done",
        "doomed",
        "dropped",
        "early",
        "ended",
        "failed",
        "failing",
        "flow_frontier",
        "flowed",
        "flowing",
        "fold",
        "granted",
        "in_bytes",
        "in_total",
        "is_source",
        "jobs",
        "join",
        "keeps",
        "kept",
        "last_failure",
        "measured",
        "merge_attempts",
        "ok",
        "out_next",
        "pending",
        "promised",
        "pull_open",
        "queued",
        "readers",
        "ready",
        "ready_count",
        "resumed",
        "running",
        "serial",
        "shedding",
        "spill",
        "spill_at",
        "stage",
        "standing",
        "started_at",
        "stopped",
        "tick",
        "told",
        "wait_for",
        "wait_since",
        "waits",
        "window",
    )

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.wait_for = "upstream"  # why nothing of it runs; "" while something does
        self.wait_since = -1.0
        self.waits: dict[str, float] = {}  # reason -> seconds
        self.pending = ""  # why the next block, which is there, has not started
        self.ready: list[tuple[int, int, Segment]] = []  # heap by index: oldest item first
        self.ready_count = 0
        self.tick = 0
        self.running = 0  # items in running tasks
        self.arrived = 0  # indices that came in
        self.came = 0  # items that came in: indices without the gaps
        self.done = 0  # indices finished here (gaps included)
        self.in_total = -1
        self.ok = 0
        self.dropped = 0
        self.failed = 0
        self.cancelled = 0  # items that were stopped one by one
        self.resumed: dict[int, int] = {}  # items that come once more -> the number of the attempt to come
        self.doomed: dict[int, str] | None = None  # items to be taken out when they come in, with the reason
        self.out_next = 0  # next index of the output's own space
        self.attempt = 1  # of a source: how often its generator was made
        self.told = 0  # of a flat-map: how many of its items the events have told of
        self.queued = False
        self.blocked = False
        self.flowing = False
        self.ended = False
        self.stopped = False
        self.is_source = False
        self.pull_open = False  # a pull is out
        self.granted = 0
        self.promised = 0  # bytes that an open pull may still bring
        self.window = 16
        self.delayed: dict[int, Segment] = {}  # by the timer that ends the wait for their next attempt
        self.delayed_folds: dict[int, Any] = {}
        self.failing: ErrorInfo | None = None  # the stage has failed as a whole, and ends so when it has come to rest
        self.shedding = False  # nothing of it is started any more: indices that are left count as gone
        self.last_failure: ErrorInfo | None = None
        self.merge_attempts: dict[Any, int] = {}  # of merges that are to be run again
        self.avg_seconds = 0.0
        self.avg_bytes = 0.0  # of one result
        self.in_bytes = 0.0  # of one element that is laid out here
        self.measured = 0
        self.started_at = -1.0
        self.can_block = False
        self.ample = AMPLE_SECONDS  # of its lane
        self.brief = False  # in blocks only what takes no longer than its hand-over
        self.collected = 0  # readers of the whole stream that have ended
        self.serial = False
        self.batch = 0
        self.batch_timer = 0
        self.batch_group: list[Segment] = []
        self.batch_frontier: Frontier | None = None
        self.flow_frontier: Frontier | None = None
        self.flowed: dict[int, int] = {}  # of a flat-map: inputs not ended whose values go on: how many came so far
        self.early: dict[int, list[tuple[Chunk, int]]] = {}  # those of them whose turn it is not yet: values, count
        self.standing: list[Any] = []  # of a flat-map: calls that stand still until its readers want more
        self.join: Join | None = None
        self.fold: Fold | None = None
        self.jobs: deque[list[Segment]] = deque()
        self.keeps = False
        self.kept: list[Chunk] = []
        self.spill = True  # kept values may go to disk
        self.spill_at = 0  # the first kept list that was not looked at for it
        self.readers: list[Stream] = []

    def waits_for(self, reason: str, now: float) -> None:
        """From now on it waits for this ("" = it runs)."""
        before = self.wait_for
        if before != reason:
            since = self.wait_since
            if before and since >= 0.0:
                self.waits[before] = self.waits.get(before, 0.0) + now - since
            self.wait_for = reason
            self.wait_since = now

    def held_for(self, reason: str, now: float) -> None:
        """There is something to run, and this is why it does not start yet."""
        self.pending = reason
        if not self.running:
            self.waits_for(reason, now)

    def rests(self, now: float) -> None:
        """A task of it has ended."""
        if not self.running:
            self.waits_for(self.pending if self.queued or self.blocked else "upstream", now)

    def push(self, segment: Segment) -> None:
        """Items that may be run."""
        self.tick += 1
        heappush(self.ready, (segment.lo, self.tick, segment))
        self.ready_count += segment.count()

    def pop(self) -> Segment:
        """The oldest segment."""
        segment = heappop(self.ready)[2]
        self.ready_count -= segment.count()
        return segment

    def measure(self, items: int, seconds: float, nbytes: int) -> None:
        """Fold a finished part into the running averages."""
        if items <= 0:
            return
        per_item, per_bytes = seconds / items, nbytes / items
        if self.measured == 0:
            self.avg_seconds, self.avg_bytes = per_item, per_bytes
        else:
            step = SMOOTHING * (per_item - self.avg_seconds)
            if self.brief:
                step = min(step, self.avg_seconds * DOUBT)
            self.avg_seconds += step
            self.avg_bytes += SMOOTHING * (per_bytes - self.avg_bytes)
        self.measured += items

    def has_work(self) -> bool:
        """Whether a block, a batch, a step or a merge could start. A merge has no items."""
        return bool(self.ready or self.jobs or (self.fold is not None and self.fold.jobs))

    def block_size(self, slots: int, most: int) -> int:
        """Items to hand over at once: some milliseconds of work, shrinking towards the end of what is known to come."""
        if not self.can_block:
            return 1
        waiting = self.ready_count
        if self.brief:
            return max(1, min(int(BRIEF_SECONDS / self.avg_seconds), most)) if self.avg_seconds > 0 else 1
        if self.measured == 0:
            return 1  # neither its time nor its bytes are known: whole blocks of large results would break the budget
        if self.avg_seconds > 0:
            ample = min(int(self.ample / self.avg_seconds), waiting // (2 * slots))
            wanted = max(1, min(max(int(BLOCK_SECONDS / self.avg_seconds), ample), most))
        else:
            wanted = most
        if self.in_total >= 0 and self.arrived >= self.in_total:
            share = -(-waiting // (2 * slots))
            floor = int(0.0005 / self.avg_seconds) if self.avg_seconds > 0 else most
            wanted = min(wanted, max(1, share, min(floor, most)))
        return wanted
