"""Small tools around running things that the engine itself does not offer: a timeout as a value, and memory samples.

Timeouts of stages and runs, retries, cleanup and cancellation are the engine's; nothing here repeats them.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar, assert_never

from stageflow.core.errors import DefinitionError, StageTimeoutError

__all__ = [
    "Err",
    "MemorySample",
    "MemoryTracker",
    "Ok",
    "TimedResult",
    "Timeout",
    "run_cleanup_with_timeout",
    "run_with_timeout",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class _Algebra(Generic[T]):
    """What all three outcomes can be asked."""

    __slots__ = ()

    @property
    def is_ok(self) -> bool:
        """Whether it ended in time with a value."""
        return isinstance(self, Ok)

    @property
    def is_err(self) -> bool:
        """Whether it raised."""
        return isinstance(self, Err)

    @property
    def is_timeout(self) -> bool:
        """Whether its time was up first."""
        return isinstance(self, Timeout)


@dataclass(frozen=True, slots=True)
class Ok(_Algebra[T]):
    """It ended in time with `value`."""

    value: T

    def into_result(self, timeout_error: BaseException | None = None) -> T:
        """The value."""
        return self.value


@dataclass(frozen=True, slots=True)
class Err(_Algebra[T]):
    """It raised `error` in time."""

    error: Exception

    def into_result(self, timeout_error: BaseException | None = None) -> NoReturn:
        """Raise the error."""
        raise self.error


@dataclass(frozen=True, slots=True)
class Timeout(_Algebra[T]):
    """It was cancelled because `limit` seconds were up."""

    limit: float

    def into_result(self, timeout_error: BaseException | None = None) -> NoReturn:
        """Raise `timeout_error`, or a StageTimeoutError where none is given."""
        if timeout_error is not None:
            raise timeout_error
        raise StageTimeoutError(f"not done after {self.limit} s", limit=self.limit)


TimedResult = Ok[T] | Err[T] | Timeout[T]


async def run_with_timeout(seconds: float, operation: Callable[[], Awaitable[T]]) -> TimedResult[T]:
    """Run `operation()` for at most `seconds` and say how it ended; never raises for its sake.

    A TimeoutError the operation raises itself is `Err`, not `Timeout`. Cancelling the caller cancels the operation.
    """
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            return Ok(await operation())
    except TimeoutError as error:
        return Timeout(seconds) if scope.expired() else Err(error)
    except Exception as error:
        return Err(error)


async def run_cleanup_with_timeout(seconds: float, cleanup: Callable[[], Awaitable[object]]) -> bool:
    """Run a cleanup; True where it ended in time, False with a logged warning where it did not or raised."""
    outcome = await run_with_timeout(seconds, cleanup)
    match outcome:
        case Ok():
            return True
        case Timeout():
            logger.warning("cleanup was not done after %s s", seconds)
        case Err(error):
            logger.warning("cleanup failed: %s", error, exc_info=error)
        case _:
            assert_never(outcome)
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """Python memory at one moment, as the standard library traces it. `time` in seconds of the tracker's clock."""

    time: float
    current_kb: float
    peak_kb: float
    label: str


class MemoryTracker:
    """Samples what Python objects of this process take, by `tracemalloc`; tracing slows the process while it is active.

    A context manager; trackers may overlap, and tracing ends with the last one that began it here. Thread-safe.
    """

    _active_count = 0
    _started_here = False
    _switch = threading.Lock()

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._active = False
        self._samples: list[MemorySample] = []

    @property
    def active(self) -> bool:
        """Whether it was started and not stopped."""
        return self._active

    @property
    def samples(self) -> tuple[MemorySample, ...]:
        """What was observed so far, in order."""
        return tuple(self._samples)

    @property
    def peak_kb(self) -> float:
        """The highest peak among the samples; 0 before the first."""
        return max((sample.peak_kb for sample in self._samples), default=0.0)

    def start(self) -> MemoryTracker:
        """Begin tracing; nothing where it is active already."""
        with MemoryTracker._switch:
            if not self._active:
                self._active = True
                MemoryTracker._active_count += 1
                if not tracemalloc.is_tracing():
                    tracemalloc.start()
                    MemoryTracker._started_here = True
        return self

    def stop(self) -> None:
        """End tracing unless somebody else still traces; the samples stay."""
        with MemoryTracker._switch:
            if self._active:
                self._active = False
                MemoryTracker._active_count -= 1
                if MemoryTracker._active_count == 0 and MemoryTracker._started_here:
                    MemoryTracker._started_here = False
                    tracemalloc.stop()

    def observe(self, label: str = "") -> MemorySample:
        """Take one sample.

        Raises:
            DefinitionError: the tracker is not active.
        """
        if not self._active:
            raise DefinitionError("this memory tracker is not active", hint="call start() or use it as `with`")
        current, peak = tracemalloc.get_traced_memory()
        sample = MemorySample(time=self._clock(), current_kb=current / 1024, peak_kb=peak / 1024, label=label)
        self._samples.append(sample)
        return sample

    def track(self, label: str) -> Callable[[F], F]:
        """Decorate a function, sync or async, to sample `<label>:start` and `<label>:end`, the latter also on errors.

        The tracker is active for the call where it was not before.
        """

        def decorate(function: F) -> F:
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def tracked_async(*args: Any, **kwargs: Any) -> Any:
                    with self._span(label):
                        return await function(*args, **kwargs)

                return tracked_async  # type: ignore[return-value]

            @functools.wraps(function)
            def tracked(*args: Any, **kwargs: Any) -> Any:
                with self._span(label):
                    return function(*args, **kwargs)

            return tracked  # type: ignore[return-value]

        return decorate

    def _span(self, label: str) -> _Span:
        return _Span(self, label)

    def __enter__(self) -> MemoryTracker:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class _Span:
    """One tracked call."""

    __slots__ = ("_label", "_owns", "_tracker")

    def __init__(self, tracker: MemoryTracker, label: str) -> None:
        self._tracker = tracker
        self._label = label
        self._owns = False

    def __enter__(self) -> None:
        self._owns = not self._tracker.active
        self._tracker.start()
        self._tracker.observe(f"{self._label}:start")

    def __exit__(self, *exc_info: object) -> None:
        self._tracker.observe(f"{self._label}:end")
        if self._owns:
            self._tracker.stop()
