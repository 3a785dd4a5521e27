"""Drop-in executors: `concurrent.futures` on the process lane's workers and shared memory, and on threads of our own.

`ProcessPoolExecutor` runs the lane on a private loop in a thread of its own. Submitting threads put calls into a
deque and wake that thread once per batch; short calls of one function travel many at a time. A lost worker costs the
one future it concerns: its error is a `WorkerDiedError` and a `BrokenProcessPool`; the pool goes on.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing.process
import operator
import pickle
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

import msgspec

from stageflow.core.errors import NotShippableError, WorkerDiedError
from stageflow.core.executor import Call, Outcome, OutcomeKind, Shipped
from stageflow.core.failure import revive
from stageflow.core.output import ErrorInfo
from stageflow_executors import chunks, light
from stageflow_executors.direct import BRIEF, Direct, Lone, may_part
from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.port import Plain
from stageflow_executors.processes.supply import WorkerSupply
from stageflow_executors.standard import Future, Mapping, at_exit
from stageflow_executors.thread_pool import ThreadPoolExecutor

MAX_CHUNK: Final = 512
CHUNK_SECONDS: Final = 0.001
LEAST_SECONDS: Final = 0.0001  #: work worth a hand-off of its own while another short chunk is under way
__all__ = [
    "AbortedCallError", "BrokenInitializerError", "LostWorkerError", "ProcessPoolExecutor", "ThreadPoolExecutor",
    "UnsendableError",
]  # fmt: skip

_ONES: Final = {list}  #: the types of results that are exact scalars throughout
_of_one: Final = operator.itemgetter(0)


class LostWorkerError(WorkerDiedError, BrokenProcessPool):
    """The worker that ran this call died. Old `except BrokenProcessPool` clauses catch it; the pool is not broken."""


class UnsendableError(NotShippableError, pickle.PicklingError):
    """An argument or a result cannot cross. Old `except PicklingError` clauses catch it."""


class AbortedCallError(BrokenProcessPool):
    """The call was ended by `ProcessPoolExecutor.abort`."""


class BrokenInitializerError(BrokenProcessPool):
    """No worker could be started, or its initializer raised."""


def _invoke(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls what crosses as an argument."""
    return fn(*args, **kwargs)


