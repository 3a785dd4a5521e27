"""Drives sources: each from its first item to its close by one task, or one thread of its own; suspended where there
is no credit."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Any, Final

from stageflow.context.attempt import finish_context, finish_context_async
from stageflow.context.sizes import sized
from stageflow.context.stage_context import StageContext
from stageflow.core.errors import DefinitionError

CHUNK_SECONDS: Final = 0.002  # items are handed on at least this often
CHUNK_ITEMS: Final = 1024
CHUNK_BYTES: Final = 4 << 20

#: from here on items that another process reads are encoded by the thread that made them
CROSSING_BYTES: Final = 64 << 10
LAID_ITEMS: Final = 1024  # elements of a sequence that are laid out at once while they weigh next to nothing
LAID_BYTES: Final = 64 << 10

#: (items, their bytes, seconds spent in the source, whether the bytes of the pull are spent)
Arrived = Callable[[Any, int, float, bool], None]
#: encodes a list of items for the process lane; None where that is of no use
Encode = Callable[[list[Any], int], Any]
#: (exception or None)
Ended = Callable[[BaseException | None], None]


def past(items: Any, count: int, name: str) -> Any:
    """The items behind the first `count`, which an earlier attempt has given. Raises where there are fewer."""
    return _past_async(items, count, name) if hasattr(items, "__aiter__") else _past(items, count, name)


def _past(items: Any, count: int, name: str) -> Iterator[Any]:
    try:
        given = -1
        for given, item in enumerate(items):
            if given >= count:
                yield item
        _check_replay(given + 1, count, name)
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


async def _past_async(items: Any, count: int, name: str) -> AsyncIterator[Any]:
    try:
        given = 0
        async for item in items:
            given += 1
            if given > count:
                yield item
        _check_replay(given, count, name)
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()


def _check_replay(given: int, count: int, name: str) -> None:
    if given < count:
        raise DefinitionError(
            f"source {name!r} is declared replayable, but gave {given} items after it had given {count}",
            hint="replayable=True is for generators that give the same items again",
        )


class SequenceSource:
    """Lays out a sequence that is already there. No thread, no task: a pull is a slice."""

    def __init__(self, values: Any, arrived: Arrived, ended: Ended, loop: asyncio.AbstractEventLoop) -> None:
        self._values = values
        self._position = 0
        self._arrived = arrived
        self._ended = ended
        self._loop = loop

    def pull(self, count: int, nbytes: int = 0) -> None:
        """Give up to `count` more, or `nbytes` of them. What weighs next to nothing is laid out in longer lists."""
        values, position = self._values, self._position
        most = max(count, LAID_ITEMS)
        items = list(values[position : position + most])
        weight = sized(items)
        if len(items) > count and weight > LAID_BYTES:
            items = items[:count]
            weight = sized(items)
        enough = bool(nbytes) and weight > nbytes
        if enough and len(items) > 1:
            items = items[: max(1, len(items) * nbytes // weight)]
            weight = sized(items)
        self._position += len(items)
        if items:
            self._arrived(items, weight, 0.0, enough)
        if not items or self._position >= len(values):
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
        encode: Encode | None = None,
    ) -> None:
        self._begin = begin
        self._encode = encode
        self._room = 0
        self._items: list[Any] = []  # given by the iterator, not handed on yet
        self._weight = 0
        self._since = 0.0
        self._chunks: list[tuple[Any, int, float, bool]] = []  # encoded in this thread
        self._woken = False
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

    def pull(self, count: int, nbytes: int = 0) -> None:
        """Set the credit: items, and bytes (0 = any)."""
        with self._turn:
            self._credit = count
            self._room = nbytes
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

    def _hand_on(self) -> None:
        """On the loop: take what is there, also while the iterator is inside a long `next`."""
        with self._turn:
            self._woken = False
            chunks, self._chunks = self._chunks, []
            if self._items:
                chunks.append(self._take())
        for chunk in chunks:
            if not self._over:
                self._arrived(*chunk)

    def _take(self) -> tuple[Any, int, float, bool]:
        """The items so far as one chunk. With the lock held."""
        items, self._items = self._items, []
        weight, self._weight = self._weight, 0
        enough = bool(self._room) and weight >= self._room
        self._credit = 0 if enough else self._credit - len(items)
        if self._room:
            self._room = max(1, self._room - weight)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return items, weight, seconds, enough

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
                error = raised if error is None else error
            finish_context(ctx)
        self._post(self._end, error)

    def _is_spent(self) -> bool:
        """Whether the iterator has to wait for the next pull (or was stopped). With the lock held."""
        return self._stopped or len(self._items) >= self._credit or bool(self._room and self._weight >= self._room)

    def _round(self, iterator: Iterator[Any]) -> bool:
        """Wait for credit, then spend it; False at the end."""
        turn = self._turn
        with turn:
            while self._credit <= 0 and not self._stopped:
                turn.wait()
            if self._stopped:
                return False
        self._since = time.perf_counter()
        try:
            while True:
                item = next(iterator)
                nbytes = sized(item)
                with turn:
                    self._items.append(item)
                    self._weight += nbytes
                    item = None
                    wake = not self._woken
                    self._woken = True
                    chunk = self._take() if self._encode is not None and self._weight >= CROSSING_BYTES else None
                    spent = self._is_spent() or bool(chunk and chunk[3])
                if chunk is not None and self._encode is not None:
                    encoded = (self._encode(chunk[0], chunk[1]), *chunk[1:])
                    chunk = None
                    with turn:
                        self._chunks.append(encoded)
                        wake = wake or not self._woken
                        self._woken = True
                if wake:
                    self._post(self._hand_on)
                if spent:
                    break
        except StopIteration:
            return False
        finally:
            if self._items or self._chunks:
                self._post(self._hand_on)
        with turn:
            if self._items and (len(self._items) >= self._credit or (self._room and self._weight >= self._room)):
                self._chunks.append(self._take())
        return not self._stopped


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
        self._room = 0
        self._over = False
        self._items: list[Any] = []
        self._weight = 0
        self._since = 0.0
        self._loop = loop
        self._wake = asyncio.Event()
        self._task = loop.create_task(self._drive())
        self._task.add_done_callback(self._left)

    def pull(self, count: int, nbytes: int = 0) -> None:
        """Set the credit: items, and bytes (0 = any)."""
        self._credit = count
        self._room = nbytes
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
        except BaseException as raised:  # a task that raised a SystemExit would end the loop
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
        self._since = time.perf_counter()
        try:
            while len(self._items) < min(self._credit, CHUNK_ITEMS):
                item = await step.__anext__()
                if not self._items:
                    self._loop.call_soon(self._hand_on)  # while the next one is awaited
                self._items.append(item)
                self._weight += sized(item)
                item = None
                if time.perf_counter() - self._since > CHUNK_SECONDS or self._weight > CHUNK_BYTES:
                    break
                if self._room and self._weight >= self._room:
                    break
        except StopAsyncIteration:
            return False
        finally:  # what it gave before it failed is not lost
            self._hand_on()
        return True

    def _hand_on(self) -> None:
        items, self._items = self._items, []
        if not items:
            return
        weight, self._weight = self._weight, 0
        enough = bool(self._room) and weight >= self._room
        self._credit = 0 if enough else self._credit - len(items)
        if self._room:
            self._room = max(1, self._room - weight)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._arrived(items, weight, seconds, enough)


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

    def pull(self, count: int, nbytes: int = 0) -> None:
        """Give up to `count` more, now, or `nbytes` of them (0 = any)."""
        if self._over:
            return
        items: list[Any] = []
        weight = 0
        started = time.perf_counter()
        error: BaseException | None = None
        more = True
        try:
            if self._iterator is None:
                made, self._ctx = self._begin()
                self._iterator = iter(made)
            more = False
            for item in islice(self._iterator, count):
                items.append(item)
                weight += sized(item)
                if nbytes and weight >= nbytes:
                    break
            more = len(items) == count or bool(nbytes and weight >= nbytes)
        except BaseException as raised:  # a SystemExit of the source is its failure, not the scheduler's
            error, more = raised, False
        if items:
            self._arrived(items, weight, time.perf_counter() - started, bool(nbytes and weight >= nbytes))
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
