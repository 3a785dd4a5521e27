"""Event loops of an engine: what it has on each, and those it keeps itself for threads that block in it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from stageflow.core.errors import DefinitionError
from stageflow.core.executor import Executor

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver


class LoopState:
    """What an engine has on one event loop."""

    __slots__ = ("active", "driver", "held", "lanes", "loop", "opening")

    def __init__(self, loop: asyncio.AbstractEventLoop, driver: Driver) -> None:
        self.loop = loop
        self.driver = driver
        self.lanes: dict[str, Executor] = {}
        self.active = 0
        self.held = False  # kept open between runs: inside `async with`, or a loop of the engine's own
        self.opening = asyncio.Lock()


class OwnLoops:
    """One loop per thread that calls a blocking method; the main thread's is kept until `close`. Any thread."""

    __slots__ = ("_lock", "_runners")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runners: dict[int, asyncio.Runner] = {}

    def run(self, coroutine: Coroutine[Any, Any, Any], leave: Callable[[], Coroutine[Any, Any, None]]) -> Any:
        """Run a coroutine on this thread's loop, and `leave` on a loop that is not kept."""
        thread = threading.get_ident()
        with self._lock:
            runner = self._runners.get(thread)
            if runner is None:
                runner = self._runners[thread] = asyncio.Runner(loop_factory=loop_factory())
        try:
            # the caller's own variables, such as its span, not those of whoever made the loop
            return runner.run(coroutine, context=contextvars.copy_context())
        finally:
            if thread != threading.main_thread().ident:
                # nobody tells when another thread ends: do not keep a loop for it
                with self._lock:
                    self._runners.pop(thread, None)
                runner.run(leave())
                runner.close()

    def close(self, leave: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `leave` on every loop that is kept, and close it. Blocks."""
        with self._lock:
            runners, self._runners = self._runners, {}
        for runner in runners.values():
            with contextlib.suppress(RuntimeError):
                runner.run(leave())
            runner.close()

    def drop(self) -> None:
        """Close every loop that is kept, whatever is on it: nobody can reach it any more. Any thread."""
        with self._lock:
            runners, self._runners = self._runners, {}
        for runner in runners.values():
            loop = runner.get_loop()
            if not loop.is_running():
                loop.close()


def loop_factory() -> Any:
    """uvloop where there is one, else asyncio's own loop."""
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def no_running_loop(what: str, instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise DefinitionError(f"{what}() blocks and an event loop is running in this thread", hint=instead)
