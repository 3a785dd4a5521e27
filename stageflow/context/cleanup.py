"""Cleanup that runs whatever happened: last registered first, each within its share of the time.

Callbacks are sync or async. `blocking="here"` runs sync ones in the calling thread (right for what belongs to it, such
as a database connection; a slow one is reported late); `"thread"` gives each a daemon thread of its own, so that one
that hangs is given up when its share is spent.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import msgspec

from stageflow.context.cancellation import CancellationToken
from stageflow.core.errors import StageCancelledError
from stageflow.core.failure import capture
from stageflow.core.output import ErrorInfo

_log = logging.getLogger("stageflow.cleanup")

_MIN_BUDGET: Final = 0.01  # seconds: with very many callbacks each still gets to start
_CANCEL_GRACE: Final = 0.05  # seconds that a timed-out coroutine has to react to its cancellation
UNNAMED: Final = "<unnamed>"

T = TypeVar("T")
Blocking = Literal["here", "thread"]


class CleanupFailure(msgspec.Struct, frozen=True):
    """One callback that raised or took too long. `message` is "Timeout" for the latter."""

    name: str
    message: str
    timed_out: bool = False
    error: ErrorInfo | None = None


class CleanupReport(msgspec.Struct, frozen=True):
    """What a pass did: names in the order they ran."""

    completed: tuple[str, ...] = ()
    failed: tuple[CleanupFailure, ...] = ()

    @property
    def ok(self) -> bool:
        """True when nothing failed."""
        return not self.failed


class _Entry:
    __slots__ = ("args", "callback", "name")

    def __init__(self, name: str | None, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.name = name
        self.callback = callback
        self.args = args


def _is_async(callback: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(type(callback).__call__)


class CleanupRegistry:
    """Callbacks to run at the end. Registering and unregistering are thread-safe; a pass empties the registry first."""

    __slots__ = ("_blocking", "_clock", "_entries", "_last", "_lock")

    def __init__(self, *, blocking: Blocking = "thread", clock: Callable[[], float] = time.monotonic) -> None:
        self._blocking: Blocking = blocking
        self._clock = clock
        self._entries: list[_Entry] = []
        self._lock = threading.Lock()
        self._last = CleanupReport()

    def register(self, callback: Callable[..., Any], *args: Any, name: str | None = None) -> None:
        """Run `callback(*args)` in the next pass, before everything registered earlier."""
        with self._lock:
            self._entries.append(_Entry(name, callback, args))

    def unregister_by_name(self, name: str) -> bool:
        """Remove every callback of that name; True if there was one."""
        with self._lock:
            kept = [entry for entry in self._entries if entry.name != name]
            removed = len(kept) != len(self._entries)
            self._entries = kept
        return removed

    def clear(self) -> None:
        """Forget every callback without running it."""
        with self._lock:
            self._entries = []

    @property
    def pending_count(self) -> int:
        """How many callbacks wait for a pass."""
        return len(self._entries)

    @property
    def completed(self) -> tuple[str, ...]:
        """Names that succeeded in the last pass."""
        return self._last.completed

    @property
    def failed(self) -> tuple[CleanupFailure, ...]:
        """What failed in the last pass."""
        return self._last.failed

    def _take(self) -> list[_Entry]:
        with self._lock:
            taken, self._entries = self._entries, []
        taken.reverse()
        return taken

    async def run_all(self, timeout: float = 10.0) -> CleanupReport:
        """Run everything, last registered first, each within max(timeout / n, 0.01) seconds.

        Never raises what a callback raised. Callbacks registered by callbacks run too while time is left. A
        cancellation of the caller is held back until the pass is over, then raised.
        """
        work = asyncio.ensure_future(self._run_all(timeout))
        held: asyncio.CancelledError | None = None
        while not work.done():
            try:
                await asyncio.wait({work})
            except asyncio.CancelledError as error:
                held = error
        if held is not None:
            raise held
        return work.result()

    async def _run_all(self, timeout: float) -> CleanupReport:
        completed: list[str] = []
        failed: list[CleanupFailure] = []
        end = self._clock() + timeout
        left = timeout
        while (entries := self._take()) and (left > 0 or not (completed or failed)):
            budget = max(left / len(entries), _MIN_BUDGET)
            for entry in entries:
                failure = await self._run_one(entry, budget)
                self._note(entry, failure, completed, failed)
            left = end - self._clock()
        failed.extend(CleanupFailure(entry.name or UNNAMED, "Timeout", timed_out=True) for entry in entries)
        self._last = CleanupReport(tuple(completed), tuple(failed))
        return self._last

    def run_here(self, timeout: float, run_coroutine: Callable[[Coroutine[Any, Any, Any]], Any]) -> CleanupReport:
        """`run_all` in this thread and without a loop of its own: sync callbacks are called (late ones are told as
        such), what they return to be awaited is given to `run_coroutine`, within its budget."""
        completed: list[str] = []
        failed: list[CleanupFailure] = []
        end = self._clock() + timeout
        left = timeout
        while (entries := self._take()) and (left > 0 or not (completed or failed)):
            budget = max(left / len(entries), _MIN_BUDGET)
            for entry in entries:
                self._note(entry, self._one_here(entry, budget, run_coroutine), completed, failed)
            left = end - self._clock()
        failed.extend(CleanupFailure(entry.name or UNNAMED, "Timeout", timed_out=True) for entry in entries)
        self._last = CleanupReport(tuple(completed), tuple(failed))
        return self._last

    def _one_here(
        self, entry: _Entry, budget: float, run_coroutine: Callable[[Coroutine[Any, Any, Any]], Any]
    ) -> CleanupFailure | None:
        name = entry.name or UNNAMED
        started = self._clock()
        try:
            returned = entry.callback(*entry.args)
            if inspect.isawaitable(returned):
                failure: CleanupFailure | None = run_coroutine(_within(_settled(returned), budget, name))
                return failure
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            return _failure(name, error)
        if self._clock() - started > budget:
            return CleanupFailure(name, "Timeout", timed_out=True)
        return None

    def run_all_sync(self, timeout: float = 10.0) -> CleanupReport:
        """`run_all` for a thread without a running loop; async callbacks run on a private loop."""
        with asyncio.Runner() as runner:
            return runner.run(self.run_all(timeout))

    @staticmethod
    def _note(
        entry: _Entry, failure: CleanupFailure | None, completed: list[str], failed: list[CleanupFailure]
    ) -> None:
        if failure is None:
            completed.append(entry.name or UNNAMED)
        else:
            _log.warning("cleanup %r failed: %s", failure.name, failure.message)
            failed.append(failure)

    async def _run_one(self, entry: _Entry, budget: float) -> CleanupFailure | None:
        name = entry.name or UNNAMED
        started = self._clock()
        if self._blocking == "thread" and not _is_async(entry.callback):
            return await _within(_in_thread(entry), budget, name)
        try:
            returned = entry.callback(*entry.args)
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            return _failure(name, error)
        if inspect.isawaitable(returned):
            return await _within(_settled(returned), budget, name)
        if self._clock() - started > budget:
            return CleanupFailure(name, "Timeout", timed_out=True)
        return None


_Settled = tuple[Any, BaseException | None]


async def _settled(work: Awaitable[Any]) -> _Settled:
    """Value and error as a pair: a SystemExit raised by a task would otherwise go on into the loop."""
    try:
        return await work, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error


async def _in_thread(entry: _Entry) -> _Settled:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_Settled] = loop.create_future()
    context = contextvars.copy_context()

    def settle(outcome: _Settled) -> None:
        if not answer.done():
            answer.set_result(outcome)

    def body() -> None:
        try:
            outcome: _Settled = (context.run(entry.callback, *entry.args), None)
        except BaseException as error:
            outcome = (None, error)
        try:
            loop.call_soon_threadsafe(settle, outcome)
        except RuntimeError:
            pass  # given up, and the loop has gone since

    # A pool would make the next callback wait behind one that hangs, and the interpreter's exit too.
    threading.Thread(target=body, name=f"stageflow-cleanup-{entry.name or 'unnamed'}", daemon=True).start()
    return await answer


async def _within(work: Coroutine[Any, Any, _Settled], budget: float, name: str) -> CleanupFailure | None:
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=budget)
    if not done:
        task.cancel()
        # One that ignores its cancellation is left behind: waiting for it would take the time of the others.
        await asyncio.wait({task}, timeout=min(budget, _CANCEL_GRACE))
        return CleanupFailure(name, "Timeout", timed_out=True)
    if task.cancelled():
        return CleanupFailure(name, "cancelled")
    returned, error = task.result()
    if error is not None:
        return _failure(name, error)
    # A sync callable (a lambda, a partial) may hand back a coroutine it made.
    return await _within(_settled(returned), budget, name) if inspect.isawaitable(returned) else None


def _failure(name: str, error: BaseException) -> CleanupFailure:
    info = capture(error, keep_pickle=False)
    return CleanupFailure(name, info.message or info.type, error=info)


def _as_registry(cleanup: CleanupRegistry | Callable[[], Any]) -> CleanupRegistry:
    if isinstance(cleanup, CleanupRegistry):
        return cleanup
    registry = CleanupRegistry()
    registry.register(cleanup, name=getattr(cleanup, "__name__", None))
    return registry


async def run_with_cleanup(
    operation: Callable[[], Awaitable[T]],
    cleanup: CleanupRegistry | Callable[[], Any],
    timeout: float = 10.0,
) -> T:
    """Await `operation()` and run `cleanup` after it: on success, on any exception and on cancellation alike."""
    registry = _as_registry(cleanup)
    try:
        return await operation()
    finally:
        await registry.run_all(timeout)


async def cleanup_on_cancel(
    operation: Callable[[], Awaitable[T]],
    cleanup: CleanupRegistry | Callable[[], Any],
    timeout: float = 10.0,
    *,
    token: CancellationToken | None = None,
) -> T:
    """Await `operation()`; run `cleanup` only if asyncio, `StageCancelledError` or `token` cancelled it."""
    registry = _as_registry(cleanup)
    try:
        result = await operation()
    except (asyncio.CancelledError, StageCancelledError):
        await registry.run_all(timeout)
        raise
    except BaseException:
        if token is not None and token.cancelled:
            await registry.run_all(timeout)
        raise
    if token is not None and token.cancelled:
        await registry.run_all(timeout)
    return result


class CleanupGuard:
    """A `with` block that runs a sync callback at its end unless `disarm()` was called."""

    __slots__ = ("_armed", "_callback")

    def __init__(self, callback: Callable[[], Any]) -> None:
        self._callback = callback
        self._armed = True

    def disarm(self) -> None:
        """Do not run the callback."""
        self._armed = False

    def __enter__(self) -> CleanupGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._armed:
            self._armed = False
            self._callback()
