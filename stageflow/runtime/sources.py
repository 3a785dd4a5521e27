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

CROSSING_BYTES: Final = 256 << 10  # the same for items that another process reads: each list is decoded as a whole
LAID_ITEMS: Final = 1024  # elements of a sequence that are laid out at once while they weigh next to nothing
LAID_BYTES: Final = 64 << 10

#: (items, their bytes, seconds spent in the source, whether the bytes of the pull are spent)
Arrived = Callable[[Any, int, float, bool], None]
#: encodes a list of items for the process lane; None where that is of no use
Encode = Callable[[list[Any], int], Any]
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
    kind = type(value)
    if kind in _PLAIN:
        return 32
    fields = getattr(kind, "__struct_fields__", None)
    if fields is not None:
        return 48 + sum(sized(getattr(value, name, None)) for name in fields[:16])
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and not isinstance(value, type):
        return 64 + sum(_flat(one) for one in islice(held.values(), 16))
    return 64


def _flat(value: Any) -> int:
    """`sized` one level deep: objects may refer to each other in circles."""
    if isinstance(value, list | tuple | set | frozenset | dict):
        return 56 + 32 * len(value)
    return sized(value) if not hasattr(value, "__dict__") else 64


_PLAIN: Final = frozenset((int, float, bool, complex, type(None)))


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

    def _give(self, items: Any, nbytes: int, seconds: float, enough: bool) -> None:
        if not self._over:
            self._arrived(items, nbytes, seconds, enough)

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
                if error is None:
                    error = raised
            finish_context(ctx)
        self._post(self._end, error)

    def _round(self, iterator: Iterator[Any]) -> bool:
        """Wait for credit, then give one chunk; False at the end."""
        with self._turn:
            while self._credit <= 0 and not self._stopped:
                self._turn.wait()
            if self._stopped:
                return False
            credit, room = self._credit, self._room
        items: list[Any] = []
        started = time.perf_counter()
        more = True
        nbytes = 0
        most = CROSSING_BYTES if self._encode is not None else CHUNK_BYTES
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
            item = None
            if self._stopped or nbytes > most or (room and nbytes >= room):
                break
            if time.perf_counter() - started > CHUNK_SECONDS:
                break
        seconds = time.perf_counter() - started
        enough = bool(room) and nbytes >= room
        count = len(items)
        given: Any = items
        if self._encode is not None and count:
            given = self._encode(items, nbytes)
            items = []
        with self._turn:
            self._credit = 0 if enough else self._credit - count
            if room:
                self._room = max(1, room - nbytes)
        if count:
            self._post(self._give, given, nbytes, seconds, enough)
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
        self._room = 0
        self._over = False
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
        nbytes = 0
        try:
            while len(items) < min(self._credit, CHUNK_ITEMS):
                item = await step.__anext__()
                items.append(item)
                nbytes += sized(item)
                item = None
                if time.perf_counter() - started > CHUNK_SECONDS or nbytes > CHUNK_BYTES:
                    break
                if self._room and nbytes >= self._room:
                    break
        except StopAsyncIteration:
            self._hand_on(items, nbytes, started)
            return False
        except BaseException:  # what it gave before it failed is not lost
            self._hand_on(items, nbytes, started)
            raise
        self._hand_on(items, nbytes, started)
        return True

    def _hand_on(self, items: list[Any], nbytes: int, started: float) -> None:
        if not items:
            return
        enough = bool(self._room) and nbytes >= self._room
        self._credit = 0 if enough else self._credit - len(items)
        if self._room:
            self._room = max(1, self._room - nbytes)
        self._arrived(items, nbytes, time.perf_counter() - started, enough)


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
        except Exception as raised:
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
