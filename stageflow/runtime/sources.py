"""Drives sources: each from its first item to its close by one task, or one thread of its own; suspended where there
is no credit."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

from stageflow.context.attempt import finish_context, finish_context_async
from stageflow.context.stage_context import StageContext

CHUNK_SECONDS: Final = 0.002  # items are handed on at least this often
CHUNK_ITEMS: Final = 1024
CHUNK_BYTES: Final = 4 << 20

#: (items, seconds spent in the source)
Arrived = Callable[[list[Any], float], None]
#: (exception or None)
Ended = Callable[[BaseException | None], None]


def sized(value: Any) -> int:
    """Bytes of a value as far as they can be told cheaply: nbytes or length of buffers and strings, else a guess."""
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(value, bytes | bytearray | str):
        return len(value)
    if isinstance(value, list | tuple | set | frozenset):
        if not value:
            return 56
        sample = list(islice(value, 8))
        return 56 + len(value) * (8 + sum(map(sized, sample)) // len(sample))
    if isinstance(value, dict):
        sample = list(islice(value.items(), 8))
        return 64 + (len(value) * sum(sized(k) + sized(v) + 16 for k, v in sample) // len(sample) if sample else 0)
    return 64


class SequenceSource:
    """Lays out a sequence that is already there. No thread, no task: a pull is a slice."""

    def __init__(self, values: Any, arrived: Arrived, ended: Ended, loop: asyncio.AbstractEventLoop) -> None:
        self._values = values
        self._position = 0
        self._arrived = arrived
        self._ended = ended
        self._loop = loop

    def pull(self, count: int) -> None:
        """Give up to `count` more."""
        items = list(self._values[self._position : self._position + count])
        self._position += len(items)
        if items:
            self._arrived(items, 0.0)
        if len(items) < count or self._position >= len(self._values):
            self._ended(None)

    def stop(self, reason: str) -> None:
        """Nothing to close."""
        self._ended(None)


class ThreadSource:
    """Drives a synchronous iterator in a daemon thread of its own (not one of the thread lane's)."""

    def __init__(
        self,
        begin: Callable[[], tuple[Iterator[Any], StageContext | None]],
        arrived: Arrived,
        ended: Ended,
        loop: asyncio.AbstractEventLoop,
        name: str,
    ) -> None:
        self._begin = begin
        self._arrived = arrived
        self._ended = ended
        self._loop = loop
        self._credit = 0
        self._stopped = False
        self._over = False
        self._turn = threading.Condition()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._drive,), name=f"stageflow-source-{name}", daemon=True
        )
        self._thread.start()

    def pull(self, count: int) -> None:
        """Add credit."""
        with self._turn:
            self._credit += count
            self._turn.notify()

    def stop(self, reason: str) -> None:
        """Close the iterator between two items. One that hangs in its `next` is left behind with its daemon thread when
        the scheduler's grace is over."""
        with self._turn:
            self._stopped = True
            self._turn.notify()

    def stack(self) -> str:
        """Where the thread is now."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the loop is closed: the run is over

    def _end(self, error: BaseException | None) -> None:
        if not self._over:
            self._over = True
            self._ended(error)

    def _give(self, items: list[Any], seconds: float) -> None:
        if not self._over:
            self._arrived(items, seconds)

    def _drive(self) -> None:
        iterator: Any = None
        ctx: StageContext | None = None
        error: BaseException | None = None
        try:
            iterator, ctx = self._begin()
            iterator = iter(iterator)
            while self._round(iterator):
                pass
        except BaseException as raised:  # whatever a generator raises is the stage's
            error = raised
        finally:
            try:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
            except BaseException as raised:
                error = error or raised
            finish_context(ctx)
        self._post(self._end, error)

    def _round(self, iterator: Iterator[Any]) -> bool:
        """Wait for credit, then give one chunk; False at the end."""
        with self._turn:
            while self._credit <= 0 and not self._stopped:
                self._turn.wait()
            if self._stopped:
                return False
            credit = self._credit
        items: list[Any] = []
        started = time.perf_counter()
        more = True
        nbytes = 0
        error: BaseException | None = None
        while len(items) < min(credit, CHUNK_ITEMS):
            try:
                item = next(iterator)
            except StopIteration:
                more = False
                break
            except BaseException as raised:  # what it gave before it failed is not lost
                error = raised
                break
            items.append(item)
            nbytes += sized(item)
            if nbytes > CHUNK_BYTES or time.perf_counter() - started > CHUNK_SECONDS:
                break
        with self._turn:
            self._credit -= len(items)
        if items:
            self._post(self._give, items, time.perf_counter() - started)
        if error is not None:
            raise error
        return more and not self._stopped


class TaskSource:
    """Drives an async iterator in one task on the run's loop."""

    def __init__(
        self,
        begin: Callable[[], tuple[Any, StageContext | None]],
        arrived: Arrived,
        ended: Ended,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._begin = begin
        self._arrived = arrived
        self._ended = ended
        self._credit = 0
        self._over = False
        self._wake = asyncio.Event()
        self._task = loop.create_task(self._drive())
        self._task.add_done_callback(self._left)

    def pull(self, count: int) -> None:
        """Add credit."""
        self._credit += count
        self._wake.set()

    def stop(self, reason: str) -> None:
        """Cancel the task; the generator is closed inside it."""
        self._task.cancel(reason)

    def _left(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step never enters `_drive`."""
        if not self._over:
            self._over = True
            self._ended(None)

    async def _drive(self) -> None:
        error: BaseException | None = None
        iterator: Any = None
        ctx: StageContext | None = None
        try:
            iterator, ctx = self._begin()
            step = iterator.__aiter__()
            while True:
                while self._credit <= 0:
                    self._wake.clear()
                    await self._wake.wait()
                if not await self._round(step):
                    break
        except asyncio.CancelledError:
            pass
        except Exception as raised:
            error = raised
        finally:
            try:
                close = getattr(iterator, "aclose", None)
                if close is not None:
                    await close()
            except Exception as raised:
                error = error or raised
            if ctx is not None:
                await finish_context_async(ctx)
            if not self._over:
                self._over = True
                self._ended(error)

    async def _round(self, step: Any) -> bool:
        items: list[Any] = []
        started = time.perf_counter()
        more = True
        while len(items) < min(self._credit, CHUNK_ITEMS):
            try:
                items.append(await step.__anext__())
            except StopAsyncIteration:
                more = False
                break
            except BaseException:
                if items:
                    self._credit -= len(items)
                    self._arrived(items, time.perf_counter() - started)
                raise
            if time.perf_counter() - started > CHUNK_SECONDS:
                break
        self._credit -= len(items)
        if items:
            self._arrived(items, time.perf_counter() - started)
        return more


class InlineSource:
    """Drives a synchronous iterator on the loop itself: the inline lane, in deterministic order."""

    def __init__(
        self,
        begin: Callable[[], tuple[Iterator[Any], StageContext | None]],
        arrived: Arrived,
        ended: Ended,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._begin = begin
        self._iterator: Any = None
        self._ctx: StageContext | None = None
        self._arrived = arrived
        self._ended = ended
        self._over = False

    def pull(self, count: int) -> None:
        """Give up to `count` more, now."""
        if self._over:
            return
        items: list[Any] = []
        started = time.perf_counter()
        error: BaseException | None = None
        more = True
        try:
            if self._iterator is None:
                made, self._ctx = self._begin()
                self._iterator = iter(made)
            items.extend(islice(self._iterator, count))
            more = len(items) == count
        except Exception as raised:
            error, more = raised, False
        if items:
            self._arrived(items, time.perf_counter() - started)
        if not more:
            self._close(error)

    def stop(self, reason: str) -> None:
        """Close the iterator."""
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        if self._over:
            return
        self._over = True
        try:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                close()
        except Exception as raised:
            error = error or raised
        finish_context(self._ctx)
        self._ended(error)
