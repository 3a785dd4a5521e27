"""What the lanes of this process share: the port a running call sees, and how an exception becomes an outcome.

May import `stageflow.core` only.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import msgspec

from stageflow.core.errors import StageCancelledError
from stageflow.core.executor import Call, Deliver, Noted, Outcome, OutcomeKind, Reply, Shipped
from stageflow.core.failure import capture
from stageflow.core.worker import UnderWay, both_stops, stops_item

_OK = OutcomeKind.OK
process_id = os.getpid()


def _forked() -> None:
    global process_id
    process_id = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def parts_of(result: Generator[Reply, None, Reply | None]) -> Iterator[tuple[Reply | None, bool]]:
    """(reply, whether it ends the call) of a generator of parts: what it returns ends the call, else its last part."""
    held: Reply | None = None
    while True:
        try:
            reply = next(result)
        except StopIteration as stop:
            if stop.value is not None:
                if held is not None:
                    yield held, False
                held = stop.value
            yield held, True
            return
        if held is not None:
            yield held, False
        held = reply
        if reply.asks:
            yield held, False
            held = None


class LocalPort(msgspec.Struct, eq=False):
    """The `WorkerPort` of one call in this process. A Struct: made in C, once per call."""

    lane: str
    call: Call
    deliver: Deliver
    noted: Callable[[int, str, Any], None] | None
    started: float = 0.0
    done: bool = False
    shown: tuple[float, float] | None = None
    task: Any = None  # that runs it, in the async lane
    _reason: str | None = None
    _callbacks: list[Callable[[], None]] | None = None

    @property
    def worker_pid(self) -> int:
        """This process."""
        return process_id

    def cancelled(self) -> bool:
        """True once the call was asked to stop."""
        return self._reason is not None

    def cancel_reason(self) -> str | None:
        """Why."""
        return self._reason

    def progress(self, done: float, total: float) -> None:
        """Publish two numbers."""
        self.shown = (done, total)

    def note(self, kind: str, data: Any) -> None:
        """Tell the engine, in order."""
        if self.noted is not None:
            self.noted(self.call.id, kind, data)

    def buffer(self, nbytes: int) -> memoryview:
        """Plain memory: in this process every consumer sees the same object anyway."""
        return memoryview(bytearray(nbytes))

    def items(self, current: Callable[[], UnderWay]) -> None:
        """Nothing is taken in: what a stage prints here comes out by itself."""

    def clock(self, runs: bool) -> None:
        """Stop the time of the call that its timeout is compared with, or let it run anew from zero."""
        self.started = time.monotonic() if runs else 0.0

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call back when the call is asked to stop; at once if it was."""
        if self._reason is not None:
            callback()
            if not stops_item(self._reason):
                return
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)
        if self.cancelled():  # asked between the look and the append, by another thread
            self.ask_to_stop(self.cancel_reason() or "")

    def ask_to_stop(self, reason: str) -> None:
        """Set the flag and run the callbacks, each once. The first reason stays, but all of a call counts for more."""
        self._reason = both_stops(self._reason, reason)
        if stops_item(self._reason):
            for callback in list(self._callbacks or ()):
                with contextlib.suppress(Exception):
                    callback()
            return
        while self._callbacks:
            with contextlib.suppress(Exception):
                self._callbacks.pop()()

    # ------------------------------------------------------------ outcomes

    def part(self, reply: Reply, seconds: float = 0.0) -> Outcome:
        """A part of the call's result."""
        return Outcome(
            self.call.id,
            OutcomeKind.OK,
            reply.value,
            reply.meta,
            final=False,
            worker_pid=process_id,
            started=self.started,
            seconds=seconds,
        )

    def ok(self, value: Any, seconds: float, cpu_seconds: float = 0.0) -> Outcome:
        """The end of a call that returned."""
        meta = None
        if type(value) is Reply:
            meta = value.meta
            value = value.value
        # by position: once per call
        return Outcome(
            self.call.id, _OK, value, meta, True, None, None, False, process_id, self.started, seconds, cpu_seconds
        )

    def failed(self, error: BaseException, seconds: float, cpu_seconds: float = 0.0) -> Outcome:
        """The end of a call that raised. A cancellation that was asked for is one; any other is the call's error."""
        asked = self._reason is not None
        cancelled = asked and (isinstance(error, StageCancelledError) or type(error).__name__ == "CancelledError")
        return Outcome(
            self.call.id,
            OutcomeKind.CANCELLED if cancelled else OutcomeKind.ERROR,
            error=capture(error, lane=self.lane, worker_pid=process_id, skip_frames=1),
            exception=error,
            worker_pid=process_id,
            started=self.started,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )

    def cancelled_outcome(self, meta: Any = None) -> Outcome:
        """The end of a call that never ran, or that was left behind."""
        started = self.started
        return Outcome(
            self.call.id,
            OutcomeKind.CANCELLED,
            meta=meta,
            worker_pid=process_id,
            started=started,
            seconds=time.monotonic() - started if started else 0.0,
        )


class _Plain:
    """A plain function as a shipped one: without the port."""

    __slots__ = ("fn", "kwargs")

    def __init__(self, fn: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.fn = fn
        self.kwargs = kwargs

    def __call__(self, port: Any, *args: Any) -> Any:
        return self.fn(*args, **self.kwargs)


_ids = iter(range(1 << 40, 1 << 62))


class LocalLane(abc.ABC):
    """What the lanes of this process have in common: their books, and use by hand (`async with`, `submit`)."""

    def __init__(self, lane: str, slots: int) -> None:
        self._lane = lane
        self._slots = slots
        self._ports: dict[int, LocalPort] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_note: Noted | None = None
        self.closed = False

    @abc.abstractmethod
    def start(self, call: Call, deliver: Deliver) -> None:
        """Run `call`; `deliver` hears of it later, on the lane's loop."""

    @abc.abstractmethod
    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Ask a call to stop, or with `force` end it for the caller's part."""

    @abc.abstractmethod
    async def aclose(self, *, grace: float) -> None:
        """Stop everything within `grace` seconds; every call gets its outcome."""

    async def open(self) -> None:
        """Bind to the running loop."""
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose(grace=5.0)

    async def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn(*args, **kwargs)` as a call of this lane and return its result; raises what it raised. Cancelling the
        awaiting task cancels the call."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call = Call(next(_ids), Shipped(_Plain(fn, kwargs), label=getattr(fn, "__qualname__", repr(fn))), args)

        def deliver(outcome: Outcome) -> None:
            if not outcome.final or future.done():
                return
            if outcome.exception is not None:
                future.set_exception(outcome.exception)
            elif outcome.kind is _OK:
                future.set_result(outcome.value)
            else:
                future.cancel()

        self.start(call, deliver)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(call.id, reason="cancelled by the caller")
            raise

    @property
    def lane(self) -> str:
        """The lane's name."""
        return self._lane

    @property
    def slots(self) -> int:
        """How many calls run at once."""
        return self._slots

    def encode(self, value: Any) -> Any:
        """The value itself: nothing crosses a process boundary here."""
        return value

    def running_since(self, call_id: int) -> float | None:
        """Monotonic second at which the function was entered, or None."""
        port = self._ports.get(call_id)
        return port.started or None if port is not None else None

    def progress_of(self, call_id: int) -> tuple[float, float] | None:
        """What the call last published."""
        port = self._ports.get(call_id)
        return port.shown if port is not None else None
