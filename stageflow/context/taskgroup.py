"""Coroutines that end together: the first failure stops the others at once, and cleanup always runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Final, TypeVar

from stageflow.context.cancellation import CancellationToken
from stageflow.context.cleanup import CleanupRegistry, CleanupReport
from stageflow.core.errors import DefinitionError, StageCancelledError

CLEANUP_TIMEOUT: Final = 10.0  # seconds for all cleanup of a group

T = TypeVar("T")


class StructuredTaskGroup:
    """Named tasks with one token and one cleanup registry. Belongs to the loop it is used on.

    The first task to fail (in time, not in spawn order) cancels the token with its error text and every other task.
    Use it as `async with`, or call `wait()`.
    """

    def __init__(self, *, token: CancellationToken | None = None, cleanup_timeout: float = CLEANUP_TIMEOUT) -> None:
        self.token = token.child() if token is not None else CancellationToken()
        self.cleanup = CleanupRegistry()
        self.cleanup_report = CleanupReport()
        self._cleanup_timeout = cleanup_timeout
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._first: tuple[str, BaseException] | None = None
        self._stopping = False
        self._closed = False

    def spawn(self, name: str, function: Callable[[CancellationToken], Awaitable[T]]) -> asyncio.Task[T]:
        """Start `function(token)` as the task `name`; in a group that is stopping it starts cancelled."""
        if self._closed:
            raise DefinitionError(f"task group: {name!r} was spawned after the group ended")
        if name in self._tasks:
            raise DefinitionError(f"task group: there is already a task {name!r}", hint="give each task its own name")
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self.token.on_cancel(lambda _: self._from_token(loop))

        async def body() -> T:
            return await function(self.token)

        task = asyncio.get_running_loop().create_task(body(), name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._ended(name, done))
        if self._stopping:
            task.cancel()
        return task

    def _from_token(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.call_soon_threadsafe(self._stop)
        except RuntimeError:
            pass  # the loop is closed: so are its tasks

    def _ended(self, name: str, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None or self._first is not None:
            return
        self._first = (name, error)
        self.token.cancel(str(error) or type(error).__name__)
        self._stop()

    def _stop(self) -> None:
        self._stopping = True
        for task in self._tasks.values():
            task.cancel()

    def cancel_all(self, reason: str = "cancelled") -> None:
        """Cancel the token and every task. On the loop's thread it takes effect at once."""
        self.token.cancel(reason)
        self._stop()

    @property
    def task_count(self) -> int:
        """How many tasks were spawned."""
        return len(self._tasks)

    @property
    def results(self) -> Mapping[str, Any]:
        """Values of the tasks that ended well, by name, in spawn order."""
        return MappingProxyType(
            {
                name: task.result()
                for name, task in self._tasks.items()
                if task.done() and not task.cancelled() and task.exception() is None
            }
        )

    @property
    def failures(self) -> Mapping[str, BaseException]:
        """Exceptions of the tasks that failed, by name, in spawn order; cancelled ones are not listed."""
        found: dict[str, BaseException] = {}
        for name, task in self._tasks.items():
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                found[name] = error
        return MappingProxyType(found)

    async def wait(self) -> None:
        """Wait for all, clean up, then raise the first failure, or `StageCancelledError` after a cancellation."""
        cancelled: asyncio.CancelledError | None = None
        while any(not task.done() for task in self._tasks.values()):
            try:
                await asyncio.wait(self._tasks.values())
            except asyncio.CancelledError as error:
                cancelled = error
                self.cancel_all("cancelled by the caller")
        self._closed = True
        # Tasks that ended in this very turn have their callbacks still queued.
        for name, task in self._tasks.items():
            self._ended(name, task)
        self.token.close()
        self.cleanup_report = await self.cleanup.run_all(self._cleanup_timeout)
        if cancelled is not None:
            raise cancelled
        if self._first is not None:
            name, failure = self._first
            note = f"in task {name!r}"
            if note not in getattr(failure, "__notes__", ()):
                failure.add_note(note)
            raise failure
        if any(task.cancelled() for task in self._tasks.values()):
            reason = self.token.reason or "cancelled"
            raise StageCancelledError(f"cancelled: {reason}", reason=reason)

    async def __aenter__(self) -> StructuredTaskGroup:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.wait()
            return
        self.cancel_all(str(error) or type(error).__name__)
        try:
            await self.wait()
        except StageCancelledError:
            pass  # the block's own exception is the story
        except Exception as failure:
            if failure is not error:
                error.add_note(f"task group: {type(failure).__name__}: {failure}")