def _initialize_with_key(key: bytes, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    """In a worker: proxies of the parent's `multiprocessing` managers are answered only with the parent's key."""
    import multiprocessing.process

    multiprocessing.process.current_process().authkey = key
    if initializer is not None:
        initializer(*initargs)


def _is_bound(fn: Any) -> bool:
    """Does `fn` hold an object (a method, a partial, an instance)? It is sent with each call, and not remembered."""
    if isinstance(fn, types.BuiltinFunctionType):
        return not isinstance(fn.__self__, types.ModuleType)
    return not isinstance(fn, type | types.FunctionType)


# A standard library that gives its futures other parts gets its own.
_new_future: Final[Callable[[], Future[Any]]] = light.LightFuture if light.FITS else Future


class _Work(msgspec.Struct, eq=False, gc=False):
    """One submitted call."""

    future: Future[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: chunks.Item | None = None
    aborted: bool = False


class _Function:
    """What is known of one submitted function."""

    __slots__ = ("chunked", "fn", "plain", "seconds")

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        label = getattr(fn, "__qualname__", repr(fn))
        self.chunked = Shipped(chunks.Chunk(fn), label=label)
        self.plain = Shipped(Plain(fn), label=label)
        self.seconds: float | None = None

    def learn(self, seconds: float) -> None:
        """A call took so long."""
        self.seconds = seconds if self.seconds is None else self.seconds * 0.7 + seconds * 0.3


def _resolve(future: Future[Any], info: ErrorInfo) -> None:
    error = revive(info)
    if isinstance(error, WorkerDiedError):
        lost = LostWorkerError(error.message, hint=error.hint, **error.fields)
        lost.__cause__ = error.__cause__
        error = lost
    elif isinstance(error, NotShippableError):
        unsendable = UnsendableError(error.message, hint=error.hint, **error.fields)
        unsendable.__cause__ = error.__cause__
        error = unsendable
    elif info.code == "SF-WORKER-START":
        broken = BrokenInitializerError(str(error))
        broken.__cause__ = error
        error = broken
    future.set_exception(error)


class ProcessPoolExecutor(Mapping):
    """`concurrent.futures.ProcessPoolExecutor`, with workers that may die and arrays that cross without being copied.

    `mp_context` is only asked for its start method: "spawn" starts workers by exec, anything else by our own fork
    server.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        method = mp_context.get_start_method() if mp_context is not None else None
        if mp_context is not None or "multiprocessing.managers" in sys.modules:
            key = bytes(multiprocessing.process.current_process().authkey)
            initializer, initargs = _initialize_with_key, (key, initializer, initargs)
        self._supply = WorkerSupply(
            max_workers,
            start_method="spawn" if method == "spawn" else None,
            max_tasks_per_child=max_tasks_per_child,
            initializer=_dump_initializer(initializer, initargs),
        )
        self._max_workers = self._supply.max_workers
        self._max_tasks_per_child = max_tasks_per_child
        self._lock = threading.Lock()
        self._waiting: deque[_Work] = deque()  # submitted, not yet assigned; appended to by any thread
        self._retry: deque[_Work] = deque()  # were aboard a worker that died; they go first
        self._awake = False
        self._shutdown = False
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lane: ProcessExecutor | None = None
        self._running = 0  # calls given to the lane
        self._short = 0  # of those, chunks that should end within a millisecond
        self._held = False  # a timer looks after calls that wait for more of their kind
        self._ids = itertools.count(1)
        self._calls: dict[int, list[_Work]] = {}  # what the lane has, by call
        self._functions: dict[int, _Function] = {}
        self._finished: asyncio.Event | None = None
        self._direct: Direct | None = None  # while calls come one at a time
        self._lone = Lone()
        self._may_part = may_part(self)
        at_exit.executors.add(self)

    # ------------------------------------------------------------ any thread

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` in a worker."""
        future = _new_future()
        if type(fn) is not types.FunctionType and _is_bound(fn):
            args, fn = (fn, *args), _invoke
        work = _Work(future, fn, args, kwargs)
        direct = self._direct
        if direct is not None and not self._shutdown and not at_exit.begun and direct.submit(self, work):
            return future
        with self._lock:
            if self._shutdown or at_exit.begun:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._broken is not None:
                raise BrokenInitializerError(f"the pool could not be started: {self._broken}")
            self._waiting.append(work)
            if self._awake:
                return future
            if self._thread is None:
                self._start_thread()
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._drain)
            self._awake = True  # behind the waking, which whoever is interrupted here has done twice at worst
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As the standard's: no new calls; pending ones run unless `cancel_futures`. Idempotent, any thread."""
        with self._lock:
            self._shutdown = True
            thread, loop = self._thread, self._loop
            if cancel_futures:
                # As the standard's queue does, free workers have already taken theirs.
                free = max(0, self._max_workers - self._running)
                dropped = list(self._waiting)[free:]
                for _ in dropped:
                    self._waiting.pop()
            else:
                dropped = []
        for work in dropped:
            if work.future.cancel():
                work.future.set_running_or_notify_cancel()
        if loop is not None and thread is not None and thread.is_alive():
            try:
                loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                pass  # it has just ended
            if wait and thread is not threading.current_thread():
                thread.join()
        elif thread is None:
            self._supply.close()

    @property
    def max_workers(self) -> int:
        """How many calls run at once."""
        return self._max_workers

    @property
    def usable(self) -> bool:
        """Does it take calls?"""
        return not self._shutdown and self._broken is None

    def abort(self, futures: Iterable[Future[Any]]) -> None:
        """End these calls and no others: those that wait are cancelled, those that run lose their worker, which is
        replaced, and raise AbortedCallError. Any thread; does not wait."""
        running = {future for future in futures if not future.cancel() and not future.done()}
        if running and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._kill, running)
            except RuntimeError:
                pass  # it has just ended, and with it every call

    def _break(self, error: Exception) -> None:
        """The loop's thread could not begin: every call is told why, those to come as well."""
        with self._lock:
            self._broken = error
            waiting, self._waiting = list(self._waiting), deque()
        for work in waiting:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(BrokenInitializerError(f"the pool could not be started: {error}"))

    # ------------------------------------------------------------ the loop's thread

    def _kill(self, futures: set[Future[Any]]) -> None:
        if self._direct is not None:
            self._direct.reclaim()
        for call_id, batch in list(self._calls.items()):
            concerned = [work for work in batch if work.future in futures]
            for work in concerned:
                work.aborted = True
            if concerned and self._lane is not None:
                self._lane.cancel(call_id, reason="the call was aborted", force=True)
        for work in self._retry:
            work.aborted = work.aborted or work.future in futures

    def _stopped(self, batch: list[_Work]) -> None:
        """The lane ended these calls on demand: those that are not meant run again."""
        for work in batch:
            if work.future.done():
                continue
            if not work.aborted:
                self._retry.append(work)
            else:
                work.future.set_exception(AbortedCallError("the call was aborted"))

    def _start_thread(self) -> None:
        """The lock is held. The thread keeps the executor alive only while calls are in hand."""
        self._loop = _new_loop()
        self._thread = threading.Thread(
            target=_serve, args=([self], self._loop, self._supply), name="stageflow-futures", daemon=True
        )
        at_exit.threads.add(self._thread)
        self._thread.start()

    def _release(self) -> None:
        """Whoever was to end soon has not: what waits may be what it waits for."""
        self._held = False
        self._drain(released=True)

    def _drain(self, *, released: bool = False) -> None:
        """Give the lane what it can take: twice its slots of chunks of short calls, its slots of others."""
        lane = self._lane
        if lane is None or self._finished is None:
            return  # the lane is about to open, and looks then
        if self._direct is not None:
            self._direct.reclaim()
        with self._lock:
            self._awake = False
        work = None
        while self._running < 2 * lane.slots:
            work = self._next()
            if work is None:
                break
            function = self._function(work.fn)
            if self._running >= lane.slots and (function.seconds is None or function.seconds > 0.005):
                self._retry.appendleft(work)
                break
            if self._short and function.seconds is not None and not released:
                # Few short calls wait for the end of a chunk that is under way, and gather fellows meanwhile.
                if function.seconds * (len(self._waiting) + 1) < LEAST_SECONDS:
                    self._retry.appendleft(work)
                    if not self._held and self._loop is not None:
                        self._held = True
                        self._loop.call_later(CHUNK_SECONDS, self._release)
                    break
            self._begin(lane, function, work)
        else:
            work = None
        # What waits now is looked at when a call ends: until then, submitting threads need not wake this one.
        self._awake = work is not None or self._running >= 2 * lane.slots
        if self._shutdown and not self._running and not self._waiting and not self._retry:
            self._finished.set()

    def _next(self) -> _Work | None:
        """The next call that was not cancelled, marked as running."""
        while self._retry:
            work = self._retry.popleft()
            if not work.aborted:
                return work
            self._stopped([work])
        while self._waiting:
            try:
                work = self._waiting.popleft()
            except IndexError:  # a shutdown cleared it
                return None
            if work.future.set_running_or_notify_cancel():
                return work
        return None

    def _function(self, fn: Callable[..., Any]) -> _Function:
        known = self._functions.get(id(fn))
        if known is None or known.fn is not fn:
            if len(self._functions) >= 1000:
                self._functions.pop(next(iter(self._functions)))
            known = self._functions[id(fn)] = _Function(fn)
        return known

    def _begin(self, lane: ProcessExecutor, function: _Function, work: _Work) -> None:
        self._running += 1
        seconds = function.seconds
        if not self._waiting or seconds is None or work.fn is _invoke:
            self._start_one(lane, function, work)
            return
        work.item = chunks.pack(work.args, work.kwargs)
        if work.item is None:
            self._start_one(lane, function, work)
            return
        batch = [work]
        if self._supply.max_tasks_per_child is None:
            each = max(seconds, 1e-7)
            waiting = len(self._waiting)
            share = max(waiting // (2 * lane.slots) + 1, min(int(LEAST_SECONDS / each), waiting // 2))
            limit = min(MAX_CHUNK, int(CHUNK_SECONDS / each), share)
            while len(batch) < limit:
                other = self._next()
                if other is None:
                    break
                if other.fn is not work.fn or (item := chunks.pack(other.args, other.kwargs)) is None:
                    self._retry.append(other)
                    break
                other.item = item
                batch.append(other)
        short = seconds * len(batch) < 0.005
        items = chunks.together([w.item for w in batch])
        call = Call(next(self._ids), function.chunked, (items,), short=short)
        self._calls[call.id] = batch
        self._short += short
        lane.start(call, lambda outcome: self._chunk_ended(function, batch, outcome, short))

    def _start_one(self, lane: ProcessExecutor, function: _Function, work: _Work) -> None:
        short = function.seconds is not None and function.seconds < 0.005
        call = Call(next(self._ids), function.plain, (work.kwargs or None, *work.args), short=short)
        self._calls[call.id] = [work]
        self._short += short
        lane.start(call, lambda outcome: self._one_ended(function, work, outcome, short))

    def _one_ended(self, function: _Function, work: _Work, outcome: Outcome, short: bool) -> None:
        self._short -= short
        self._running -= 1
        del self._calls[outcome.call_id]
        if outcome.kind is OutcomeKind.OK:
            function.learn(outcome.seconds)
            alone = self._may_part and self._lone.saw(not (self._running or self._waiting or self._retry))
            if alone and function.seconds is not None and function.seconds < BRIEF and self._loop and self._lane:
                self._loop.call_soon(self._part, self._lane, function, work.future, outcome.value)
            else:
                self._set_payload(work.future, outcome.value)
        elif outcome.kind is OutcomeKind.CANCELLED or outcome.error is None:
            self._stopped([work])
        elif not work.future.done():
            _resolve(work.future, outcome.error)
        self._drain()

    def _part(self, lane: ProcessExecutor, function: _Function, future: Future[Any], payload: Any) -> None:
        """Calls come one at a time, and the worker is idle: let who submits them talk to it, before the next one is."""
        if self._direct is None and not (self._running or self._waiting or self._retry or self._shutdown):
            lent = lane.part_with(function.plain.key)
            if lent is not None and self._loop is not None:
                self._direct = Direct(self, lane, lent, self._loop)
        self._set_payload(future, payload)

    def direct_ended(self, direct: Direct) -> None:
        """The lane has its worker back."""
        self._direct = None
        self._lone.ended(direct.answers)

    def adopt(self, call_id: int, function: _Function, work: _Work) -> Callable[[Outcome], None]:
        """Take a call into the books that was sent without them; who is to hear of its end."""
        self._running += 1
        self._short += 1
        self._calls[call_id] = [work]
        return lambda outcome: self._one_ended(function, work, outcome, True)

    @staticmethod
    def _set_payload(future: Future[Any], payload: Any) -> None:
        if future.done():
            return  # who waited for it was interrupted when all but the books was done
        try:
            value = payload.load() if payload is not None else None
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(value)

    def _chunk_ended(self, function: _Function, batch: list[_Work], outcome: Outcome, short: bool) -> None:
        """A part of the results, or the end of the chunk."""
        if outcome.kind is OutcomeKind.OK:
            first: int = outcome.meta
            if first < 0:
                self._set_payload(batch[-1 - first].future, outcome.value)
            else:
                self._set_results(batch, first, outcome.value)
            if outcome.final:
                function.learn(outcome.seconds / len(batch))
        elif outcome.kind is OutcomeKind.LOST and outcome.suspect:
            # Results that were done but not yet told died with the worker: those calls run again, as those behind them.
            running = min(int(outcome.meta["progress"][0]), len(batch) - 1) if outcome.meta else 0
            for index, work in enumerate(batch):
                if work.future.done():
                    continue
                if index == running and outcome.error is not None:
                    _resolve(work.future, outcome.error)
                else:
                    self._retry.append(work)
        elif outcome.kind is OutcomeKind.CANCELLED or outcome.error is None:
            self._stopped(batch)
        else:
            self._chunk_failed(batch, outcome.error)
        if outcome.final:
            del self._calls[outcome.call_id]
            self._short -= short
            self._running -= 1
            self._drain()

    def _chunk_failed(self, batch: list[_Work], error: ErrorInfo) -> None:
        """Could not be sent or decoded as a whole: each by itself, so that only the guilty fails."""
        open_ = [work for work in batch if not work.future.done()]
        if len(batch) == 1 or error.code == "SF-WORKER-START":
            for work in open_:
                _resolve(work.future, error)
            return
        lane = self._lane
        assert lane is not None
        for work in open_:
            self._running += 1
            self._start_one(lane, self._function(work.fn), work)

    @staticmethod
    def _set_results(batch: list[_Work], first: int, payload: Any) -> None:
        results = chunks.apart(payload.load()) if payload is not None else ()
        if results and set(map(type, results)) == _ONES:
            light.set_results([work.future for work in batch[first : first + len(results)]], map(_of_one, results))
            return
        for index, result in enumerate(results, first):
            future = batch[index].future
            try:
                succeeded, value = chunks.read(result)
            except BaseException as error:
                future.set_exception(error)
                continue
            if succeeded:
                future.set_result(value)
            else:
                _resolve(future, value)


def _dump_initializer(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> bytes | None:
    if initializer is None:
        return None
    try:
        data = pickle.dumps((initializer, initargs), 5)
        if b"__main__" not in data and all(_importable(part) for part in (initializer, *initargs) if callable(part)):
            return data
    except Exception:
        pass  # cloudpickle may do better
    import cloudpickle

    try:
        by_value: bytes = cloudpickle.dumps((initializer, initargs), 5)
    except Exception as error:
        raise NotShippableError(f"the initializer cannot be sent to workers: {error}") from error
    return by_value


def _importable(function: Callable[..., object]) -> bool:
    from stageflow_executors.processes.shipping import Shipping

    return Shipping().importable(getattr(function, "__module__", None) or "builtins")


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one: a lone call takes two thirds of the time that it takes on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _serve(pool: list[ProcessPoolExecutor], loop: asyncio.AbstractEventLoop, supply: WorkerSupply) -> None:
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(_hold_open(pool, supply))
    finally:
        supply.close()


def _pass_on(call_id: int, kind: str, data: Any) -> None:
    """What a call printed and logged appears here, as from a worker of the standard's pool."""
    if kind == "print":
        stream = sys.stderr if data["stream"] == "stderr" else sys.stdout
        if stream is not None:
            stream.write(data["text"])
            stream.flush()
    elif kind == "log":
        import logging

        logger = logging.getLogger(data["logger"])
        if logger.isEnabledFor(data["level"]):
            text = data["message"] + (f"\n{data['exc_text']}" if data.get("exc_text") else "")
            logger.handle(logger.makeRecord(logger.name, data["level"], "", 0, text, (), None))


async def _hold_open(holder: list[ProcessPoolExecutor], supply: WorkerSupply) -> None:
    """Keep the lane open until the executor in `holder` is shut down, or is dropped and every call has ended."""
    finished = asyncio.Event()
    loop = asyncio.get_running_loop()

    def dropped() -> None:
        try:
            loop.call_soon_threadsafe(finished.set)
        except RuntimeError:
            pass  # it had been shut down

    lane = ProcessExecutor(supply=supply)
    try:
        await lane.open()
    except Exception as error:
        holder.pop()._break(error)
        return
    try:
        pool = holder.pop()
        weakref.finalize(pool, dropped).atexit = False
        pool._finished, pool._lane = finished, lane
        lane.on_note = _pass_on
        pool._drain()
        del pool
        await finished.wait()
    finally:
        await lane.aclose()
