"""`ProcessExecutor`: the process lane on one running loop. It assigns calls to borrowed workers and hears how they
ended.

The parent assigns, over one private socket per worker, so it always knows who has what; a dead worker can block
nobody. Its sockets are watched with the loop's own `add_reader`: no reader thread.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from stageflow.core.errors import LaneClosedError, StageflowError
from stageflow.core.executor import Call, Deliver, Outcome, OutcomeKind, Shipped
from stageflow.core.failure import capture, revive
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes import status
from stageflow_executors.processes.hearing import CAUSE_WITHIN, Hearing
from stageflow_executors.processes.machine import usable_cores
from stageflow_executors.processes.payload import encode
from stageflow_executors.processes.port import Plain
from stageflow_executors.processes.state import Task
from stageflow_executors.processes.supply import WorkerSupply

SHORT_NS: Final = 5_000_000  #: a function of `submit` that takes less is sent ahead of need


class ProcessExecutor(Hearing):
    """Runs calls in worker processes. Bound to the loop it is opened on; `encode` is thread-safe, the rest is not.

    `supply` shares workers with other lanes; without it the lane has its own and closes it.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        supply: WorkerSupply | None = None,
        start_method: str | None = None,
        preload: Sequence[str] = (),
        poison_limit: int = 3,
        worker_memory_limit: int | None = None,
        max_tasks_per_child: int | None = None,
        grace: float = 5.0,
        inline_threshold: int = 65536,
        idle_timeout: float | None = 60.0,
        memory_limit: int | None = None,
    ) -> None:
        self._owns_supply = supply is None
        supply = supply or WorkerSupply(
            max_workers,
            start_method=start_method,
            preload=preload,
            idle_timeout=idle_timeout,
            inline_threshold=inline_threshold,
            memory_limit=memory_limit,
            worker_memory_limit=worker_memory_limit,
            max_tasks_per_child=max_tasks_per_child,
        )
        super().__init__(supply, max_workers=max_workers, poison_limit=poison_limit, grace=grace)

    @property
    def slots(self) -> int:
        """How many calls run at once."""
        return self._slots

    async def open(self) -> None:
        """Bind to the running loop. Workers start when the first call needs them; the fork server comes up
        meanwhile."""
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._cores = usable_cores()
        self.supply.prestart()
        if self not in self.supply.lanes:
            self.supply.lanes.append(self)
        self._watch_control()

    def encode(self, value: Any) -> Any:
        """`value` as a Payload that several calls can share. Thread-safe. Raises what encoding raises."""
        return encode(self.supply, self._memory, value)

    def start(self, call: Call, deliver: Deliver) -> None:
        """Run `call`; `deliver` hears of it later, on this loop."""
        task = Task(call, deliver, call.short and not call.alone, call.alone)
        loop = self._loop
        if loop is None or self._closed:
            raise LaneClosedError("the process lane is not open", hint="use it inside `async with`")
        if call.id in self._tasks:
            raise StageflowError(f"call id {call.id} is already in use")
        self._tasks[call.id] = task
        if call.apart:
            self._stands_apart(task)
        try:
            self._prepare(task)
        except Exception as error:
            info = capture(error, lane=self.lane)
            loop.call_soon(self._finish, task, Outcome(call.id, OutcomeKind.REFUSED, error=info))
            return
        if not self._queue and self._send_at_once(task):
            return
        self._queue.append(task)
        if self._idle or (len(self._lent) < self._slots + self._standing and not self._asked):
            self._dispatch()
        elif task.short and not self._looks_later:
            # no worker is without work: what else comes in this turn of the loop may share its frame
            self._looks_later = True
            loop.call_soon(self._look)

    def _look(self) -> None:
        self._looks_later = False
        if self._queue and not self._closed:
            self._dispatch()

    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Take the call out of the queue, or tell it, or with `force` kill the worker that runs it."""
        task = self._tasks.get(call_id)
        if task is None:
            return
        task.cancelled = reason
        lent = task.worker
        if lent is None:
            self._cancel_queued(task)
            return
        lent.handle.page.request_cancel(call_id, reason)
        running, _, _ = lent.handle.page.running()
        if running != call_id and lent.handle.channel.can_take_back:
            self._take_back(lent)
            if not lent.tasks and lent.death is None:
                self._became_idle(lent)  # it has nothing left to report, so nothing else would tell
            if task.worker is None:
                self._cancel_queued(task)
                self._dispatch()
                return
        if force:
            task.forced = True
            self._force(task)

    def stand(self, call_id: int) -> None:
        """The call stands still in its worker: there may be another worker meanwhile."""
        task = self._tasks.get(call_id)
        if task is None or task.worker is None or task.standing:
            return
        self._stands_apart(task)
        self._dispatch()

    def _stands_apart(self, task: Task) -> None:
        """The worker of this call is not counted: there may be another."""
        task.standing, task.short = True, False  # nothing is sent ahead to its worker
        self._standing += 1
        self.supply.stands(1)
        if self._asked:
            self._asked = False
            self.supply.withdraw(self)

    def go_on(self, call_id: int, more: tuple[int, int] | None = None) -> None:
        """Let it go on; what is free in its arena is told along, and how much `more` it may give, if it is told so."""
        task = self._tasks.get(call_id)
        if task is None or task.worker is None:
            return
        if task.standing and not task.call.apart:
            self._stands_no_more(task)
        messages, fds = self._controls(task.worker)
        messages.append(ch.encode_message([ch.GO_ON, call_id, more]))
        self._send(task.worker, messages, fds)

    def running_since(self, call_id: int) -> float | None:
        """Monotonic second at which the call's function was entered; None while it is queued or being decoded."""
        task = self._tasks.get(call_id)
        if task is None or task.worker is None:
            return None
        running, phase, started = task.worker.handle.page.running()
        return started / 1e9 if running == call_id and phase >= status.RUN else None

    def progress_of(self, call_id: int) -> tuple[float, float] | None:
        """What `WorkerPort.progress` last said."""
        task = self._tasks.get(call_id)
        if task is None or task.worker is None:
            return None
        running, phase, _ = task.worker.handle.page.running()
        return task.worker.handle.page.progress() if running == call_id and phase >= status.RUN else None

    def running_in(self) -> list[tuple[int, int]]:
        """(call id, worker pid) of the calls that are inside their function now."""
        found = []
        for lent in self._lent.values():
            running, phase, _ = lent.handle.page.running()
            if phase >= status.RUN and running in self._tasks:
                found.append((running, lent.handle.pid))
        return found

    async def aclose(self, *, grace: float | None = None) -> None:
        """Stop everything within `grace` seconds, then by force; every call gets its outcome first. Idempotent."""
        loop = self._loop
        if loop is None or self._closed:
            return
        for lent in list(self._lent.values()):
            if lent.apart is not None:
                lent.apart()
        deadline = loop.time() + (self.grace if grace is None else grace)
        for task in list(self._tasks.values()):
            self.cancel(task.call.id, reason="the lane is closing")
        await self._until_idle(deadline - loop.time())
        for task in list(self._tasks.values()):
            self.cancel(task.call.id, reason="the lane is closing", force=True)
        await self._until_idle(CAUSE_WITHIN + 4.0)
        self._closed = True
        info = capture(LaneClosedError("the process lane was closed"), lane=self.lane)
        for task in list(self._tasks.values()):
            self._finish(task, Outcome(task.call.id, OutcomeKind.CANCELLED, error=info))
        self.supply.withdraw(self)
        for lent in list(self._lent.values()):
            self._release_worker(lent)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._unwatch_control()
        if self in self.supply.lanes:
            self.supply.lanes.remove(self)
        if self._owns_supply:
            await loop.run_in_executor(None, self.supply.close)
        self._loop = None

    async def _until_idle(self, seconds: float) -> None:
        loop = self._loop
        if not self._tasks or loop is None:
            return
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(waiter, max(0.0, seconds))

    async def __aenter__(self) -> ProcessExecutor:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Run `fn(*args, **kwargs)` in a worker. Cancelling the future asks the call to stop, and after `grace`
        kills it.
        """
        loop = self._loop
        if loop is None:
            raise LaneClosedError("the process lane is not open", hint="use it inside `async with`")
        self._ids -= 1
        call_id = -self._ids | 1 << 48
        future: asyncio.Future[Any] = loop.create_future()
        shipped = self._shipped(fn)
        short = self._ewma_ns.get(shipped.key, SHORT_NS) < SHORT_NS
        call = Call(call_id, shipped, (kwargs, *args) if kwargs else (None, *args), short=short)

        def done(outcome: Outcome) -> None:
            if not outcome.final or future.done():
                return
            if outcome.kind is OutcomeKind.OK:
                try:
                    future.set_result(outcome.value.load() if outcome.value is not None else None)
                except BaseException as error:
                    future.set_exception(error)
            elif outcome.kind is OutcomeKind.CANCELLED or outcome.error is None:
                future.cancel()
            else:
                revived = revive(outcome.error)
                # A future refuses StopIteration: it would end the generator that awaits it.
                future.set_exception(RuntimeError(repr(revived)) if isinstance(revived, StopIteration) else revived)

        def dropped(_: asyncio.Future[Any]) -> None:
            if future.cancelled() and call_id in self._tasks:
                self.cancel(call_id, reason="the future was cancelled")
                if call_id in self._tasks:
                    loop.call_later(
                        self.grace, lambda: self.cancel(call_id, reason="the future was cancelled", force=True)
                    )

        future.add_done_callback(dropped)
        self.start(call, done)
        return future

    def _shipped(self, fn: Callable[..., Any]) -> Shipped:
        known = self._shipped_for.get(id(fn))
        if known is not None and known[1] is fn:
            return known[0]
        if len(self._shipped_for) >= 1000:  # lambdas made in a loop
            self._shipped_for.pop(next(iter(self._shipped_for)))
        shipped = Shipped(Plain(fn), label=getattr(fn, "__qualname__", repr(fn)))
        self._shipped_for[id(fn)] = (shipped, fn)
        return shipped

    def _cancel_queued(self, task: Task) -> None:
        if task in self._queue:
            self._queue.remove(task)
        if self._loop is not None:
            info = None
            self._loop.call_soon(self._finish, task, Outcome(task.call.id, OutcomeKind.CANCELLED, error=info))

    def _force(self, task: Task) -> None:
        """Kill the worker as soon as it is seen to run `task`. One that has not begun will not begin: the page says
        so."""
        lent = task.worker
        if lent is None or task.call.id not in self._tasks or self._loop is None or lent.handle.killed:
            return
        running, _, _ = lent.handle.page.running()
        if running == task.call.id:
            lent.handle.kill()
        else:
            self._loop.call_later(0.02, self._force, task)
