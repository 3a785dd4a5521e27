"""Measures how much the lanes of this process get done, and sets how many attempts they take at once.

The decision is `stageflow.scheduler.concurrency.tune`; this reads the clock, the machine's books and `/proc`, and tells
the machine. Loop thread only.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

from stageflow.scheduler import signals as sig
from stageflow.scheduler.backpressure import Reading
from stageflow.scheduler.concurrency import Seen, Tuning, tune

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver

_log = logging.getLogger("stageflow")
LANES: Final[tuple[str, ...]] = ("thread", "async")
SHORTEST: Final = 0.2  # seconds between two looks: less says nothing


class Tuner:
    """Sets the slots of one driver's thread and async lanes. `look` with each reading, `reset` when no run is left."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._most = {lane: driver.machine.lanes[lane].slots for lane in LANES if lane in driver.machine.lanes}
        self.states: dict[str, Tuning] = {lane: Tuning(slots=slots) for lane, slots in self._most.items()}
        self._at = -1.0
        self._done = 0
        self._busy = 0.0
        self._throttled = 0.0
        self._lag = 0.0

    def reset(self) -> None:
        """Every lane takes what it may again; the next run is measured afresh."""
        self._at = -1.0
        for lane, state in self.states.items():
            if state.slots != self._most[lane]:
                self._set(lane, Tuning(slots=self._most[lane]))

    def look(self, reading: Reading) -> None:
        """Take one reading into account."""
        self._lag = max(self._lag, reading.loop_lag)
        passed = reading.at - self._at
        if self._at >= 0.0 and passed < SHORTEST:
            return
        machine = self._driver.machine
        done, busy, throttled = machine._next_task - len(machine.tasks), sum(os.times()[:2]), reading.throttled
        if self._at >= 0.0:
            rate, cores = (done - self._done) / passed, (busy - self._busy) / passed
            held = max(0.0, throttled - self._throttled) / passed
            for lane in self.states:
                slots = machine.lanes[lane]
                seen = Seen(
                    done=rate,
                    used=slots.used,
                    waiting=bool(slots),
                    lag=self._lag,
                    busy=cores,
                    throttled=held,
                    descriptors=reading.descriptors,
                )
                state = tune(lane, self.states[lane], seen, self._most[lane])
                if state.slots == self.states[lane].slots:
                    self.states[lane] = state
                else:
                    self._set(lane, state)
        self._at, self._done, self._busy, self._throttled, self._lag = reading.at, done, busy, throttled, 0.0

    def _set(self, lane: str, state: Tuning) -> None:
        before: Any = self.states[lane].slots
        self.states[lane] = state
        _log.debug("the %s lane takes %d attempts at once, not %d: %s", lane, state.slots, before, state.why or "more")
        self._driver.signal(sig.CapacityChanged(lane, state.slots))
