"""The thread lane: a bounded pool of daemon threads for calls that block and release the GIL.

A thread cannot be killed: a call that does not heed its flag within the grace is *abandoned* - its outcome is
delivered as cancelled,
its thread is replaced, and what it returns later is discarded.

May import `stageflow.core` only.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

from stageflow.core.errors import LaneClosedError
from stageflow.core.executor import Call, Deliver, Outcome
from stageflow_executors.local import LocalLane, LocalPort, parts_of

LOOK_EVERY: Final = 0.02  # seconds between two looks of a call that stands still


class ThreadPort(LocalPort):
    """The port of a call that may stand still behind what it has given."""

    asked: int = 0  # written by the call's thread
    answered: int = 0  # written by the loop's
    standing: bool = False
    _answer: threading.Event | None = None

    def stand(self, stopped: Callable[[], bool]) -> None:
        """Wait for the engine's word, or until `stopped()`, which is looked at every 20 ms."""
        self.asked += 1
        answer = self._answer = self._answer or threading.Event()
        answer.clear()
        while self.answered < self.asked and not stopped():
            answer.wait(LOOK_EVERY)

    def go_on(self) -> None:
        """The engine's word. It may come before the call waits for it."""
        self.answered += 1
        if self._answer is not None:
            self._answer.set()


class _Thread:
    """One thread of the pool, and the call it runs."""

    __slots__ = ("port", "thread", "wake", "work")

    def __init__(self) -> None:
        self.port: LocalPort | None = None
        self.work: tuple[LocalPort, contextvars.Context] | None = None
        self.wake = threading.Lock()
        self.wake.acquire()
        self.thread: threading.Thread | None = None


