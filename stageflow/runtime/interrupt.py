"""Ctrl-C and SIGTERM during a blocking run: a signal handler of the loop, never an exception inside the scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_EXIT: Final = {signal.SIGTERM: 143}
_NOT_USERS: Final = ("stageflow", "stageflow_executors", "asyncio", "uvloop", "selectors", "threading", "contextlib")
if hasattr(signal, "SIGHUP"):
    _EXIT[signal.SIGHUP] = 129
DEAF: Final = 0.05  # seconds without a turn after which the loop counts as held up


class Interrupt:
    """While it is entered (main thread, default handlers only), the first signal asks to drain, the second to stop at
    once, the third ends the process. All of that is heard by the loop. Where a stage keeps the loop from turning (the
    inline lane, a coroutine that never waits) a second Ctrl-C is raised in that stage."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stop: Callable[[str, bool], None]) -> None:
        self._loop = loop
        self._stop = stop
        self._installed: list[signal.Signals] = []
        self._asked: signal.Signals | None = None
        self._count = 0
        self._unheard = 0  # signals since the loop last heard of one, and when the first of them came
        self._since = 0.0
        self._restore: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self
        watched = [signal.SIGINT, *_EXIT]
        for number in watched:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            current = signal.getsignal(number)
            # asyncio.Runner puts a handler of its own in the place of the default one
            if current is default or getattr(current, "__name__", "") == "_on_sigint" or _is_runner(current):
                with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                    self._loop.add_signal_handler(number, self._received, number)
                    self._installed.append(number)
                    self._restore[number] = current
                    signal.signal(number, self._arrived)  # the loop hears of it as before, by its wakeup descriptor
        return self

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        """A signal, whether or not the loop gets to hear of it."""
        self._unheard += 1
        now = time.monotonic()
        if self._unheard == 1:
            self._since = now
        if self._unheard > 2:
            _end_process(number)
        elif self._unheard == 2 and number == signal.SIGINT and now - self._since > DEAF and _is_users(frame):
            if self._asked is None:  # before the failure of the stage, or the run would end by that
                self._asked = signal.SIGINT
                self._stop(_reason(signal.SIGINT), False)
            raise KeyboardInterrupt

    def _received(self, number: signal.Signals) -> None:
        self._unheard = 0
        force = self._asked is not None
        self._asked = self._asked or number
        self._count += 1
        if self._count > 2:
            # whatever keeps the run from ending, a third signal ends the process as if nobody had caught it
            _end_process(number)
        self._stop(_reason(number), force)

    def __exit__(self, *exc: object) -> None:
        for number in self._installed:
            with contextlib.suppress(Exception):
                self._loop.remove_signal_handler(number)
                signal.signal(number, self._restore[number])
        self._installed.clear()

    def raise_if_asked(self, result: Any) -> None:
        """KeyboardInterrupt (or SystemExit for SIGTERM and SIGHUP) with the partial result as its `result`."""
        if self._asked is None:
            return
        error: BaseException
        if self._asked == signal.SIGINT:
            error = KeyboardInterrupt("interrupted; the partial result is in .result")
        else:
            error = SystemExit(_EXIT[self._asked])
        error.result = result  # type: ignore[union-attr, attr-defined, unused-ignore]
        raise error


def _reason(number: int) -> str:
    return f"interrupted by {signal.Signals(number).name}"


def _end_process(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_users(frame: FrameType | None) -> bool:
    """Whether what runs is neither ours nor an event loop's: an exception must not be raised amid their books."""
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_USERS


def _is_runner(handler: Any) -> bool:
    return isinstance(getattr(getattr(handler, "func", None), "__self__", None), asyncio.Runner)
