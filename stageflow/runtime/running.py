"""Which attempts are under way, and which drivers there are."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.core.executor import Executor
from stageflow.runtime.job import Job

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver

#: every driver of this process: `ctx.spawn` finds the run of an attempt by it
live_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()

#: calls of sources are numbered from here: they are no tasks of the scheduler
SOURCES: Final = 1 << 48


class Running(msgspec.Struct, eq=False, gc=False):
    """One attempt under way, as the driver knows it. `claim` is what acts around it, if anything.

    Not known to the collector, which would walk all that run: it is taken out by hand when the attempt ends."""

    job: Job
    action: Any
    executor: Executor
    since: float
    claim: Any = None
    timeout: float | None = None  # the limit that was used up
    at: float = 0.0  # where the parts of a block that came back end
    children: set[int] | None = None  # runs it has started
    asked: bool = False  # to stop


class DriverCounters:
    """The few things that several parts of the driver write."""

    _seq: int  # of events
    _next_handle: int
    _scheduled: bool  # a turn is on its way
    _turning: bool  # a turn is under way
