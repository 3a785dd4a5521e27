"""What the lane knows of its calls and workers, and the books it keeps of them.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from stageflow.core.executor import Call, Deliver, Noted, Outcome, Shipped
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes.handle import WorkerHandle
from stageflow_executors.processes.lookout import Lookout
from stageflow_executors.processes.payload import InlinePayload, ParentMemory, ProcessPayload
from stageflow_executors.processes.supply import WorkerSupply
from stageflow_executors.shm import codec
from stageflow_executors.shm.lease import ValueReader


class Task(msgspec.Struct, eq=False):
    """One call from `start` to its final outcome."""

    call: Call
    deliver: Deliver
    short: bool
    alone: bool
    payloads: list[ProcessPayload] = []
    data: bytes = b""  # the encoded message
    bytes_in: int = 0
    boarded: int = 0  # workers that died with it aboard
    worker: Lent | None = None
    frame: int = 0
    cancelled: str | None = None
    forced: bool = False
    standing: bool = False  # still, behind what it has given


class Lent:
    """A worker while this lane has it."""

    __slots__ = (
        "apart",
        "death",
        "frames",
        "handle",
        "next_frame",
        "outbox",
        "poll_timer",
        "start_timer",
        "tasks",
        "writing",
    )

    def __init__(self, handle: WorkerHandle) -> None:
        self.handle = handle
        self.tasks: dict[int, Task] = {}  # in the order sent
        self.frames = 0  # task frames not yet answered in full
        self.next_frame = 0
        self.outbox: deque[tuple[bytes, list[int]]] = deque()
        self.writing = False
        self.apart: Callable[[], None] | None = None  # ends the lane's parting with it
        self.start_timer: asyncio.TimerHandle | None = None
        self.poll_timer: asyncio.TimerHandle | None = None  # asks whether a spawned worker lives
        self.death: asyncio.TimerHandle | None = None


class LaneState:
    """The lane's tables. Every method runs on the lane's loop."""

    lane: Final = "process"

    def __init__(self, supply: WorkerSupply, *, max_workers: int | None, poison_limit: int, grace: float) -> None:
        self.supply = supply
        self._slots = min(max_workers or self.supply.max_workers, self.supply.max_workers)
        self.poison_limit = poison_limit
        self.grace = grace
        #: called with (call id, kind, data) for every note of a call
        self.on_note: Noted | None = None
        #: called with ("worker.started" | "worker.lost" | "worker.recycled", fields)
        self.on_worker_event: Callable[[str, dict[str, Any]], None] | None = None
        self._memory = ParentMemory(self.supply)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[int, Task] = {}
        self._queue: deque[Task] = deque()
        self._lent: dict[int, Lent] = {}
        self._idle: list[Lent] = []
        self._hearing: Lent | None = None  # whose frame is being read
        #: workers are looked at after each call: they leave after a number of them, or when they have grown
        self._watchful = supply.max_tasks_per_child is not None or supply.worker_memory_limit is not None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._watching = -1  # a descriptor of our own for the fork server's socket
        self._watched: socket.socket | None = None
        self._asked = False
        self._standing = 0  # calls that stand still: each has a worker on top
        self._closed = False
        self._looks_later = False  # at its queue, once in this turn of the loop
        self._cores = 0
        self._lookout = Lookout()
        self._looked_for: Lent | None = None  # whose answer is looked for before the loop sleeps
        self._ids = 0
        self._ewma_ns: dict[int, float] = {}  # per shipped function
        self._shipped_for: dict[int, tuple[Shipped, Callable[..., Any]]] = {}
        self._waiters: list[asyncio.Future[None]] = []

    def _event(self, name: str, **fields: Any) -> None:
        if self.on_worker_event is not None:
            self.on_worker_event(name, fields)

    def _value(self, encoded: Any, nbytes: int) -> ProcessPayload | InlinePayload:
        if type(encoded) is not list or not (blocks := codec.blocks_of(encoded)):
            return InlinePayload(encoded, nbytes)
        books = self.supply.books
        books.lease(blocks)
        return ProcessPayload(books, encoded, nbytes, blocks, 64)

    def _meta(self, encoded: Any) -> Any:
        """What came beside a value, decoded at once: the engine reads it to decide what comes next."""
        return None if encoded is None else self._value(encoded, 0).load()

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

    def _leave(self, lent: Lent, task: Task) -> None:
        """`task` is no longer with the worker."""
        del lent.tasks[task.call.id]
        task.worker = None
        lent.handle.calls += 1
        if not lent.tasks:
            lent.frames = 0
        elif task.frame != next(iter(lent.tasks.values())).frame:
            lent.frames -= 1

    def _finish(self, task: Task, outcome: Outcome) -> None:
        if self._tasks.pop(task.call.id, None) is None:
            return
        if task.standing:
            self._stands_no_more(task)
        if task.payloads:
            for payload in task.payloads:
                payload.release()
        if self._waiters and not self._tasks:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()
        task.deliver(outcome)

    def _stands_no_more(self, task: Task) -> None:
        task.standing = False
        self._standing -= 1
        self.supply.stands(-1)

    def _controls(self, lent: Lent) -> tuple[list[bytes], list[int]]:
        freed = self.supply.books.take_freed(lent.handle.number)
        if freed:
            self.supply.set_limit(lent.handle)  # it may have to give back what it would have kept
        return ([ch.encode_message([ch.FREE, freed])] if freed else []), []
