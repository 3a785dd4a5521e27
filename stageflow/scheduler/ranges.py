"""Small arithmetic on index ranges and masks, and the stand-in for values that are not there.

May not import: asyncio, threading, time, random, logging, `stageflow.runtime`, any executor.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from stageflow.context.pieces import Done, given_back, ranges_without
from stageflow.core.output import ErrorInfo
from stageflow.scheduler.streams import Chunk, Segment, Stream

TOO_LARGE: Final = "SF-COLLECT-TOO-LARGE"
#: stands for a column of which no item is there
NOTHING: Final = Chunk(0, 1 << 60, -1)


def no_reason() -> ErrorInfo:
    return ErrorInfo(type="Exception", message="failed without a reason")


def failure_data(error: ErrorInfo) -> dict[str, Any]:
    """What a `stage.failed` says of the error."""
    return {
        "error": error.message, "error_type": error.type, "retryable": error.retryable, "error_info": error,
    }  # fmt: skip


def is_gone(stream: Stream) -> bool:
    """Whether the stage takes no more items."""
    return stream.ended or stream.shedding


def first_of(entry: Any) -> int:
    end: int = entry[0]
    return end


def end_of(segment: Any) -> int:
    end: int = segment.hi
    return end


def indices_of(segment: Segment) -> list[int]:
    if segment.mask < 0:
        return list(range(segment.lo, segment.hi))
    return [segment.lo + bit for bit in range(segment.hi - segment.lo) if segment.mask >> bit & 1]


def path_of(signal: Any, segment: Segment) -> tuple[int, ...]:
    """The index path of the first item that is there in a segment of a block that went wrong."""
    index = segment.lo if segment.mask <= 0 else segment.lo + (segment.mask & -segment.mask).bit_length() - 1
    return (index,) if signal.paths is None else signal.paths.get(index, (index,))


def without_stopped(done: Done) -> Done:
    """A part of a task that was asked to stop: items that heeded it have not decided anything, so they are unrun."""
    stopped = {failure.index for failure in done.failures if failure.status == "cancel"}
    ranges = tuple(
        (start, stop, mask if (start, stop) == (lo, hi) else submask(lo, mask, start, stop))
        for lo, hi, mask in done.ranges
        for start, stop in ranges_without(lo, hi, stopped)
    )
    failures = tuple(failure for failure in done.failures if failure.index not in stopped)
    return msgspec.structs.replace(done, ranges=ranges, failures=failures)


def values_of(done: Done) -> int:
    """How many values a part brings along."""
    if done.counts is not None:
        return sum(done.counts)
    values = sum(hi - lo if mask < 0 else mask.bit_count() for lo, hi, mask in done.ranges)
    return values + given_back(done) if done.handed else values


def own_seconds(done: Done) -> float:
    """Seconds that the items of a part took, without those in which a thread waited for others of its process."""
    return done.seconds if done.outside < 0.0 else min(done.seconds, done.cpu_seconds + done.outside)


def submask(lo: int, mask: int, start: int, stop: int) -> int:
    if mask < 0:
        return -1
    part = (mask >> (start - lo)) & ((1 << (stop - start)) - 1)
    return -1 if part == (1 << (stop - start)) - 1 else part
