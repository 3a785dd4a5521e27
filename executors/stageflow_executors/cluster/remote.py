"""What runs on a worker of a cluster: one call, its parts and notes collected, everything as data.

Imported by workers of another machine: may import `stageflow.core` and `stageflow_executors.local` only.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, Final

import cloudpickle
import msgspec

from stageflow.core.errors import NotShippableError, StageCancelledError
from stageflow.core.executor import OutcomeKind, Reply
from stageflow.core.failure import capture
from stageflow.core.output import ErrorInfo
from stageflow.core.worker import UnderWay
from stageflow_executors.local import parts_of

KEPT: Final = 1000  #: functions and cancelled calls that one worker remembers

_functions: dict[tuple[str, int], Callable[..., Any]] = {}
_cancelled: dict[tuple[str, int], str] = {}
_running: dict[tuple[str, int], RemotePort] = {}


class Report(msgspec.Struct):
    """How a call went."""

    kind: OutcomeKind
    parts: list[tuple[Any, Any]]  #: (value, meta) before the last
    value: Any
    meta: Any
    notes: list[tuple[str, Any]]
    error: ErrorInfo | None
    pid: int
    seconds: float
    cpu_seconds: float


class RemotePort:
    """The `WorkerPort` of a call on a cluster: notes arrive with its outcome, the flag best effort."""

    def __init__(self, lane: str, identity: tuple[str, int]) -> None:
        self.lane = lane
        self.notes: list[tuple[str, Any]] = []
        self._identity = identity
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def worker_pid(self) -> int:
        """The worker's pid on its machine."""
        return os.getpid()

    def cancelled(self) -> bool:
        """True once the worker heard that the call shall stop."""
        return self._identity in _cancelled

    def cancel_reason(self) -> str | None:
        """Why."""
        return _cancelled.get(self._identity)

    def progress(self, done: float, total: float) -> None:
        """Not shown: nothing is shared with the parent."""

    def note(self, kind: str, data: Any) -> None:
        """Kept, and sent with the outcome."""
        self.notes.append((kind, data))

    def buffer(self, nbytes: int) -> memoryview:
        """Plain memory."""
        return memoryview(bytearray(nbytes))

    def items(self, current: Callable[[], UnderWay]) -> None:
        """Nothing is taken in."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call back when the worker hears of it."""
        with self._lock:
            self._callbacks.append(callback)
        if self.cancelled():
            self.call_back()

    def call_back(self) -> None:
        """Run the callbacks, each once."""
        while True:
            with self._lock:
                if not self._callbacks:
                    return
                callback = self._callbacks.pop()
            try:
                callback()
            except Exception as error:
                self.note("log", {"logger": "stageflow", "level": 40, "message": f"on_cancel callback: {error!r}"})


def stop(identity: tuple[str, int], reason: str) -> None:
    """Set the flag of a call, here or not."""
    if len(_cancelled) >= KEPT:
        _cancelled.pop(next(iter(_cancelled)))
    _cancelled.setdefault(identity, reason)
    port = _running.get(identity)
    if port is not None:
        port.call_back()


def run(lane: str, identity: tuple[str, int], key: int, function: bytes, args: bytes) -> bytes:
    """Run a call and pickle its report. Raises nothing that the call raises."""
    port = RemotePort(lane, identity)
    _running[identity] = port
    parts: list[tuple[Any, Any]] = []
    started, cpu = time.monotonic(), time.thread_time()
    kind, error, last = OutcomeKind.OK, None, Reply()
    try:
        known = _functions.get((identity[0], key))
        if known is None:
            known = cloudpickle.loads(function)
            if len(_functions) >= KEPT:
                _functions.pop(next(iter(_functions)))
            _functions[identity[0], key] = known
        last = _result(known(port, *cloudpickle.loads(args)), parts)
    except BaseException as raised:  # SystemExit in a stage is that call's failure, not the worker's end
        stopped = port.cancelled() and isinstance(raised, StageCancelledError | asyncio.CancelledError)
        kind = OutcomeKind.CANCELLED if stopped else OutcomeKind.ERROR
        error = capture(raised, lane=lane, worker_pid=port.worker_pid, skip_frames=1)
    finally:
        _running.pop(identity, None)
    seconds, cpu_seconds = time.monotonic() - started, time.thread_time() - cpu
    report = Report(kind, parts, last.value, last.meta, port.notes, error, port.worker_pid, seconds, cpu_seconds)
    return _pickled(report, lane)


def _result(result: Any, parts: list[tuple[Any, Any]]) -> Reply:
    """The reply that ends the call; those before it go to `parts`."""
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    if isinstance(result, Generator):
        last: Reply | None = None
        for reply, ends in parts_of(result):
            if ends:
                last = reply
            elif reply is not None:
                parts.append((reply.value, reply.meta))
        return last if last is not None else Reply()
    return result if isinstance(result, Reply) else Reply(result)


def _pickled(report: Report, lane: str) -> bytes:
    try:
        data: bytes = cloudpickle.dumps(msgspec.structs.astuple(report), 5)
    except Exception as error:
        refused = NotShippableError(f"the result cannot be sent back: {type(error).__name__}: {error}"[:2000])
        report.kind, report.parts, report.value, report.meta, report.notes = OutcomeKind.REFUSED, [], None, None, []
        report.error = capture(refused, lane=lane, worker_pid=report.pid)
        data = cloudpickle.dumps(msgspec.structs.astuple(report), 5)
    return data