class ThreadExecutor(LocalLane):
    """At most `max_threads` calls at once, each in a thread of its own; idle threads are reused last in, first out.

    Bound to the loop it is opened on; outcomes reach it by one `call_soon_threadsafe` per batch. Context variables
    are copied into
    each call. `abandoned` lists (call id, stack text) of calls that were left behind.
    """

    def __init__(self, max_threads: int = 32, *, idle_timeout: float = 60.0) -> None:
        super().__init__("thread", max_threads)
        self._idle: list[_Thread] = []
        self._threads: set[_Thread] = set()
        self._queue: deque[tuple[LocalPort, contextvars.Context]] = deque()
        self._lock = threading.Lock()
        self._inbox: list[tuple[LocalPort, Outcome]] = []
        self._notes: list[tuple[int, str, Any]] = []
        self._woken = False
        self._idle_timeout = idle_timeout
        self._spare = 0  # calls that wait for others of this lane: each has a thread on top
        self.abandoned: list[tuple[int, str]] = []

    def start(self, call: Call, deliver: Deliver) -> None:
        """Run `call` in a thread; it waits while all are busy."""
        if self._loop is None:
            raise LaneClosedError("the thread lane is not open", hint="use `async with ThreadExecutor() as lane:`")
        port = ThreadPort("thread", call, deliver, self._note)
        self._ports[call.id] = port
        work = (port, contextvars.copy_context())
        with self._lock:
            if self._idle:
                thread = self._idle.pop()
                thread.work = work
                thread.wake.release()
                return
            if len(self._threads) >= self._slots + self._spare:
                self._queue.append(work)
                return
            thread = _Thread()
            self._threads.add(thread)
        thread.work = work
        thread.thread = threading.Thread(
            target=_serve, args=(weakref.ref(self), thread), name=f"stageflow-thread-{len(self._threads)}", daemon=True
        )
        thread.thread.start()

    def __del__(self) -> None:
        """Dropped without `aclose`: what waits for work ends."""
        for thread in self._idle:
            thread.wake.release()

    def _work(self, me: _Thread) -> float | None:
        """Run what `me` was given, and what is queued. Seconds to wait for more, or None when the thread is to end."""
        while True:
            work, me.work = me.work, None
            if work is not None:
                port, context = work
                me.port = port
                context.run(self._run, port)
                me.port = None
            with self._lock:
                if me not in self._threads:
                    return None  # abandoned: another thread took the place
                if self._queue:
                    me.work = self._queue.popleft()
                    continue
                if self.closed:
                    self._threads.discard(me)
                    return None
                self._idle.append(me)
                return self._idle_timeout

    def _leaves(self, me: _Thread) -> bool:
        """`me` has been idle for long; False when work has arrived in between."""
        with self._lock:
            if me not in self._idle:
                return False
            self._idle.remove(me)
            self._threads.discard(me)
            return True

    def _run(self, port: LocalPort) -> None:
        """One call, in its thread."""
        call = port.call
        if port.cancelled():
            self._post(port, port.cancelled_outcome())
            return
        port.started = started = time.monotonic()
        cpu = time.thread_time()
        try:
            result: Any = call.shipped.function(port, *call.args)
            if inspect.isgenerator(result):
                for reply, ends in parts_of(cast("Any", result)):
                    if ends:
                        result = reply
                    elif reply is not None:
                        self._post(port, port.part(reply))
            outcome = port.ok(result, time.monotonic() - started, time.thread_time() - cpu)
        except BaseException as error:  # SystemExit in a stage is that call's failure, not the thread's end
            outcome = port.failed(error, time.monotonic() - started, time.thread_time() - cpu)
        self._post(port, outcome)

    # ------------------------------------------------------------ back to the loop

    def _post(self, port: LocalPort, outcome: Outcome) -> None:
        with self._lock:
            self._inbox.append((port, outcome))
            if self._woken:
                return
            self._woken = True
        self._wake()

    def _note(self, call_id: int, kind: str, data: Any) -> None:
        with self._lock:
            port = self._ports.get(call_id)
            if port is None:
                return  # abandoned: nobody listens any more
            self._inbox.append((port, Outcome(call_id, meta=(kind, data), final=False, started=-1.0)))
            if self._woken:
                return
            self._woken = True
        self._wake()

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._flush)
            except RuntimeError:
                pass  # the loop is closed: nobody waits for this outcome any more

    def _flush(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
            self._woken = False
        for port, outcome in inbox:
            if port.done:
                continue  # abandoned
            if outcome.started == -1.0:
                if self.on_note is not None:
                    self.on_note(outcome.call_id, *outcome.meta)
                continue
            if outcome.final:
                port.done = True
                self._stands_no_more(port)
                self._ports.pop(port.call.id, None)
            port.deliver(outcome)

    # ------------------------------------------------------------ stopping

    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Set the call's flag; with `force` abandon it: deliver now, replace the thread, discard what it returns."""
        port = self._ports.get(call_id)
        if port is None or port.done:
            return
        port.ask_to_stop(reason)
        queued = False
        with self._lock:
            for work in self._queue:
                if work[0] is port:
                    self._queue.remove(work)
                    queued = True
                    break
        if queued:
            self._post(port, port.cancelled_outcome())
        elif force:
            self._abandon(port)

    def _abandon(self, port: LocalPort) -> None:
        stack = ""
        with self._lock:
            for thread in self._threads:
                if thread.port is port and thread.thread is not None:
                    self._threads.discard(thread)
                    frame = sys._current_frames().get(thread.thread.ident or 0)
                    if frame is not None:
                        stack = "".join(traceback.format_stack(frame))
                    break
            else:
                return  # it ends this very moment; its outcome is on the way
            follow = self._queue.popleft() if self._queue else None
        self.abandoned.append((port.call.id, stack))
        self._ports.pop(port.call.id, None)
        port.done = True
        self._stands_no_more(port)
        if follow is not None:
            self._restart(follow)
        port.deliver(port.cancelled_outcome({"abandoned": True, "stack": stack}))

    def _restart(self, work: tuple[LocalPort, contextvars.Context]) -> None:
        thread = _Thread()
        thread.work = work
        with self._lock:
            self._threads.add(thread)
        thread.thread = threading.Thread(
            target=_serve, args=(weakref.ref(self), thread), name="stageflow-thread", daemon=True
        )
        thread.thread.start()

    def waits(self, call_id: int, waiting: bool) -> None:
        """A running call waits for other calls (or has stopped waiting): another thread may take its place, or calls
        that wait for each other could hold every thread."""
        if not waiting:
            self._spare -= 1
            return
        self._spare += 1
        with self._lock:
            follow = self._queue.popleft() if self._queue else None
        if follow is not None:
            self._restart(follow)

    def stand(self, call_id: int) -> None:
        """A call stands still behind what it has given: another thread may take its place."""
        port = self._ports.get(call_id)
        if isinstance(port, ThreadPort) and not port.standing:
            port.standing = True
            self.waits(call_id, True)

    def go_on(self, call_id: int) -> None:
        """Let it go on."""
        port = self._ports.get(call_id)
        if isinstance(port, ThreadPort):
            self._stands_no_more(port)
            port.go_on()

    def _stands_no_more(self, port: LocalPort) -> None:
        if isinstance(port, ThreadPort) and port.standing:
            port.standing = False
            self.waits(port.call.id, False)

    async def aclose(self, *, grace: float) -> None:
        """Ask every call to stop, wait up to `grace` seconds, abandon the rest; idle threads end."""
        for call_id in list(self._ports):
            self.cancel(call_id, reason="the lane is closing")
        deadline = time.monotonic() + grace
        while self._ports and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        for call_id in list(self._ports):
            self.cancel(call_id, reason="the lane is closing", force=True)
        with self._lock:
            self.closed = True
            idle, self._idle = self._idle, []
            leaving = list(self._threads)  # those that have just delivered end by themselves
            for thread in idle:
                self._threads.discard(thread)
        for thread in idle:
            thread.work = None
            with self._lock:
                thread.wake.release()
        for thread in leaving:
            if thread.thread is not None:
                thread.thread.join(timeout=1.0)
        self._loop = None


def _serve(lane: weakref.ref[ThreadExecutor], me: _Thread) -> None:
    """A thread of a lane, which it does not hold while it is idle: who drops the lane is rid of it."""
    while (one := lane()) is not None:
        seconds = one._work(me)
        one = None
        if seconds is None:
            return
        if not me.wake.acquire(timeout=seconds):
            one = lane()
            if one is None or one._leaves(me):
                return
            one = None
            me.wake.acquire()
