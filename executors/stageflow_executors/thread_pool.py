"""`ThreadPoolExecutor`: the standard's, with threads of our own.

May import this package and the standard library only.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

import msgspec

from stageflow_executors.standard import Future, Mapping, at_exit

_thread_pools = itertools.count()


class _Call(msgspec.Struct, eq=False):
    """One submitted call."""

    future: Future[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ThreadPoolExecutor(Mapping):
    """`concurrent.futures.ThreadPoolExecutor` with last-in-first-out reuse of idle threads, which keeps few of them
    warm.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        thread_name_prefix: str = "",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        if max_workers is None:
            max_workers = min(32, (os.cpu_count() or 1) + 4)
        if max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._max_workers = max_workers
        prefix = thread_name_prefix or f"ThreadPoolExecutor-{next(_thread_pools)}"
        self._pool = _Threads(max_workers, prefix, initializer, initargs)
        self._threads = self._pool.threads
        # Dropped without a shutdown: what was submitted runs, then the threads end.
        weakref.finalize(self, self._pool.stop).atexit = False
        at_exit.executors.add(self)

    @property
    def _broken(self) -> str | None:
        return self._pool.broken

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` in a thread."""
        future: Future[Any] = Future()
        self._pool.add(_Call(future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As the standard's."""
        self._pool.stop(cancel_futures)
        if wait:
            for thread in list(self._threads):
                thread.join()


class _Threads:
    """The threads of one executor and their queue. They hold this and not the executor, which may be dropped."""

    def __init__(
        self, limit: int, prefix: str, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
    ) -> None:
        self.limit = limit
        self.prefix = prefix
        self.initializer = initializer
        self.initargs = initargs
        self.lock = threading.Lock()
        self.work: deque[_Call] = deque()
        self.idle: list[queue.SimpleQueue[_Call | None]] = []
        self.threads: set[threading.Thread] = set()
        self.broken: str | None = None
        self.stopped = False

    def add(self, work: _Call) -> None:
        """Hand `work` to an idle thread or a new one, or let it wait."""
        with self.lock:
            if self.broken is not None:
                raise BrokenThreadPool(self.broken)
            if self.stopped or at_exit.begun:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self.idle:
                self.idle.pop().put(work)
                return
            if len(self.threads) >= self.limit:
                self.work.append(work)
            else:
                mailbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
                mailbox.put(work)  # already its own: a shutdown that cancels what waits does not
                name = f"{self.prefix}_{len(self.threads)}"
                thread = threading.Thread(target=self.serve, args=(mailbox,), name=name, daemon=True)
                self.threads.add(thread)
                at_exit.threads.add(thread)
                thread.start()

    def serve(self, mailbox: queue.SimpleQueue[_Call | None]) -> None:
        """One thread's life; its first call is in `mailbox`."""
        if self.initializer is not None:
            try:
                self.initializer(*self.initargs)
            except BaseException:
                with self.lock:
                    first = mailbox.get()
                    self.work.extend([first] if first is not None else [])
                self.initializer_failed()
                return
        with self.lock:  # until `add`, which starts this thread, has returned: then an idle thread is soon seen as idle
            work = mailbox.get()
        if work is None:
            return
        while True:
            self.run(work)
            work = None
            with self.lock:
                if self.work:
                    work = self.work.popleft()
                elif self.stopped:
                    return
                else:
                    self.idle.append(mailbox)
            if work is None:
                work = mailbox.get()
                if work is None:
                    return

    @staticmethod
    def run(work: _Call) -> None:
        """Run one call and resolve its future."""
        future = work.future
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work.fn(*work.args, **work.kwargs)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def initializer_failed(self) -> None:
        """Refuse every call from now on, and fail those that wait."""
        import logging

        logging.getLogger("concurrent.futures").critical("Exception in initializer:\n%s", traceback.format_exc())
        with self.lock:
            self.broken = "A thread initializer failed, the thread pool is not usable anymore"
            dropped, self.work = list(self.work), deque()
        for work in dropped:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(BrokenThreadPool(self.broken))

    def stop(self, cancel_futures: bool = False) -> None:
        """Take no more; idle threads end, others when no work is left."""
        with self.lock:
            self.stopped = True
            dropped: list[_Call] = []
            if cancel_futures:
                dropped, self.work = list(self.work), deque()
            idle, self.idle = self.idle, []
        for mailbox in idle:
            mailbox.put(None)
        for work in dropped:
            if work.future.cancel():
                work.future.set_running_or_notify_cancel()
