"""Real time for the driver: monotonic seconds, Unix nanoseconds, and timers of the running loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol


class DriverClock(Protocol):
    """What the driver needs of a clock. `settled` is told after every turn how many attempts are under way."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start."""
        ...

    def time_ns(self) -> int:
        """Unix time in nanoseconds."""
        ...

    def entered(self, measured: float, started: float) -> float:
        """When an attempt's function was entered, on this clock: an executor measured `measured` in real time, the
        driver handed it over at `started`."""
        ...

    def call_at(self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], Any]) -> Any:
        """Call back at monotonic second `when`; what is returned has `cancel()`."""
        ...

    def settled(self, loop: asyncio.AbstractEventLoop, running: int) -> None:
        """The driver has done everything it can for now."""
        ...


class RealClock:
    """The machine's clock."""

    monotonic = staticmethod(time.monotonic)
    time_ns = staticmethod(time.time_ns)

    def entered(self, measured: float, started: float) -> float:
        """What the executor measured."""
        return measured

    def call_at(self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], Any]) -> Any:
        """A timer of the loop."""
        return loop.call_later(max(0.0, when - time.monotonic()), callback)

    def settled(self, loop: asyncio.AbstractEventLoop, running: int) -> None:
        """Real time passes by itself."""
