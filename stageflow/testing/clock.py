"""A clock that jumps: hour-long backoffs and timeouts take no time, and the times a test sees are exact.

Give it to an engine: `Engine(clock=VirtualClock())`. Time stands still while any attempt does something, or a source
that was asked for items; when all that is under way waits in `clock.sleep` (or nothing is), time jumps to the next
timer or sleeper.

Worker processes have real time: by itself a virtual hour passes for the scheduler only while no process attempt runs.
A test that knows one to be at work lets time pass by `advance`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

__all__ = ["VirtualClock"]


class _Timer:
    """Something that is due at a virtual second."""

    __slots__ = ("callback", "cancelled", "when")

    def __init__(self, when: float, callback: Callable[[], Any]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """It is not wanted any more."""
        self.cancelled = True


class _Line:
    """The timers of one event loop."""

    __slots__ = ("active", "asleep", "heap", "looking", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.heap: list[tuple[float, int, _Timer]] = []
        self.active = 0  # attempts and sources under way
        self.asleep = 0  # of them, those in `sleep` or `block`
        self.looking = False


class VirtualClock:
    """Virtual seconds for one engine. `now` is the time since the clock was made. Safe to use from several threads."""

    def __init__(self) -> None:
        self._base = 0.0  # sums of round numbers stay exact
        self._base_ns = time.time_ns()
        self._now = 0.0
        self._seq = 0
        self._lock = threading.RLock()
        self._lines: dict[int, _Line] = {}

    @property
    def now(self) -> float:
        """Virtual seconds since the clock was made."""
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Wait on this clock inside a coroutine stage."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = self._sleeper(loop, seconds, wake)
        try:
            await woken
        except BaseException:
            if not timer.cancelled:
                self._woken(loop, timer)
            raise

    def block(self, seconds: float, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Wait on this clock inside a synchronous stage of the thread lane."""
        woken = threading.Event()
        with self._lock:
            lines = list(self._lines.values())
        line = next((one for one in lines if loop is None or one.loop is loop), None)
        if line is None:
            raise RuntimeError("no engine runs on this clock yet")
        self._sleeper(line.loop, seconds, woken.set, threadsafe=True)
        woken.wait()

    def advance(self, seconds: float) -> None:
        """Let so much time pass although attempts are at work: what becomes due is called back, in order, in the next
        turn of its loop. For attempts that have no clock, such as those of a worker; any thread."""
        with self._lock:
            lines, until = list(self._lines.values()), self._now + seconds
        for line in lines:
            if not line.loop.is_closed():
                line.loop.call_soon_threadsafe(self._pass, line, until)

    def _pass(self, line: _Line, until: float) -> None:
        """Call back everything that is due until then."""
        while True:
            with self._lock:
                while line.heap and line.heap[0][2].cancelled:
                    heappop(line.heap)
                if not line.heap or line.heap[0][0] > until:
                    self._now = max(self._now, until)
                    return
                when, _, timer = heappop(line.heap)
                self._now = max(self._now, when)
            timer.callback()

    def _sleeper(
        self, loop: asyncio.AbstractEventLoop, seconds: float, wake: Callable[[], Any], *, threadsafe: bool = False
    ) -> _Timer:
        with self._lock:
            line = self._line(loop)
            line.asleep += 1

        def due() -> None:
            self._woken(loop, timer)
            wake()

        timer = self._add(line, self._now + max(0.0, seconds), due)
        if threadsafe:
            loop.call_soon_threadsafe(self._look, line)
        else:
            self._look(line)
        return timer

    def _woken(self, loop: asyncio.AbstractEventLoop, timer: _Timer) -> None:
        with self._lock:
            timer.cancelled = True
            self._line(loop).asleep -= 1

    # ------------------------------------------------------------ what the driver asks

    def monotonic(self) -> float:
        """Virtual seconds, from an arbitrary start."""
        with contextlib.suppress(RuntimeError):
            self._line(asyncio.get_running_loop())  # from now on attempts of this loop may sleep here
        return self._base + self._now

    def time_ns(self) -> int:
        """Unix time in nanoseconds, as far as this clock has come."""
        return self._base_ns + round(self._now * 1e9)

    def entered(self, measured: float, started: float) -> float:
        """When an attempt began: executors measure real seconds, so the driver's own time counts."""
        return started

    def call_at(self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], Any]) -> _Timer:
        """Call back when this clock has come to `when`."""
        line = self._line(loop)
        timer = self._add(line, when - self._base, callback)
        self._look(line)
        return timer

    def settled(self, loop: asyncio.AbstractEventLoop, running: int) -> None:
        """The driver has `running` attempts under way and nothing else to do."""
        line = self._line(loop)
        line.active = running
        self._look(line)

    # ------------------------------------------------------------ jumping

    def _line(self, loop: asyncio.AbstractEventLoop) -> _Line:
        with self._lock:
            line = self._lines.get(id(loop))
            if line is None or line.loop is not loop:
                line = self._lines[id(loop)] = _Line(loop)
            return line

    def _add(self, line: _Line, when: float, callback: Callable[[], Any]) -> _Timer:
        timer = _Timer(when, callback)
        with self._lock:
            self._seq += 1
            heappush(line.heap, (when, self._seq, timer))
        return timer

    def _look(self, line: _Line) -> None:
        """Jump in a later turn of the loop, if nothing has begun to run by then."""
        if not line.looking and line.heap and line.asleep >= line.active:
            line.looking = True
            line.loop.call_soon(self._jump, line, 2)

    def _jump(self, line: _Line, turns: int) -> None:
        if line.asleep < line.active:
            line.looking = False
            return
        if turns:  # what the last turn has set off may still start an attempt
            line.loop.call_soon(self._jump, line, turns - 1)
            return
        line.looking = False
        with self._lock:
            while line.heap and line.heap[0][2].cancelled:
                heappop(line.heap)
            if not line.heap:
                return
            when, _, timer = heappop(line.heap)
            self._now = max(self._now, when)
        timer.callback()
        self._look(line)
