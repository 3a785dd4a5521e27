"""Stages to build pipelines under test from, and faults to put into them.

A stage here keeps what it saw in the process that ran it: use the async, thread or inline lane where a test reads it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stageflow.context.stage_context import StageContext
from stageflow.core.output import StageOutput

__all__ = [
    "FailingStage",
    "Flaky",
    "KillsWorker",
    "MockStage",
    "OutOfMemory",
    "RecordingStage",
    "SlowStage",
    "SuccessStage",
]


class MockStage:
    """Answers `output` (settable), counts its calls and keeps their contexts."""

    def __init__(self, output: Any = None, *, name: str = "mock") -> None:
        self.name = name
        self.output = output
        self.contexts: list[StageContext] = []

    @property
    def call_count(self) -> int:
        """How often it ran."""
        return len(self.contexts)

    async def execute(self, ctx: StageContext) -> Any:
        """Answer."""
        self.contexts.append(ctx)
        return self.output() if callable(self.output) else self.output

    def reset(self) -> None:
        """Forget the calls."""
        self.contexts.clear()


class SuccessStage:
    """Ends OK, with `data`."""

    def __init__(self, data: Any = None) -> None:
        self.data = data

    async def execute(self, ctx: StageContext) -> StageOutput:
        """Succeed."""
        return StageOutput.ok(self.data)


class FailingStage:
    """Ends FAIL; `retryable` as said. With `exception`, raises it instead."""

    def __init__(
        self, error: str = "failed on purpose", *, retryable: bool = False, exception: BaseException | None = None
    ) -> None:
        self.error = error
        self.retryable = retryable
        self.exception = exception

    async def execute(self, ctx: StageContext) -> StageOutput:
        """Fail."""
        if self.exception is not None:
            raise self.exception
        return StageOutput.fail(self.error, retryable=self.retryable)


class SlowStage:
    """Takes `seconds`, on `clock` (a VirtualClock) where one is given, then ends OK with `data`."""

    def __init__(self, seconds: float, data: Any = None, *, clock: Any = None) -> None:
        self.seconds = seconds
        self.data = data
        self.clock = clock

    async def execute(self, ctx: StageContext) -> Any:
        """Wait."""
        await (asyncio.sleep if self.clock is None else self.clock.sleep)(self.seconds)
        return self.data


class RecordingStage:
    """Notes (stage name, attempt, inputs) of every execution."""

    def __init__(self, data: Any = None) -> None:
        self.data = data
        self.executions: list[tuple[str, int, dict[str, Any]]] = []

    async def execute(self, ctx: StageContext) -> Any:
        """Note and succeed."""
        self.executions.append((ctx.stage_name, ctx.attempt, dict(ctx.inputs.items())))
        return self.data

    def clear(self) -> None:
        """Forget the executions."""
        self.executions.clear()


# ---------------------------------------------------------------- faults around a function


class _Fault:
    """A function of one element (or of none) with a fault around it. Counts in files, so it works in every lane."""

    def __init__(self, function: Callable[..., Any], *, folder: str | None = None) -> None:
        self.function = function
        self.folder = folder or tempfile.mkdtemp(prefix="stageflow-fault-")
        self.__name__ = getattr(function, "__name__", "fault")
        self.__wrapped__ = function

    def count(self) -> int:
        """Calls so far, over all processes and deaths."""
        return len(os.listdir(self.folder))

    def _enter(self) -> int:
        """Note one more call; its number, from 1. Exactly one caller gets each number."""
        number = self.count() + 1
        while True:
            try:
                os.close(os.open(Path(self.folder, str(number)), os.O_CREAT | os.O_EXCL))
                return number
            except FileExistsError:
                number += 1


class Flaky(_Fault):
    """Raises in its first `times` calls."""

    def __init__(
        self,
        function: Callable[..., Any],
        times: int,
        *,
        exception: Callable[[], BaseException] = ConnectionError,
        folder: str | None = None,
    ) -> None:
        super().__init__(function, folder=folder)
        self.times = times
        self.exception = exception

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._enter() <= self.times:
            raise self.exception()
        return self.function(*args, **kwargs)


class KillsWorker(_Fault):
    """Kills the process that runs it with `signum` in its first `times` calls: "before" the function, "after" it, or in
    the "middle" (`seconds` after it began, from another thread). Only for the process lane."""

    def __init__(
        self,
        function: Callable[..., Any],
        times: int = 1,
        *,
        when: str = "before",
        seconds: float = 0.005,
        signum: int = signal.SIGKILL,
        folder: str | None = None,
    ) -> None:
        if when not in ("before", "middle", "after"):
            raise ValueError(f"when={when!r}; give before, middle or after")
        super().__init__(function, folder=folder)
        self.times = times
        self.when = when
        self.seconds = seconds
        self.signum = signum
        self.parent = os.getpid()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        deadly = self._enter() <= self.times
        if deadly and os.getpid() == self.parent:
            raise RuntimeError("KillsWorker would kill the test: give its stage executor='process'")
        if deadly and self.when == "before":
            self._die()
        if deadly and self.when == "middle":
            import threading

            threading.Timer(self.seconds, self._die).start()
        result = self.function(*args, **kwargs)
        if deadly and self.when == "middle":
            time.sleep(self.seconds + 60)  # it ends here, however short the function is
        if deadly:
            self._die()
        return result

    def _die(self) -> None:
        os.kill(os.getpid(), self.signum)


class OutOfMemory(_Fault):
    """Asks for memory that does not exist in its first `times` calls: a MemoryError, as a full machine gives it."""

    def __init__(self, function: Callable[..., Any], times: int = 1, *, folder: str | None = None) -> None:
        super().__init__(function, folder=folder)
        self.times = times

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._enter() <= self.times:
            bytearray(1 << 62)
        return self.function(*args, **kwargs)
