"""The async lane: calls run as tasks on the caller's loop. And the inline lane: one call after the other, in order,
for debugging.

May import `stageflow.core` only.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from collections import deque
from functools import partial
from types import CoroutineType, GeneratorType
from typing import Any, Final

from stageflow.core.errors import LaneClosedError
from stageflow.core.executor import Call, Deliver, Outcome, OutcomeKind, Reply
from stageflow.core.worker import stops_item
from stageflow_executors import local
from stageflow_executors.local import LocalLane, LocalPort, parts_of

_monotonic = time.monotonic
_OK: Final = OutcomeKind.OK
_Task: Final = asyncio.Task  # a task factory breaks uvloop; constructing the task does not
_EAGER: Final = sys.version_info >= (3, 12)


class AsyncPort(LocalPort):
    """The port of a call on the loop: it may tell of parts, and stand still behind them."""

    owner: Any = None
    asked: int = 0
    answered: int = 0
    answer: asyncio.Future[None] | None = None

    async def tell(self, reply: Reply) -> None:
        """Deliver a part; behind one that asks, wait for the engine's word. Others give the loop its turn."""
        if not self.done:
            self.owner._deliver(self, self.part(reply))
        if not reply.asks:
            await asyncio.sleep(0)
            return
        self.asked += 1
        if self.answered < self.asked:
            self.answer = asyncio.get_running_loop().create_future()
            try:
                await self.answer
            finally:
                self.answer = None

    def go_on(self) -> None:
        """The engine's word."""
        self.answered += 1
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(None)


