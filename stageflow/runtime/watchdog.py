"""Names the stage that blocks the event loop, with its stack, while it does so.

A thread pings the loop while runs are active; a ping that stays unanswered means the loop is inside somebody's code.
Where the kernel counts it, the time that the loop's thread waited for a core does not count: on a crowded machine every
loop is late, and no stage is to blame.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_log = logging.getLogger("stageflow")
EVERY: Final = 0.05  # seconds between pings
BLOCKED: Final = 0.1  # seconds without an answer that are reported


class Watchdog:
    """Watches one loop. `begin` and `end` with each run. `blocked(seconds, frames, stack)` is called in the
    watchdog's own thread, once per blockage."""

    def __init__(self, loop: asyncio.AbstractEventLoop, blocked: Callable[[float, list[Any], str], None]) -> None:
        self._loop = loop
        self._blocked = blocked
        self._runs = 0
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop_thread = threading.get_ident()
        self._scheduled = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._answered = 0
        self._ping = self._reported = 0
        self._sent = self._starved = 0.0
        self._closed = threading.Event()

    def begin(self) -> None:
        """One more run is active."""
        self._runs += 1
        if self._runs == 1:
            if self._thread is None:
                me = weakref.ref(self, _Ends(self._wanted, self._closed))
                self._thread = threading.Thread(
                    target=_watch, args=(me, self._wanted, self._closed), name="stageflow-watchdog", daemon=True
                )
                self._thread.start()
            self._wanted.set()

    def end(self) -> None:
        """One run less."""
        self._runs = max(0, self._runs - 1)
        if self._runs == 0:
            self._wanted.clear()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._wanted.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=1.0)

    def _answer(self, ping: int) -> None:
        self._answered = ping

    def _send(self) -> bool:
        """Ping the loop if it has answered; False when it is closed."""
        if self._answered == self._ping:
            self._ping += 1
            self._sent, self._starved = time.monotonic(), self._without_core()
            try:
                self._loop.call_soon_threadsafe(self._answer, self._ping)
            except RuntimeError:
                return False
        return True

    def _look(self) -> None:
        """Report a ping that has been without an answer for too long, once."""
        late = time.monotonic() - self._sent
        if self._answered != self._ping and late > BLOCKED and self._reported != self._ping:
            late -= self._without_core() - self._starved
            if late > BLOCKED:
                self._reported = self._ping
                self._report(late)

    def _without_core(self) -> float:
        """Seconds for which the loop's thread could have run and had no core; 0.0 where that is not counted."""
        try:
            with open(self._scheduled, "rb") as counters:  # on the CPU, waiting for it, time slices: nanoseconds
                return int(counters.read().split()[1]) * 1e-9
        except (OSError, IndexError, ValueError):
            return 0.0

    def _report(self, late: float) -> None:
        frame = sys._current_frames().get(self._loop_thread)
        if frame is None:
            return
        frames: list[FrameType] = []
        at: FrameType | None = frame
        while at is not None:
            frames.append(at)
            at = at.f_back
        stack = "".join(traceback.format_stack(frame))
        try:
            self._blocked(late, [one.f_code for one in frames], stack)
        except Exception:
            _log.exception("the watchdog could not report a blocked loop")


class _Ends:
    """Ends the thread of a watchdog that was dropped."""

    def __init__(self, wanted: threading.Event, closed: threading.Event) -> None:
        self._events = closed, wanted

    def __call__(self, _: object) -> None:
        for event in self._events:
            event.set()


def _watch(watchdog: weakref.ref[Watchdog], wanted: threading.Event, closed: threading.Event) -> None:
    """The thread. It holds the watchdog, and so all of a loop, only while it looks: then a loop can be dropped."""
    while wanted.wait() and not closed.is_set():
        one = watchdog()
        if one is None or not one._send():
            return
        one = None
        if closed.wait(EVERY):
            return
        one = watchdog()
        if one is None:
            return
        one._look()
        one = None
