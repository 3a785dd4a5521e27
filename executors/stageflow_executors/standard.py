"""What both drop-in executors have in common: `map`, and their end with the interpreter's.

May import the standard library only.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Future = concurrent.futures.Future


class Mapping(concurrent.futures.Executor):
    """`map` with a bounded buffer, which the standard has from 3.14 on."""

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """As the standard's. `buffersize` bounds how many results may wait; chunks are made by themselves."""
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end = None if timeout is None else timeout + time.monotonic()
        calls = zip(*iterables, strict=False)
        first = calls if buffersize is None else itertools.islice(calls, buffersize)
        futures = deque(self.submit(fn, *args) for args in first)
        # An executor that is dropped must not live on in an iterator that needs no more of it.
        more = None if buffersize is None else (self.submit(fn, *args) for args in calls)
        return _results(futures, more, end)


def _results(futures: deque[Future[Any]], more: Iterator[Future[Any]] | None, end: float | None) -> Iterator[Any]:
    def take() -> Any:
        future = futures.popleft()
        try:
            value = future.result(None if end is None else end - time.monotonic())
        except BaseException:
            future.cancel()
            raise
        finally:
            del future
        if more is not None:
            futures.extend(itertools.islice(more, 1))
        return value

    try:
        while futures:
            yield take()  # no name here holds the result: it may be big
    finally:
        for future in futures:
            future.cancel()


class _Exit:
    """At interpreter exit pending calls run to their end, as with the standard executors; no new ones are taken."""

    def __init__(self) -> None:
        self.begun = False
        self.executors: weakref.WeakSet[concurrent.futures.Executor] = weakref.WeakSet()
        self.threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # also of executors that were dropped

    def finish(self) -> None:
        """Runs before the interpreter joins its threads and forbids new ones, as in concurrent.futures."""
        self.begun = True
        for executor in list(self.executors):
            executor.shutdown(wait=True)
        for thread in list(self.threads):
            thread.join()


at_exit = _Exit()
threading._register_atexit(at_exit.finish)  # type: ignore[attr-defined]
