"""A source in a worker of its own, as the driver sees it: a call that is told how much it may give."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Final, Protocol

from stageflow.core.executor import Call, Deliver, Executor, Outcome, OutcomeKind
from stageflow.core.output import ErrorInfo
from stageflow.runtime.running import SOURCES
from stageflow.runtime.sequence import Values
from stageflow.runtime.sources import Arrived

_numbers = itertools.count(SOURCES)
POISON: Final = 3  #: the third worker that is lost with the same item due is the last


class Credits(Executor, Protocol):
    """A lane whose calls are told how much more they may give."""

    def go_on(self, call_id: int, more: tuple[int, int] | None = None) -> None: ...


class WorkerSource:
    """Pulls a source that a worker drives. On the loop only.

    `make(number, credit, skip)` is the call that runs it past what it has given. A worker that is lost before the first
    item, or with `replayable`, is replaced; `told` hears of it. `refused` is asked whether it goes
    elsewhere when it cannot be sent.
    """

    def __init__(
        self,
        executor: Credits,
        make: Callable[[int, tuple[int, int], int], Call],
        arrived: Arrived,
        ended: Callable[[ErrorInfo | None, BaseException | None], None],
        loop: asyncio.AbstractEventLoop,
        *,
        skip: int,
        replayable: bool,
        grace: float,
        begun: Callable[[int], None],
        told: Callable[[ErrorInfo | None], None],
        refused: Callable[[ErrorInfo, tuple[int, int]], bool],
    ) -> None:
        self._executor = executor
        self._make = make
        self._arrived = arrived
        self._ended = ended
        self._loop = loop
        self._replayable = replayable
        self._grace = grace
        self._begun = begun
        self._told = told
        self._refused = refused
        self._given = skip
        self._credit = (0, 0)
        self._call = 0
        self._asks = False
        self._deaths = 0
        self._stopped: str | None = None
        self._force: asyncio.TimerHandle | None = None

    def pull(self, count: int, nbytes: int = 0) -> None:
        """Set the credit: items, and bytes (0 = any)."""
        self._credit = (count, nbytes)
        if not self._call:
            self._start()
        elif self._asks:
            self._asks = False
            self._executor.go_on(self._call, self._credit)

    def stop(self, reason: str) -> None:
        """Have the generator closed between two items; one that hangs in its `next` is killed after the grace."""
        if self._stopped is not None:
            return
        self._stopped = reason
        if not self._call:
            self._loop.call_soon(self._ended, None, None)
            return
        self._executor.cancel(self._call, reason=reason)
        self._force = self._loop.call_later(self._grace, self.kill)

    def kill(self) -> None:
        """End it now."""
        if self._call:
            self._executor.cancel(self._call, reason=self._stopped or "the run is over", force=True)

    def _start(self) -> None:
        self._call = next(_numbers)
        self._asks = False
        try:
            call = self._make(self._call, self._credit, self._given)
            self._begun(self._call)
            deliver: Deliver = self._deliver
            self._executor.start(call, deliver)
        except Exception as error:
            self._loop.call_soon(self._end, None, error)

    def _deliver(self, outcome: Outcome) -> None:
        if outcome.call_id != self._call:
            return
        if outcome.kind == OutcomeKind.OK and outcome.meta is not None:
            count, nbytes, seconds, spent = outcome.meta
            left, room = self._credit
            self._credit = (0 if spent else left - count, max(1, room - nbytes) if room else 0)
            self._asks = not outcome.final and self._credit[0] <= 0
            if count:
                self._deaths = 0
                self._given += count
                nbytes = max(nbytes, outcome.bytes_out)
                held = outcome.value
                values = Values(held, None, nbytes) if isinstance(held, list) else Values(None, held, nbytes, count)
                self._arrived(values, nbytes, seconds, spent)
        if not outcome.final:
            return
        if outcome.kind == OutcomeKind.LOST and self._stopped is None:
            self._deaths += outcome.suspect
            if (self._replayable or not self._given) and self._deaths < POISON:
                self._told(outcome.error)
                self._start()
                return
        if outcome.kind == OutcomeKind.REFUSED and self._stopped is None and outcome.error is not None:
            if self._refused(outcome.error, self._credit):
                return
        failed = outcome.kind not in (OutcomeKind.OK, OutcomeKind.CANCELLED) and self._stopped is None
        self._end(outcome.error if failed else None, outcome.exception if failed else None)

    def _end(self, error: ErrorInfo | None, exception: BaseException | None) -> None:
        self._call = 0
        if self._force is not None:
            self._force.cancel()
        self._ended(error, exception)