class AsyncExecutor(LocalLane):
    """Runs each call as a task on the loop it is opened on. A function that returns no awaitable is called inline.

    Where Python allows it (3.12), a call that never waits is finished inside `start`. Context variables are copied
    into the task.
    `cancel` cancels the task; `force` delivers the outcome at once and leaves a task behind that swallows its
    cancellation.
    """

    def __init__(self, max_tasks: int = 1024) -> None:
        super().__init__("async", max_tasks)
        self._starting: LocalPort | None = None  # the call whose first step is taken inside `start`

    def start(self, call: Call, deliver: Deliver) -> None:
        """Run `call` as a task."""
        loop = self._loop
        if loop is None:
            raise LaneClosedError("the async lane is not open", hint="use `async with AsyncExecutor() as lane:`")
        self._ports[call.id] = port = AsyncPort("async", call, deliver, self.on_note, owner=self)
        coroutine = self._run(port)
        if _EAGER:
            self._starting = port
            try:
                port.task = _Task(  # type: ignore[call-arg, unused-ignore]
                    coroutine, loop=loop, name=call.shipped.label, eager_start=True
                )
            finally:
                self._starting = None
        else:
            # not by `create_task`: a task that is given a name need not make one up
            port.task = _Task(coroutine, loop=loop, name=call.shipped.label)

    async def _run(self, port: LocalPort) -> None:
        call = port.call
        port.started = started = _monotonic()
        try:
            args = call.args
            result = call.shipped.function(port, *args) if args else call.shipped.function(port)
            kind = type(result)
            if kind is CoroutineType or (kind is not Reply and inspect.isawaitable(result)):
                result = await result
                kind = type(result)
            if kind is GeneratorType:
                result = self._parts(port, result)
                kind = type(result)
            seconds = _monotonic() - started
            if kind is Reply:
                outcome = port.ok(result, seconds)
            else:  # the same, spelled out
                pid = local.process_id
                outcome = Outcome(call.id, _OK, result, None, True, None, None, False, pid, started, seconds)
        except BaseException as error:
            outcome = port.failed(error, _monotonic() - started)
        self._ports.pop(call.id, None)
        if not port.done:
            port.done = True
            if self._starting is None:
                port.deliver(outcome)
            else:
                self._deliver(port, outcome)

    def stand(self, call_id: int) -> None:
        """A call stands still: on a loop that takes nothing from the others."""

    def go_on(self, call_id: int) -> None:
        """Let it go on."""
        port = self._ports.get(call_id)
        if isinstance(port, AsyncPort):
            port.go_on()

    def _deliver(self, port: LocalPort, outcome: Outcome) -> None:
        """Hand an outcome on, but never from inside `start`."""
        if self._starting is port and self._loop is not None:
            self._loop.call_soon(port.deliver, outcome)
        else:
            port.deliver(outcome)

    def _parts(self, port: LocalPort, replies: Any) -> Any:
        """Deliver all but the last part; the last is the call's result."""
        last: Any = None
        for reply, ends in parts_of(replies):
            if ends:
                last = reply
            elif reply is not None and not port.done:
                self._deliver(port, port.part(reply))
        return last

    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Cancel the call's task."""
        port = self._ports.get(call_id)
        if port is None:
            return
        port.ask_to_stop(reason)
        if stops_item(reason) and port.started:
            return  # the block itself ends its item
        if port.task is not None:
            port.task.cancel(reason)
        if not port.started and not port.done:
            # a task that is cancelled before its first step never enters its coroutine
            port.done = True
            self._ports.pop(call_id, None)
            port.deliver(port.cancelled_outcome())
        elif force and not port.done:
            port.done = True
            port.deliver(port.cancelled_outcome({"abandoned": True}))

    async def aclose(self, *, grace: float) -> None:
        """Cancel what runs and wait up to `grace` seconds for it."""
        self.closed = True
        for call_id in list(self._ports):
            self.cancel(call_id, reason="the lane is closing")
        tasks = [port.task for port in self._ports.values() if port.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        for call_id in list(self._ports):
            self.cancel(call_id, reason="the lane is closing", force=True)
        self._loop = None


def _end(port: LocalPort, task: asyncio.Future[Any]) -> None:
    """Cancel what a call waits for, unless only an item of it is meant: its block sees to that."""
    if not stops_item(port.cancel_reason()):
        task.cancel()


def _is_cancelled(task: asyncio.Task[Any] | None) -> bool:
    """Whether somebody wants the task itself to end, rather than what it waits for."""
    return task is not None and task.cancelling() > 0


async def _settled(result: Any) -> tuple[Any, SystemExit | None]:
    """Value, or a SystemExit as a value: a task that raised it would end the loop, not the call."""
    try:
        return await result, None
    except SystemExit as error:
        return None, error


class InlineExecutor(LocalLane):
    """Runs one call after the other in the loop's own thread, in the order of `start`: the reference for every other
    lane."""

    def __init__(self) -> None:
        super().__init__("inline", 1)
        self._queue: deque[LocalPort] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._nested: set[asyncio.Task[None]] = set()  # go on while a call waits for calls behind it

    def start(self, call: Call, deliver: Deliver) -> None:
        """Queue `call`."""
        if self._loop is None:
            raise LaneClosedError("the inline lane is not open", hint="use `async with InlineExecutor() as lane:`")
        port = LocalPort("inline", call, deliver, self.on_note)
        self._ports[call.id] = port
        self._queue.append(port)
        if self._worker is None:
            self._worker = self._loop.create_task(self._work())

    async def _work(self) -> None:
        while self._queue:
            port = self._queue.popleft()
            if port.done:
                continue
            call = port.call
            if port.cancelled():
                self._end(port, port.cancelled_outcome())
                continue
            port.started = started = time.monotonic()
            try:
                result: Any = call.shipped.function(port, *call.args)
                if inspect.isawaitable(result):
                    inner = asyncio.ensure_future(_settled(result))
                    port.on_cancel(partial(_end, port, inner))
                    try:
                        settled = await inner
                    finally:
                        if inner.cancelled() and type(result) is CoroutineType:
                            result.close()  # cancelled before its first step, it was never entered
                    if settled[1] is not None:
                        raise settled[1]
                    result = settled[0]
                if inspect.isgenerator(result):
                    parts: Any = result
                    for reply, ends in parts_of(parts):
                        if ends:
                            result = reply
                        elif reply is not None:
                            port.deliver(port.part(reply))
                            await asyncio.sleep(0)
                outcome = port.ok(result, time.monotonic() - started)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and _is_cancelled(asyncio.current_task()):
                    self._end(port, port.cancelled_outcome())
                    raise
                outcome = port.failed(error, time.monotonic() - started)
            self._end(port, outcome)
            await asyncio.sleep(0)
        if asyncio.current_task() is self._worker:
            self._worker = None

    def waits(self, call_id: int, waiting: bool) -> None:
        """A running call waits for calls behind it (or has stopped waiting): they run meanwhile."""
        if waiting and self._loop is not None:
            self._worker = self._loop.create_task(self._work())
            self._nested.add(self._worker)
            self._worker.add_done_callback(self._nested.discard)

    def _end(self, port: LocalPort, outcome: Any) -> None:
        self._ports.pop(port.call.id, None)
        if not port.done:
            port.done = True
            port.deliver(outcome)

    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Set the flag of a running call; end one that is still queued."""
        port = self._ports.get(call_id)
        if port is None:
            return
        port.ask_to_stop(reason)
        if force or not port.started:
            self._end(port, port.cancelled_outcome({"abandoned": True} if port.started else None))

    async def aclose(self, *, grace: float) -> None:
        """End what is queued; wait up to `grace` seconds for what runs."""
        self.closed = True
        for call_id in list(self._ports):
            self.cancel(call_id, reason="the lane is closing")
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=grace)
            if self._worker is not None:
                self._worker.cancel()
        self._loop = None
