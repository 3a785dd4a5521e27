"""A run that was started and not waited for, and what a run does with the PipelineContext it was started with."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from stageflow.context.pipeline_context import PipelineContext
from stageflow.core.errors import DefinitionError
from stageflow.events.event import Event
from stageflow.pipeline.spec import Role
from stageflow.runtime.result import RunResult

if TYPE_CHECKING:
    from stageflow.events.fanout import FanOut
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.job import Job


class RunHandle:
    """A run under way, as `Engine.start` returns it. `await` it for the RunResult; dropping it does not stop the run.

    `cancel` may be called from any thread; everything else belongs to the loop of the run.
    """

    __slots__ = ("_driver", "_job", "_task")

    def __init__(self, driver: Driver, job: Job, task: asyncio.Task[RunResult]) -> None:
        self._driver = driver
        self._job = job
        self._task = task

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self._job.run_id

    @property
    def done(self) -> bool:
        """True once the result is there."""
        return self._task.done()

    def cancel(
        self,
        reason: str = "cancelled",
        *,
        stage: Any = None,
        item: int | tuple[int, ...] | None = None,
        force: bool = False,
    ) -> None:
        """Stop the run, or one stage of it (by name or function), or one item of a map or sink (its index, or its
        index path as `ctx.item` has it). `force`, of a whole run, does not wait for the grace.

        A stopped stage ends FAIL with StageCancelledError and without a retry; its failure mode decides what that means
        for the run. A stopped item ends CANCELLED whether it has come in yet, waits or runs: it is absent behind its
        stage like one that was dropped, it is listed in `failures`, and the run goes on in every failure mode. An item
        that has been through its stage already stays what it has become.

        Raises:
            KeyError: the graph has no such stage.
            DefinitionError: `item` without a stage that has items to stop.
        """
        driver, job = self._driver, self._job
        number = None if stage is None else job.graph.number_of(stage)
        path = (item,) if isinstance(item, int) else tuple(item or ())
        if item is not None and (number is None or job.code.layout.roles[number] not in (Role.MAP, Role.SINK)):
            raise DefinitionError(
                "only items of maps and sinks can be cancelled one by one",
                hint='say which: handle.cancel("why", stage="the map", item=3)',
            )
        if path and (len(path) > 1) != (number in job.code.nested):
            raise DefinitionError(
                f"stage {job.graph.specs[number or 0].name!r} has no item {item!r}",
                hint="behind a flat-map an item is known by its index path, elsewhere by its index: `ctx.item` has it",
            )

        def on_loop() -> None:
            if number is None:
                driver.cancel(job, reason, force=force)
            elif path:
                driver.stop_item(job, number, path, reason)
            else:
                driver.stop_stage(job, number, reason)

        try:
            driver.loop.call_soon_threadsafe(on_loop)
        except RuntimeError:
            pass  # the loop is closed: the run is over

    def result(self) -> RunResult:
        """The result of a run that has ended; asyncio.InvalidStateError before."""
        return self._task.result()

    def __await__(self) -> Generator[Any, None, RunResult]:
        return asyncio.shield(self._task).__await__()

    def __repr__(self) -> str:
        return f"<RunHandle {self._job.graph.name!r} {self.run_id} {'done' if self.done else 'under way'}>"


class ParentSinks:
    """Passes the events of a child run that has sinks of its own on to those of its parent."""

    wants_blocks = True  # they are merged there

    def __init__(self, above: FanOut) -> None:
        self._above = above
        self.wants_spans = above.wants_spans
        for mark in ("exports", "shows_prints", "shows_logs"):
            setattr(self, mark, any(getattr(sink, mark, False) for sink in above.sinks))

    def emit(self, event: Event) -> None:
        """Pass it on."""
        self._above.emit(event)


class ContextSink:
    """Passes the events of a run on to the emitter of its PipelineContext; those of its children with their
    `child_run_id`."""

    __slots__ = ("_context", "_run_id")

    def __init__(self, context: PipelineContext) -> None:
        self._context = context
        self._run_id: str | None = None  # of the first event

    def emit(self, event: Event) -> None:
        """`try_emit_event` with the event's data and where it happened."""
        data = dict(event.data)
        for name in ("stage", "item", "attempt", "lane"):
            value = getattr(event, name)
            if value is not None:
                data[name] = value
        if event.run_id is not None:
            if self._run_id is None:
                self._run_id = event.run_id
            elif event.run_id != self._run_id:
                data["child_run_id"] = event.run_id
        self._context.try_emit_event(event.type, data)
