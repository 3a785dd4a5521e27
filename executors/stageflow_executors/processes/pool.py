"""`ProcessExecutor`: the process lane on one running loop. It assigns calls to borrowed workers and hears how they ended.

The parent assigns, over one private socket per worker, so it always knows who has what; a dead worker can block nobody. Its
sockets are watched with the loop's own `add_reader`: no reader thread.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from stageflow.core.errors import (
    LaneClosedError,
    StageflowError,
    WorkerStartError,
)
from stageflow.core.executor import Call, Deliver, Noted, Outcome, OutcomeKind, Shipped
from stageflow.core.failure import capture, revive
from stageflow.core.output import ErrorInfo
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes import status
from stageflow_executors.processes.death import describe
from stageflow_executors.processes.payload import ParentMemory, ProcessPayload, encode
from stageflow_executors.processes.port import Plain
from stageflow_executors.processes.supply import WorkerHandle, WorkerSupply
from stageflow_executors.shm import codec
from stageflow_executors.shm.lease import ValueReader

CAUSE_WITHIN: Final = 1.0  #: seconds to wait for the fork server's word on why a worker died
GIVE_BACK_AFTER: Final = 0.05
START_WITHIN: Final = 60.0
BATCH_NS: Final = 1_000_000  #: work per frame of short calls
MAX_BATCH: Final = 64
SHORT_NS: Final = 5_000_000  #: a function of `submit` that takes less is sent ahead of need
_WORDS: Final = frozenset((type(None), bool, float))
_I64: Final = 1 << 63
_decode_error = msgspec.msgpack.Decoder(ErrorInfo).decode


class _Task:
    """One call from `start` to its final outcome."""

    __slots__ = (
        "alone", "args", "boarded", "bytes_in", "call", "cancelled", "data", "deliver", "forced", "frame",
        "payloads", "short", "size", "worker",
    )  # fmt: skip

    def __init__(self, call: Call, deliver: Deliver) -> None:
        self.call = call
        self.deliver = deliver
        self.short = call.short and not call.alone
        self.alone = call.alone
        self.payloads: list[ProcessPayload] = []
        self.data = b""  # the encoded message
        self.bytes_in = 0
        self.boarded = 0  # workers that died with it aboard
        self.worker: _Lent | None = None
        self.frame = 0
        self.cancelled: str | None = None
        self.forced = False


class _Lent:
    """A worker while this lane has it."""

    __slots__ = ("death", "frames", "handle", "next_frame", "outbox", "start_timer", "tasks", "writing")

    def __init__(self, handle: WorkerHandle) -> None:
        self.handle = handle
        self.tasks: dict[int, _Task] = {}  # in the order sent
        self.frames = 0  # task frames not yet answered in full
        self.next_frame = 0
        self.outbox: deque[tuple[bytes, list[int]]] = deque()
        self.writing = False
        self.start_timer: asyncio.TimerHandle | None = None
        self.death: asyncio.TimerHandle | None = None


class ProcessExecutor:
    """Runs calls in worker processes. Bound to the loop it is opened on; `encode` is thread-safe, the rest is not.

    `supply` shares workers with other lanes; without it the lane has its own and closes it.
    """

    lane: Final = "process"

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
        self.supply = supply or WorkerSupply(
            max_workers,
            start_method=start_method,
            preload=preload,
            idle_timeout=idle_timeout,
            inline_threshold=inline_threshold,
            memory_limit=memory_limit,
            worker_memory_limit=worker_memory_limit,
            max_tasks_per_child=max_tasks_per_child,
        )
        self._slots = min(max_workers or self.supply.max_workers, self.supply.max_workers)
        self.poison_limit = poison_limit
        self.grace = grace
        #: called with (call id, kind, data) for every note of a call
        self.on_note: Noted | None = None
        #: called with ("worker.started" | "worker.lost" | "worker.recycled", fields)
        self.on_worker_event: Callable[[str, dict[str, Any]], None] | None = None
        self._memory = ParentMemory(self.supply)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[int, _Task] = {}
        self._queue: deque[_Task] = deque()
        self._lent: dict[int, _Lent] = {}
        self._idle: list[_Lent] = []
        self._idle_timer: asyncio.TimerHandle | None = None
        self._watching = -1
        self._asked = False
        self._closed = False
        self._ids = 0
        self._ewma_ns: dict[int, float] = {}  # per shipped function
        self._shipped_for: dict[int, tuple[Shipped, Callable[..., Any]]] = {}
        self._waiters: list[asyncio.Future[None]] = []

    # ------------------------------------------------------------ the port

    @property
    def slots(self) -> int:
        """How many calls run at once."""
        return self._slots

    async def open(self) -> None:
        """Bind to the running loop. Workers start when the first call needs them; the fork server comes up meanwhile."""
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.supply.prestart()
        if self not in self.supply.lanes:
            self.supply.lanes.append(self)
        self._watch_control()

    def encode(self, value: Any) -> Any:
        """`value` as a Payload that several calls can share. Thread-safe. Raises what encoding raises."""
        return encode(self.supply, self._memory, value)

    def start(self, call: Call, deliver: Deliver) -> None:
        """Run `call`; `deliver` hears of it later, on this loop."""
        task = _Task(call, deliver)
        loop = self._loop
        if loop is None or self._closed:
            raise LaneClosedError("the process lane is not open", hint="use it inside `async with`")
        if call.id in self._tasks:
            raise StageflowError(f"call id {call.id} is already in use")
        self._tasks[call.id] = task
        try:
            self._prepare(task)
        except Exception as error:
            info = capture(error, lane=self.lane)
            loop.call_soon(self._finish, task, Outcome(call.id, OutcomeKind.REFUSED, error=info))
            return
        self._queue.append(task)
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
            if task.worker is None:
                self._cancel_queued(task)
                self._dispatch()
                return
        if force:
            task.forced = True
            self._force(task)

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

    async def aclose(self, *, grace: float | None = None) -> None:
        """Stop everything within `grace` seconds, then by force; every call gets its outcome first. Idempotent."""
        loop = self._loop
        if loop is None or self._closed:
            return
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

    # ------------------------------------------------------------ futures

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Run `fn(*args, **kwargs)` in a worker. Cancelling the future asks the call to stop, and after `grace` kills it."""
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
                error = revive(outcome.error)
                # A future refuses StopIteration: it would end the generator that awaits it.
                future.set_exception(error if not isinstance(error, StopIteration) else RuntimeError(repr(error)))

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

    # ------------------------------------------------------------ encoding

    def _prepare(self, task: _Task) -> None:
        call = task.call
        if call.shipped.key not in self.supply.shipping.known:
            self.supply.shipping.data(call.shipped)
            self.supply.want_modules(call.shipped)
        encoded = []
        for index, value in enumerate(call.args):
            kind = type(value)
            if kind in _WORDS or (kind is int and -_I64 <= value < _I64) or (kind is bytes and len(value) < 1024):
                task.bytes_in += 8
                encoded.append(value)
                continue
            if kind is not ProcessPayload:
                try:
                    value = encode(self.supply, self._memory, value)
                except StageflowError as error:
                    _name_argument(error, index, plain=type(call.shipped.function) is Plain)
                    raise
            elif value.blocks:
                self.supply.books.lease(value.blocks)
                value = ProcessPayload(self.supply.books, value.encoded, value.nbytes, value.blocks, value.inline)
            if value.blocks:
                task.payloads.append(value)
            task.bytes_in += value.nbytes
            encoded.append(value.encoded)
        message = [ch.TASK, call.id, call.shipped.key, int(call.writable), encoded]
        data = ch.encode_message(message)
        if len(data) > ch.MAX_MESSAGE:
            data = self._big(task, data)
        task.data = data

    def _big(self, task: _Task, data: bytes) -> bytes:
        """A message too long for a frame, laid in shared memory."""
        block = self._memory.allocate(len(data))
        block.view[:] = data
        task.payloads.append(ProcessPayload(self.supply.books, None, len(data), (block.key,), 32))
        return ch.encode_message([ch.BIG, [*block.key, block.off, len(data)]])

    # ------------------------------------------------------------ assigning

    def _dispatch(self) -> None:
        queue = self._queue
        while queue:
            task = queue[0]
            lent = self._worker_for(task)
            if lent is None:
                return
            self._send_tasks(lent, self._batch(task))

    def _batch(self, first: _Task) -> list[_Task]:
        """Calls for one frame: one, or as many short ones as make about a millisecond, fewer towards the end of the queue."""
        queue = self._queue
        queue.popleft()
        batch = [first]
        if not first.short or not queue:
            return batch
        ewma = self._ewma_ns.get(first.call.shipped.key, 0.0)
        limit = min(MAX_BATCH, len(queue) // (2 * self._slots) + 1, int(BATCH_NS / ewma) if ewma > 0 else 1)
        size = len(first.data)
        while len(batch) < limit and queue and queue[0].short:
            size += len(queue[0].data)
            if size > ch.MAX_MESSAGE:
                break
            batch.append(queue.popleft())
        return batch

    def _worker_for(self, task: _Task) -> _Lent | None:
        while self._idle:
            lent = self._idle.pop()
            if lent.handle.number in self._lent and not lent.tasks and not lent.handle.retiring and lent.death is None:
                return lent
        if len(self._lent) < self._slots and not self._asked:
            try:
                handle = self.supply.borrow(self)
            except (WorkerStartError, OSError) as error:
                if not self._lent:
                    self._fail_all(error)
                return None
            if handle is not None:
                return self._take(handle)
            self._asked = True
        if task.short:
            best = None
            for lent in self._lent.values():
                if lent.frames < 2 and not lent.handle.retiring and lent.death is None and not lent.outbox:
                    if all(t.short for t in lent.tasks.values()) and (
                        best is None or len(lent.tasks) < len(best.tasks)
                    ):
                        best = lent
            if best is not None and best.handle.channel.can_take_back and not self.supply.waiting:
                return best
        return None

    def _send_tasks(self, lent: _Lent, batch: list[_Task]) -> None:
        handle = lent.handle
        messages, fds = self._controls(lent)
        shipping = self.supply.shipping
        for task in batch:
            shipped = task.call.shipped
            if handle.main_version != shipping.version:
                handle.main_version = shipping.version
                messages.append(self._fit(handle, messages, fds, [ch.MAIN, shipping.bundle_data]))
            if shipped.key not in handle.functions:
                handle.functions.add(shipped.key)
                messages.append(self._fit(handle, messages, fds, [ch.SHIP, shipped.key, shipping.data(shipped)]))
            for payload in task.payloads:
                for key in payload.blocks:
                    handle.leases[key] += 1
                    if key[0] not in handle.segments:
                        self._announce(handle, messages, fds, key[0])
                self.supply.books.lease(payload.blocks)
            task.worker = lent
            task.frame = lent.next_frame
            lent.tasks[task.call.id] = task
            messages.append(task.data)
        lent.next_frame += 1
        lent.frames += 1
        self._send(lent, messages, fds)

    def _fit(self, handle: WorkerHandle, messages: list[bytes], fds: list[int], message: list[Any]) -> bytes:
        """`message` encoded; laid in shared memory if it is long."""
        data = ch.encode_message(message)
        if len(data) <= 16384:
            return data
        block = self._memory.allocate(len(data))
        block.view[:] = data
        handle.leases[block.key] += 1  # the lease that the block was born with; the worker ends it
        if block.key[0] not in handle.segments:
            self._announce(handle, messages, fds, block.key[0])
        return ch.encode_message([ch.BIG, [*block.key, block.off, len(data)]])

    def _announce(self, handle: WorkerHandle, messages: list[bytes], fds: list[int], sid: int) -> None:
        mapping = self.supply.books.mappings[sid]
        handle.segments.add(sid)
        messages.append(ch.encode_message([ch.SEGMENTS, [[sid, mapping.size]]]))
        fds.append(mapping.fd)

    def _controls(self, lent: _Lent) -> tuple[list[bytes], list[int]]:
        freed = self.supply.books.take_freed(lent.handle.number)
        return ([ch.encode_message([ch.FREE, freed])] if freed else []), []

    def _send(self, lent: _Lent, messages: list[bytes], fds: list[int]) -> None:
        frames: list[tuple[bytes, list[int]]] = []
        if sum(map(len, messages)) > ch.MAX_FRAME - 64:
            for message in messages:
                frames.append((ch.join([message]), fds))
                fds = []
        else:
            frames.append((ch.join(messages), fds))
        for frame, fds in frames:
            if lent.outbox:
                lent.outbox.append((frame, fds))
                continue
            try:
                if lent.handle.channel.send(frame, fds):
                    continue
            except ch.Closed:
                pass  # it is dying; its death requeues what it has
            lent.outbox.append((frame, fds))
            if not lent.writing and self._loop is not None:
                lent.writing = True
                self._loop.add_writer(lent.handle.channel.fileno(), self._writable, lent)

    def _writable(self, lent: _Lent) -> None:
        try:
            while lent.outbox and lent.handle.channel.send(*lent.outbox[0]):
                lent.outbox.popleft()
        except ch.Closed:
            lent.outbox.clear()
        if not lent.outbox and lent.writing and self._loop is not None:
            lent.writing = False
            self._loop.remove_writer(lent.handle.channel.fileno())

    # ------------------------------------------------------------ borrowing

    def granted(self, worker: WorkerHandle) -> None:
        """The supply lends a worker that this lane had asked for. Any thread."""
        self._call_soon(self._granted, worker)

    def reported(self, worker: WorkerHandle) -> None:
        """Something was heard of `worker`, or room for a new one was made. Any thread."""
        self._call_soon(self._reported, worker)

    def held(self) -> int:
        """Workers this lane has now."""
        return len(self._lent)

    def _call_soon(self, function: Callable[..., None], worker: WorkerHandle) -> None:
        loop = self._loop
        try:
            if loop is not None:
                loop.call_soon_threadsafe(function, worker)
                return
        except RuntimeError:
            pass  # its loop was closed without aclose
        if worker.lane is self:
            self.supply.give_back(worker)

    def _granted(self, handle: WorkerHandle) -> None:
        self._asked = False
        if self._closed or self._loop is None:
            self.supply.give_back(handle)
            return
        self._idle.append(self._take(handle))
        self._dispatch()
        if not self._lent[handle.number].tasks:
            self._became_idle(self._lent[handle.number])

    def _take(self, handle: WorkerHandle) -> _Lent:
        loop = self._loop
        assert loop is not None
        lent = self._lent[handle.number] = _Lent(handle)
        loop.add_reader(handle.channel.fileno(), self._readable, lent)
        loop.add_reader(handle.output, handle.read_output)
        if handle.pidfd >= 0:
            loop.add_reader(handle.pidfd, self._died, lent)
        if not handle.ready:
            lent.start_timer = loop.call_later(START_WITHIN, self._not_started, lent)
            if handle.process is not None and handle.pidfd < 0:
                loop.call_later(0.05, self._poll_process, lent)
        return lent

    def _reported(self, handle: WorkerHandle) -> None:
        lent = self._lent.get(handle.number)
        if lent is None or lent.handle is not handle:
            self._asked = False  # room for a new worker
            if not self._closed:
                self._dispatch()
            return
        if handle.ended is not None or handle.failed is not None:
            self._died(lent)
        elif handle.pidfd >= 0 and self._loop is not None:
            self._loop.add_reader(handle.pidfd, self._died, lent)

    def _poll_process(self, lent: _Lent) -> None:
        """Where there are no pidfds: ask."""
        if self._lent.get(lent.handle.number) is lent and self._loop is not None:
            if self.supply.poll_ended(lent.handle):
                self._died(lent)
            else:
                self._loop.call_later(0.05, self._poll_process, lent)

    def _not_started(self, lent: _Lent) -> None:
        if not lent.handle.ready:
            lent.handle.failed = f"the worker did not come up within {START_WITHIN:g} s"
            lent.handle.kill()
            self._died(lent)

    def _became_idle(self, lent: _Lent) -> None:
        if lent.handle.retiring or self._loop is None:
            return
        if lent.handle.number in self._lent and lent not in self._idle:
            self._idle.append(lent)
        if self.supply.waiting and self.supply.should_give_back(self):
            self._release_worker(lent)
            return
        lent.handle.idle_since = time.monotonic()
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_later(GIVE_BACK_AFTER, self._give_back_idle)

    def _give_back_idle(self) -> None:
        """One timer for the lane: a timer per call would cost more than the call's decoding."""
        self._idle_timer = None
        now = time.monotonic()
        for lent in list(self._idle):
            if self._lent.get(lent.handle.number) is lent and not lent.tasks and not lent.outbox:
                if now - lent.handle.idle_since >= GIVE_BACK_AFTER * 0.9:
                    self._release_worker(lent)
                elif self._idle_timer is None and self._loop is not None:
                    self._idle_timer = self._loop.call_later(GIVE_BACK_AFTER, self._give_back_idle)

    def _release_worker(self, lent: _Lent) -> None:
        """Take the readers off and hand it back to the supply."""
        self._detach(lent)
        if lent.handle.ended is not None:
            self.supply.remove(lent.handle)
        else:
            freed, fds = self._controls(lent)
            if freed:
                with contextlib.suppress(ch.Closed):
                    lent.handle.channel.send(ch.join(freed), fds)
            self.supply.give_back(lent.handle)

    def _detach(self, lent: _Lent) -> None:
        handle, loop = lent.handle, self._loop
        self._lent.pop(handle.number, None)
        if lent in self._idle:
            self._idle.remove(lent)
        for timer in (lent.start_timer, lent.death):
            if timer is not None:
                timer.cancel()
        if loop is not None and not loop.is_closed():
            if lent.writing:
                loop.remove_writer(handle.channel.fileno())
            for fd in (handle.channel.fileno(), handle.output, handle.pidfd):
                if fd >= 0:
                    loop.remove_reader(fd)

    def _watch_control(self) -> None:
        control = self.supply.control
        if control is not None and self._loop is not None and self._watching != control.fileno():
            self._unwatch_control()
            self._watching = control.fileno()
            self._loop.add_reader(self._watching, self._pump)

    def _unwatch_control(self) -> None:
        if self._watching >= 0 and self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._watching)
        self._watching = -1

    def _pump(self) -> None:
        if self.supply.control is None:
            self._unwatch_control()
            return
        self.supply.pump()
        if self.supply.control is None:
            self._unwatch_control()

    # ------------------------------------------------------------ hearing

    def _readable(self, lent: _Lent) -> None:
        channel = lent.handle.channel
        try:
            for _ in range(16):
                received = channel.receive()
                if received is None:
                    break
                frame, fds = received
                self._frame(lent, frame, fds)
                if not lent.tasks:
                    break  # nothing more is due; a stray note wakes us again
        except ch.Closed:
            if self._loop is not None and channel.fileno() >= 0:
                self._loop.remove_reader(channel.fileno())
            self._died(lent)
            return
        if lent.handle.number in self._lent and lent.death is None:
            self._feed(lent)

    def _feed(self, lent: _Lent) -> None:
        if not lent.tasks and not lent.handle.retiring:
            if self.supply.waiting and self.supply.should_give_back(self):
                self._release_worker(lent)
                if self._queue:
                    self._dispatch()
                return
            if self._recycle(lent):
                return
            self._idle.append(lent)
        if self._queue:
            self._dispatch()
        elif not lent.tasks:
            self._steal(lent)
        if not lent.tasks and lent.handle.number in self._lent:
            self._became_idle(lent)

    def _steal(self, idle: _Lent) -> None:
        """Nothing is queued and a worker idles: take back what another has not read yet."""
        for other in self._lent.values():
            if other is not idle and other.frames > 1 and other.handle.channel.can_take_back:
                self._take_back(other)
                if self._queue:
                    self._dispatch()
                    return

    def _frame(self, lent: _Lent, frame: memoryview, fds: list[int]) -> None:
        messages = ch.decode_frame(frame)
        handle = lent.handle
        for message in messages:
            operation = message[0]
            if operation == ch.BIG:
                message = self._read_big(handle, message[1])
                operation = message[0]
            if operation == ch.DONE:
                self._done(lent, message)
            elif operation == ch.NOTE:
                if self.on_note is not None:
                    self.on_note(message[1], message[2], message[3])
            elif operation == ch.RELEASED:
                self._released(handle, message[1])
            elif operation == ch.PART:
                self._part(lent, message)
            elif operation == ch.FAILED:
                self._failed(lent, message)
            elif operation == ch.SEGMENTS:
                for sid, size in message[1]:
                    self.supply.books.add_segment(sid, size, fds.pop(0))
            elif operation == ch.READY:
                self._came_up(lent)
            elif operation == ch.FORGET:
                self.supply.books.forget(message[1])
            elif operation == ch.BYE:
                handle.said_bye = handle.retiring = True

    def _read_big(self, handle: WorkerHandle, ref: codec.Ref) -> list[Any]:
        books = self.supply.books
        key = (ref[0], ref[1])
        books.lease((key,))
        reader = ValueReader(books.mappings, books.dropped.append)
        message = ch.decode_message(reader.peek(ref))
        reader.finish((key,))
        return message

    def _released(self, handle: WorkerHandle, keys: list[list[int]]) -> None:
        for sid, off in keys:
            key = (sid, off)
            left = handle.leases.get(key, 0) - 1
            if left > 0:
                handle.leases[key] = left
            else:
                handle.leases.pop(key, None)
            if left >= 0:
                self.supply.books.dropped.append(key)

    def _came_up(self, lent: _Lent) -> None:
        if lent.start_timer is not None:
            lent.start_timer.cancel()
            lent.start_timer = None
        self.supply.came_up(lent.handle)
        self._event("worker.started", pid=lent.handle.pid, number=lent.handle.number)

    def _event(self, name: str, **fields: Any) -> None:
        if self.on_worker_event is not None:
            self.on_worker_event(name, fields)

    def _value(self, encoded: Any, nbytes: int) -> ProcessPayload:
        books = self.supply.books
        if type(encoded) is not list:
            return ProcessPayload(books, encoded, nbytes, (), nbytes)
        blocks = codec.blocks_of(encoded)
        if blocks:
            books.lease(blocks)
        return ProcessPayload(books, encoded, nbytes, blocks, nbytes if not blocks else 64)

    def _meta(self, encoded: Any) -> Any:
        """What came beside a value, decoded at once: the engine reads it to decide what comes next."""
        return None if encoded is None else self._value(encoded, 0).load()

    def _done(self, lent: _Lent, message: list[Any]) -> None:
        _, call_id, encoded, meta, has_value, nbytes, started, took, cpu = message
        task = lent.tasks.get(call_id)
        if task is None:
            return
        value = self._value(encoded, nbytes) if has_value else None
        self._leave(lent, task)
        key = task.call.shipped.key
        known = self._ewma_ns.get(key)
        self._ewma_ns[key] = took if known is None else known + (took - known) * 0.2
        self._finish(
            task,
            Outcome(
                call_id,
                OutcomeKind.OK,
                value,
                self._meta(meta),
                worker_pid=lent.handle.pid,
                started=started / 1e9,
                seconds=took / 1e9,
                cpu_seconds=cpu / 1e9,
                bytes_in=task.bytes_in,
                bytes_out=nbytes,
            ),
        )

    def _part(self, lent: _Lent, message: list[Any]) -> None:
        _, call_id, encoded, meta, has_value, nbytes = message
        task = lent.tasks.get(call_id)
        if task is not None:
            value = self._value(encoded, nbytes) if has_value else None
            task.deliver(
                Outcome(
                    call_id,
                    OutcomeKind.OK,
                    value,
                    self._meta(meta),
                    final=False,
                    worker_pid=lent.handle.pid,
                    bytes_out=nbytes,
                )
            )

    def _failed(self, lent: _Lent, message: list[Any]) -> None:
        _, call_id, kind, error, started, took, cpu = message
        task = lent.tasks.get(call_id)
        if task is None:
            return
        self._leave(lent, task)
        self._finish(
            task,
            Outcome(
                call_id,
                OutcomeKind(kind),
                error=_decode_error(error) if error is not None else None,
                worker_pid=lent.handle.pid,
                started=started / 1e9,
                seconds=took / 1e9,
                cpu_seconds=cpu / 1e9,
                bytes_in=task.bytes_in,
            ),
        )

    def _leave(self, lent: _Lent, task: _Task) -> None:
        """`task` is no longer with the worker."""
        del lent.tasks[task.call.id]
        task.worker = None
        lent.handle.calls += 1
        if not lent.tasks:
            lent.frames = 0
        elif task.frame != next(iter(lent.tasks.values())).frame:
            lent.frames -= 1

    def _finish(self, task: _Task, outcome: Outcome) -> None:
        if self._tasks.pop(task.call.id, None) is None:
            return
        for payload in task.payloads:
            payload.release()
        if not self._tasks and self._waiters:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()
        task.deliver(outcome)

    # ------------------------------------------------------------ cancelling

    def _cancel_queued(self, task: _Task) -> None:
        if task in self._queue:
            self._queue.remove(task)
        if self._loop is not None:
            info = None
            self._loop.call_soon(self._finish, task, Outcome(task.call.id, OutcomeKind.CANCELLED, error=info))

    def _force(self, task: _Task) -> None:
        """Kill the worker as soon as it is seen to run `task`. One that has not begun will not begin: the page says so."""
        lent = task.worker
        if lent is None or task.call.id not in self._tasks or self._loop is None or lent.handle.killed:
            return
        running, _, _ = lent.handle.page.running()
        if running == task.call.id:
            lent.handle.kill()
        else:
            self._loop.call_later(0.02, self._force, task)

    def _take_back(self, lent: _Lent) -> None:
        """Read the frames the worker has not read; put their calls in front of the queue, and keep what else they held."""
        peer = lent.handle.peer
        if peer is None:
            return
        taken: list[_Task] = []
        for frame, fds in lent.outbox:
            self._taken_frame(lent, frame, taken)
        lent.outbox.clear()
        again: list[bytes] = []
        while True:
            try:
                data, ancillary, _, _ = peer.recvmsg(
                    ch.MAX_FRAME + 4096, ch.ROOM, ch.MSG_DONTWAIT | ch.MSG_CMSG_CLOEXEC
                )
            except OSError:
                break
            if not data:
                break
            for fd in ch.unpack_fds(ancillary):
                contextlib.suppress(OSError)
                _close(fd)
            again.extend(self._taken_frame(lent, data, taken))
        taken.sort(key=lambda task: task.frame)
        for task in reversed(taken):
            self._queue.appendleft(task)
        if again and lent.death is None:
            self._send(lent, again, [])

    def _taken_frame(self, lent: _Lent, frame: Any, taken: list[_Task]) -> list[bytes]:
        """Undo what sending `frame` did to the books. Returns messages that the worker still needs."""
        handle = lent.handle
        again: list[bytes] = []
        for message in ch.decode_frame(frame):
            operation = message[0]
            if operation == ch.TASK:
                self._untake(lent, lent.tasks.get(message[1]), taken)
            elif operation == ch.SEGMENTS:
                handle.segments.difference_update(sid for sid, _ in message[1])
            elif operation == ch.SHIP:
                handle.functions.discard(message[1])
            elif operation == ch.MAIN:
                handle.main_version = -1
            elif operation == ch.BIG:
                inner = self._read_big(handle, message[1])
                key = (message[1][0], message[1][1])
                if inner[0] == ch.TASK:
                    self._untake(lent, lent.tasks.get(inner[1]), taken)
                else:
                    self._released(handle, [list(key)])
                    if inner[0] == ch.SHIP:
                        handle.functions.discard(inner[1])
                    else:
                        handle.main_version = -1
            else:
                again.append(ch.encode_message(message))
        return again

    def _untake(self, lent: _Lent, task: _Task | None, taken: list[_Task]) -> None:
        if task is None:
            return
        handle = lent.handle
        for payload in task.payloads:
            for key in payload.blocks:
                self._released(handle, [list(key)])
        self._leave(lent, task)
        handle.calls -= 1
        taken.append(task)

    # ------------------------------------------------------------ recycling

    def _recycle(self, lent: _Lent) -> bool:
        """Let an idle worker go that has done its number of calls or grown too much; the replacement comes first."""
        handle, supply = lent.handle, self.supply
        reason = None
        if supply.max_tasks_per_child is not None and handle.calls >= supply.max_tasks_per_child:
            reason = f"did {handle.calls} calls"
        elif supply.worker_memory_limit is not None:
            now = time.monotonic()
            if now - handle.checked_at > 0.1:
                handle.checked_at = now
                _, anonymous = handle.memory()
                handle.base_anon = handle.base_anon or anonymous
                if (
                    anonymous - handle.base_anon > supply.worker_memory_limit
                    or anonymous > 4 * supply.worker_memory_limit
                ):
                    reason = f"grew to {anonymous:,} bytes of its own"
        if reason is None:
            return False
        self._event("worker.recycled", pid=handle.pid, reason=reason)
        handle.retiring = True
        with supply.lock:
            supply.workers.pop(handle.number, None)  # it no longer counts: its replacement may start now
            if not supply.closed and self._queue and supply.may_start():
                with contextlib.suppress(WorkerStartError, OSError):
                    self._idle.append(self._take(supply.start_worker(self)))
            supply.workers[handle.number] = handle
        supply.dismiss(handle)
        if self._queue:
            self._dispatch()
        return True

    # ------------------------------------------------------------ death

    def _died(self, lent: _Lent) -> None:
        """The worker is gone. Hear its last words, send on what it had not begun, and learn why."""
        handle, loop = lent.handle, self._loop
        if self._lent.get(handle.number) is not lent or lent.death is not None or loop is None:
            if lent.death is not None and self.supply.poll_ended(handle):
                lent.death.cancel()
                self._bury(lent)
            return
        with contextlib.suppress(ch.Closed):
            while (received := handle.channel.receive()) is not None:
                self._frame(lent, *received)
        lent.death = loop.call_later(CAUSE_WITHIN, self._bury, lent)
        if handle.pidfd >= 0:
            loop.remove_reader(handle.pidfd)
        loop.remove_reader(handle.channel.fileno())
        loop.remove_reader(handle.output)  # at its end it would always be readable; what is left is read at the burial
        self._take_back(lent)
        if self.supply.poll_ended(handle):
            if lent.death is not None:
                lent.death.cancel()
            self._bury(lent)
        elif self._queue:
            self._dispatch()
        if handle.process is not None and lent.death is not None and handle.number in self._lent:
            loop.call_later(0.01, self._died, lent)

    def _bury(self, lent: _Lent) -> None:
        """The cause is known, or will not be."""
        handle = lent.handle
        if self._lent.get(handle.number) is not lent:
            return
        if handle.process is not None and not self.supply.poll_ended(handle):
            handle.kill()
        running, _, started = handle.page.running()
        blamed = lent.tasks.get(running)
        error = describe(handle, self.supply.oom_before)
        came_up = handle.ready
        lent.death = None
        self._detach(lent)
        if not came_up and not handle.killed:
            self.supply.start_failed(handle.failed or error.message)
        if not handle.said_bye and came_up:
            self._event(
                "worker.lost",
                pid=handle.pid,
                signal=error.signal,
                exit_code=error.exit_code,
                oom_killed=error.oom_killed,
            )
        tail = handle.pid
        self.supply.remove(handle)
        again = []
        for task in list(lent.tasks.values()):
            task.worker = None
            if task is blamed:
                self._finish(task, self._lost(task, error, handle, started, suspect=True))
                continue
            task.boarded += not handle.said_bye and not handle.killed and came_up
            if task.forced or task.cancelled is not None:
                self._finish(task, Outcome(task.call.id, OutcomeKind.CANCELLED, worker_pid=tail))
            elif task.boarded >= self.poison_limit:
                self._finish(task, self._lost(task, error, handle, started, suspect=False))
            else:
                again.append(task)
        lent.tasks.clear()
        for task in reversed(again):
            self._queue.appendleft(task)
        self._watch_control()
        if self._queue:
            self._dispatch()

    def _lost(self, task: _Task, error: ErrorInfo, handle: WorkerHandle, started: int, *, suspect: bool) -> Outcome:
        kind = OutcomeKind.CANCELLED if task.forced else OutcomeKind.LOST
        return Outcome(
            task.call.id,
            kind,
            meta={"progress": handle.page.progress()} if suspect else None,
            error=error,
            suspect=suspect and kind is OutcomeKind.LOST,
            worker_pid=handle.pid,
            started=started / 1e9,
            seconds=max(0.0, time.monotonic() - started / 1e9),
            bytes_in=task.bytes_in,
            rss_bytes=error.rss_bytes or 0,
        )

    def _fail_all(self, error: BaseException) -> None:
        """No worker can be started: every waiting call is told so."""
        info = capture(error, lane=self.lane)
        queue, self._queue = self._queue, deque()
        if self._loop is not None:
            for task in queue:
                self._loop.call_soon(self._finish, task, Outcome(task.call.id, OutcomeKind.ERROR, error=info))


def _close(fd: int) -> None:
    import os

    os.close(fd)


def _name_argument(error: StageflowError, index: int, *, plain: bool) -> None:
    """Say which argument the path inside the value belongs to."""
    path = getattr(error, "path", None)
    if path is None:
        return
    inside = path.removeprefix("value")
    if plain and index == 0:
        named = f"keyword argument {inside}"
    else:
        named = f"argument {index - plain}{inside}"
    error.message = error.message.replace(path, named, 1)
    error.args = (error.message,)
    error.__dict__["path"] = named
