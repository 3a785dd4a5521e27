"""`StageContext`: what a running attempt sees and may do, identical in every lane."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from stageflow.context.cancellation import CancellationToken
from stageflow.context.inputs import StageInputs
from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.errors import DefinitionError, StageCancelledError
from stageflow.core.kinds import StageKind
from stageflow.core.output import StageArtifact

if TYPE_CHECKING:
    from stageflow.context.cleanup import CleanupRegistry
    from stageflow.core.worker import WorkerPort

#: seconds between two notes of progress of an attempt
NOTE_SECONDS: Final = 0.2


class StageContext:
    """The context of one attempt. Valid while the attempt runs; do not keep it.

    `item` is the index path of the element (None outside maps), `attempt` is 1-based, `deadline` is a
    `time.monotonic` second or
    None, `tokens` maps token names to the indices this attempt holds, `feedback` is what a guard said before it asked
    for a re-run.
    """

    __slots__ = (
        "_artifacts",
        "_cleanup",
        "_extras",
        "_inputs",
        "_noted",
        "_port",
        "_program",
        "_snapshot",
        "_token",
        "attempt",
        "deadline",
        "item",
        "run_id",
        "stage_name",
    )

    def __init__(
        self,
        program: Any,
        port: WorkerPort,
        run_id: str,
        attempt: int,
        item: tuple[int, ...] | None,
        snapshot: Any,
        inputs: StageInputs,
        deadline: float | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self._program = program
        self._port = port
        self.run_id: str = run_id
        self.attempt: int = attempt
        self.item = item
        self._noted = 0.0  # the second from which a note of progress is told again
        self.stage_name: str = program.name
        self._snapshot = snapshot
        self._inputs = inputs
        self.deadline = deadline
        self._extras = extras
        self._cleanup: CleanupRegistry | None = None
        self._artifacts: list[StageArtifact] | None = None
        self._token: CancellationToken | None = None

    # ------------------------------------------------------------ what it sees

    @property
    def snapshot(self) -> ContextSnapshot:
        """The immutable input of the run."""
        found = self._snapshot
        if found is None:
            found = self._snapshot = ContextSnapshot()
        return found  # type: ignore[no-any-return]

    @property
    def inputs(self) -> StageInputs:
        """The outputs of the declared dependencies."""
        return self._inputs

    @property
    def kind(self) -> StageKind:
        """The stage's kind."""
        return StageKind(self._program.kind)

    @property
    def lane(self) -> str:
        """Where this attempt runs."""
        return self._port.lane

    @property
    def token(self) -> CancellationToken:
        """The cancellation of this attempt: set when the attempt is asked to stop, whatever the lane.

        Cancelling it reaches what hangs on it (its children, a task group) and not the run: a stage ends the run by
        returning `StageOutput.cancel(reason)`.
        """
        token = self._token
        if token is None:
            port = self._port

            def asked() -> str | None:
                return (port.cancel_reason() or "cancelled") if port.cancelled() else None

            token = self._token = CancellationToken(probe=asked, watch=port.on_cancel)
        return token

    @property
    def tokens(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the resource tokens held, by name."""
        held: Mapping[str, tuple[int, ...]] = (self._extras or {}).get("tokens", {})
        return held

    @property
    def feedback(self) -> Mapping[str, Any] | None:
        """What the guard said that asked for this re-run: `guard`, `error`, `data`, `attempt`; None on a first run."""
        return (self._extras or {}).get("feedback")

    @property
    def log(self) -> logging.Logger | logging.LoggerAdapter[Any]:
        """A standard logger whose records carry run, stage, item and attempt."""
        return logging.LoggerAdapter(
            logging.getLogger(f"stageflow.stage.{self.stage_name}"),
            {
                "run_id": self.run_id,
                "stage": self.stage_name,
                "item": self.item,
                "attempt": self.attempt,
                "lane": self.lane,
            },
        )

    # ------------------------------------------------------------ what it may do

    def raise_if_cancelled(self) -> None:
        """Raise StageCancelledError if the attempt was asked to stop or its deadline has passed."""
        if self._port.cancelled():
            reason = self._port.cancel_reason() or "cancelled"
            raise StageCancelledError(f"stage {self.stage_name!r} was cancelled: {reason}", reason=reason)

    def remaining(self) -> float | None:
        """Seconds until the deadline, never below 0; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def progress(self, done: float, total: float = 0.0, note: str | None = None) -> None:
        """Publish how far the attempt is. Costs no message: the engine looks now and then. A note is one, at most
        five times a second."""
        self._port.progress(done, total)
        if note is not None and (now := time.monotonic()) >= self._noted:
            self._noted = now + NOTE_SECONDS
            self._port.note("event", self._said("stage.progress", {"done": done, "total": total, "note": note}))

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """The attempt does nothing but wait inside: for a person, a lock, another system; `reason` is one word.

        The time shows as waiting for `reason` wherever the run's waits are shown. It is part of the attempt: timeouts
        run on.
        """
        began = time.monotonic()
        self.emit("stage.waiting", {"reason": reason})
        try:
            yield
        finally:
            self.emit("stage.waited", {"reason": reason, "seconds": time.monotonic() - began})

    def emit(self, type: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event of this stage to the run's sinks. Never raises for a sink's sake."""
        self._port.note("event", self._said(type, dict(data or {})))

    def _said(self, type: str, data: dict[str, Any]) -> dict[str, Any]:
        """An event of this attempt, as its port takes it."""
        return {"type": type, "data": data, "stage": self.stage_name, "item": self.item, "attempt": self.attempt}

    def buffer(self, nbytes: int) -> memoryview:
        """Writable memory that is already shared: a result that lives in it is not copied on its way to another
        process."""
        return self._port.buffer(nbytes)

    def empty(self, shape: int | tuple[int, ...], dtype: Any = "float64") -> Any:
        """An uninitialised numpy array in memory that is already shared (see `buffer`)."""
        import numpy as np

        wanted = np.dtype(dtype)
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        count = 1
        for dim in dims:
            count *= int(dim)
        if wanted.hasobject or count == 0:
            return np.empty(dims, wanted)
        return np.frombuffer(self._port.buffer(count * wanted.itemsize), dtype=wanted, count=count).reshape(dims)

    def resource(self, name: str) -> Any:
        """The worker-scoped resource `name`: made once per process by the factory given to the engine."""
        from stageflow.context.resources import obtain

        return obtain(self._program.resource_scope, self._program.resources, name)

    def artifact(self, artifact_type: str, id: str, name: str, data: Any = None, **metadata: Any) -> StageArtifact:
        """Attach a named product to this attempt's output and return it."""
        made = StageArtifact(artifact_type=artifact_type, id=id, name=name, data=data, metadata=metadata)
        if self._artifacts is None:
            self._artifacts = []
        self._artifacts.append(made)
        return made

    def defer(self, callback: Callable[..., Any], *args: Any, name: str | None = None, survive: bool = False) -> None:
        """Run `callback(*args)` when the attempt ends, whatever the outcome; last registered first, where the attempt
        ran. All cleanups of an attempt share the engine's grace; an async one that takes longer is cancelled.

        With `survive` the callback is also sent to the parent before this call returns, and runs there (on the thread
        lane) if the
        worker is lost; it must be picklable then.
        """
        cleanup = self._cleanup
        if cleanup is None:
            from stageflow.context.cleanup import CleanupRegistry  # which imports asyncio

            cleanup = self._cleanup = CleanupRegistry(blocking="here")
        if survive:
            try:
                shipped = pickle.dumps((callback, args), protocol=5)
            except Exception as error:
                raise DefinitionError(
                    f"stage {self.stage_name!r}: defer(survive=True) needs a callback that pickles: {error}",
                    hint="use a function of an importable module and plain arguments",
                ) from error
            self._port.note("defer", {"index": cleanup.pending_count, "call": shipped, "name": name})
        cleanup.register(callback, *args, name=name or getattr(callback, "__qualname__", repr(callback)))

    async def spawn(self, graph: Any, inputs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Run `graph` as a child of this run and return its RunResult; its slot is given back while it waits.

        The child gets its own identity with a link to this run; cancelling this run cancels it. Async stages only; a
        synchronous
        stage uses `spawn_sync`.
        """
        return await self._spawner().spawn(self, graph, inputs, options)

    def spawn_sync(self, graph: Any, inputs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """`spawn` for synchronous stages: blocks until the child run has ended."""
        return self._spawner().spawn_sync(self, graph, inputs, options)

    def _spawner(self) -> Any:
        from importlib import import_module  # a room above: reached by name, on use

        return import_module("stageflow.runtime.spawn")

    @property
    def depth(self) -> int:
        """How many runs are above this one (0 for a run started by the user)."""
        return int((self._extras or {}).get("depth", 0))

    def __repr__(self) -> str:
        where = f" item={self.item}" if self.item is not None else ""
        return f"<StageContext {self.stage_name!r} attempt={self.attempt}{where} run={self.run_id}>"
