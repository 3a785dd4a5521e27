"""The Dask lane: calls run as tasks of a `distributed` cluster. `distributed` is imported when the lane opens.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import cloudpickle
import msgspec

from stageflow.core.errors import DefinitionError, LaneClosedError, NotShippableError, WorkerDiedError
from stageflow.core.executor import Call, Deliver, Noted, Outcome, OutcomeKind, Payload, Shipped
from stageflow.core.failure import capture, revive
from stageflow_executors.cluster import remote
from stageflow_executors.processes.port import Plain

ADDRESS: Final = "STAGEFLOW_DASK"  #: environment variable with a scheduler's address
_ids = itertools.count(1 << 40)  # of calls begun by `submit`: none of the engine's


class _Task(msgspec.Struct, eq=False):
    """One call in hand."""

    call: Call
    deliver: Deliver
    future: Any = None
    started: float = 0.0
    reason: str | None = None


class DaskExecutor:
    """Runs each call as one task. The cluster is `cluster` (an address, a cluster object or a client), else the address
    in STAGEFLOW_DASK, else the client that is current in this process; a client that was given is left open.

    The workers must be able to import `stageflow` in the same version. Notes arrive with the outcome. `cancel` takes
    back what has not begun and sets a flag on the workers; `force` gives a running task up: its thread ends when its
    function does. A task whose worker dies is run again by Dask itself as often as its `allowed-failures` says; after
    that its outcome is LOST.
    """

    def __init__(self, cluster: Any = None) -> None:
        self._cluster = cluster
        self._client: Any = None
        self._own = False
        self._slots = 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[int, _Task] = {}
        self._functions: dict[int, bytes] = {}
        self._token = uuid.uuid4().hex
        self._talk: ThreadPoolExecutor | None = None  # calls of the client may block
        self.on_note: Noted | None = None
        self.closed = False

    @property
    def lane(self) -> str:
        """Always "dask"."""
        return "dask"

    @property
    def slots(self) -> int:
        """Threads of the cluster's workers when the lane was opened."""
        return self._slots

    async def __aenter__(self) -> DaskExecutor:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose(grace=5.0)

    async def open(self) -> None:
        """Connect to the cluster and bind to the running loop. Raises DefinitionError where there is none."""
        if self.closed:
            raise LaneClosedError("the dask lane is closed")
        self._loop = asyncio.get_running_loop()
        self._talk = ThreadPoolExecutor(1, "stageflow-dask")
        try:
            await self._loop.run_in_executor(self._talk, self._connect)
        except BaseException:
            self._talk.shutdown(wait=False)
            raise

    def _connect(self) -> None:
        try:
            import distributed as untyped
        except ImportError as error:
            raise DefinitionError("the dask lane needs distributed", hint="pip install 'stageflow[dask]'") from error
        distributed: Any = untyped
        given = self._cluster or os.environ.get(ADDRESS)
        if isinstance(given, distributed.Client):
            self._client = given
        elif given:
            self._client, self._own = distributed.Client(given, set_as_default=False), True
        else:
            try:
                self._client = distributed.Client.current()
            except ValueError:
                raise DefinitionError(
                    "the dask lane knows no cluster",
                    hint=f"set {ADDRESS}=tcp://host:8786, or open a distributed.Client",
                ) from None
        self._slots = max(1, sum(self._client.nthreads().values()))
        self._client.subscribe_topic(self._token, self._began)

    def _began(self, event: tuple[Any, Any]) -> None:
        """On the client's thread: a worker has entered a call."""
        task = self._tasks.get(event[1])
        if task is not None and not task.started:
            task.started = time.monotonic()

    # ------------------------------------------------------------ calls

    def start(self, call: Call, deliver: Deliver) -> None:
        """Submit `call`; returns at once."""
        loop, talk = self._loop, self._talk
        if loop is None or talk is None or self.closed:
            raise LaneClosedError("the dask lane is not open", hint="use `async with DaskExecutor() as lane:`")
        task = self._tasks[call.id] = _Task(call, deliver)
        try:
            function = self._functions.get(call.shipped.key)
            if function is None:
                if len(self._functions) >= remote.KEPT:
                    self._functions.pop(next(iter(self._functions)))
                function = self._functions[call.shipped.key] = cloudpickle.dumps(call.shipped.function, 5)
            args = cloudpickle.dumps([arg.load() if isinstance(arg, Payload) else arg for arg in call.args], 5)
        except Exception as error:
            refused = NotShippableError(f"{call.shipped.label}: {type(error).__name__}: {error}"[:2000])
            outcome = Outcome(call.id, OutcomeKind.REFUSED, error=capture(refused, lane="dask"))
            loop.call_soon(self._end, task, outcome)
            return
        talk.submit(self._submit, task, function, args)

    def _submit(self, task: _Task, function: bytes, args: bytes) -> None:
        """On the talking thread."""
        if task.reason is not None:
            self._on_loop(self._end, task, Outcome(task.call.id, OutcomeKind.CANCELLED))
            return
        try:
            task.future = self._client.submit(
                _on_worker, (self._token, task.call.id), task.call.shipped.key, function, args, pure=False, retries=0
            )
            task.future.add_done_callback(lambda future: self._done(task, future))
        except Exception as error:
            self._on_loop(self._end, task, self._lost(task, error))

    def _done(self, task: _Task, future: Any) -> None:
        """On a thread of the client."""
        try:
            if future.status == "cancelled":
                outcome, parts, notes = Outcome(task.call.id, OutcomeKind.CANCELLED), [], []
            else:
                data: bytes = future.result()
                report = remote.Report(*cloudpickle.loads(data))
                parts, notes = report.parts, report.notes
                outcome = Outcome(
                    task.call.id,
                    report.kind,
                    report.value,
                    report.meta,
                    error=report.error,
                    worker_pid=report.pid,
                    started=task.started or time.monotonic() - report.seconds,
                    seconds=report.seconds,
                    cpu_seconds=report.cpu_seconds,
                    bytes_out=len(data),
                )
        except BaseException as error:
            outcome, parts, notes = self._lost(task, error), [], []
        self._on_loop(self._end, task, outcome, parts, notes)

    def _lost(self, task: _Task, error: BaseException) -> Outcome:
        if type(error).__name__ in ("CancelledError", "FutureCancelledError"):
            return Outcome(task.call.id, OutcomeKind.CANCELLED)
        died = WorkerDiedError(
            f"{task.call.shipped.label} was lost on the cluster: {type(error).__name__}: {error}"[:2000]
        )
        return Outcome(task.call.id, OutcomeKind.LOST, error=capture(died, lane="dask"), suspect=True)

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(function, *args)
            except RuntimeError:
                pass  # the loop is closed: nobody waits any more

    def _end(self, task: _Task, outcome: Outcome, parts: list[tuple[Any, Any]] | None = None, notes: Any = ()) -> None:
        if self._tasks.pop(task.call.id, None) is None:
            return  # given up
        for kind, data in notes:
            if self.on_note is not None:
                self.on_note(task.call.id, kind, data)
        for value, meta in parts or ():
            task.deliver(Outcome(task.call.id, value=value, meta=meta, final=False, started=task.started))
        task.future = None
        task.deliver(outcome)

    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Take back what has not begun; set the flag of what runs; with `force` give it up."""
        task, talk = self._tasks.get(call_id), self._talk
        if task is None or talk is None:
            return
        if task.reason is None:
            task.reason = reason
            talk.submit(self._stop, task, reason)
        if (force or not task.started) and self._loop is not None:
            talk.submit(self._give_up, task)
            meta = {"abandoned": True} if task.started else None
            self._loop.call_soon(self._end, task, Outcome(call_id, OutcomeKind.CANCELLED, meta=meta))

    def _stop(self, task: _Task, reason: str) -> None:
        try:
            self._client.run(remote.stop, (self._token, task.call.id), reason, on_error="ignore")
        except Exception:
            pass  # best effort: a cluster that cannot be reached runs nothing either

    @staticmethod
    def _give_up(task: _Task) -> None:
        future = task.future
        if future is not None:
            future.cancel()

    def encode(self, value: Any) -> Any:
        """The value itself."""
        return value

    def running_since(self, call_id: int) -> float | None:
        """When this process heard that the call was entered."""
        task = self._tasks.get(call_id)
        return task.started or None if task is not None else None

    def progress_of(self, call_id: int) -> tuple[float, float] | None:
        """Nothing is shared with the cluster."""
        return None

    async def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn(*args, **kwargs)` as a call of this lane and return its result; raises what it raised."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Outcome] = loop.create_future()
        call = Call(
            next(_ids), Shipped(Plain(fn), label=getattr(fn, "__qualname__", repr(fn))), (kwargs or None, *args)
        )
        self.start(call, lambda outcome: ended.set_result(outcome) if outcome.final and not ended.done() else None)
        try:
            outcome = await ended
        except asyncio.CancelledError:
            self.cancel(call.id, reason="cancelled by the caller")
            raise
        if outcome.error is not None:
            raise revive(outcome.error)
        if outcome.kind is OutcomeKind.CANCELLED:
            raise asyncio.CancelledError
        return outcome.value

    async def aclose(self, *, grace: float) -> None:
        """Ask every call to stop, wait up to `grace` seconds, give up the rest; the client is closed if it is ours."""
        if self._loop is None or self._talk is None:
            self.closed = True
            return
        self.closed = True
        for call_id in list(self._tasks):
            self.cancel(call_id, reason="the lane is closing")
        deadline = time.monotonic() + grace
        while self._tasks and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for call_id in list(self._tasks):
            self.cancel(call_id, reason="the lane is closing", force=True)
        loop, talk = self._loop, self._talk
        await loop.run_in_executor(talk, self._disconnect)
        talk.shutdown()
        self._loop = self._talk = self._client = None

    def _disconnect(self) -> None:
        self._client.unsubscribe_topic(self._token)
        if self._own:
            self._client.close()


def _on_worker(identity: tuple[str, int], key: int, function: bytes, args: bytes) -> bytes:
    """A task of the cluster."""
    import distributed

    distributed.get_worker().log_event(identity[0], identity[1])
    return remote.run("dask", identity, key, function, args)
