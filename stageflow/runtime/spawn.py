"""Child runs: a graph as a stage of another, or started from inside a stage. A child is cancelled with its parent,
not the reverse.

A child sees its parent's snapshot, with inputs of its own and a run id of its own. Its parent's sinks hear of it:
`pipeline.spawned_child`, then `pipeline.child_completed`, `pipeline.child_failed` or `pipeline.child_cancelled`, and
between them everything that is told of the child, with the child's run id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.identity import new_run_id
from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.errors import DefinitionError
from stageflow.events import names
from stageflow.pipeline.graph import StageGraph
from stageflow.runtime.result import RunResult
from stageflow.scheduler import signals as sig

if TYPE_CHECKING:
    from stageflow.events.event import Event
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.job import Job

#: runs below the one the user started; a graph that contains itself would never end
MAX_DEPTH: Final = 5

_NOT_TOLD: Final = frozenset({names.STAGE_PRINT, names.STAGE_LOG, names.ENGINE_SAMPLE})


def child_snapshot(snapshot: ContextSnapshot, inputs: Mapping[str, Any] | None) -> ContextSnapshot:
    """The snapshot of a child run: the parent's, with other inputs and a fresh run id."""
    identity = msgspec.structs.replace(snapshot.run_id, pipeline_run_id=new_run_id())
    return msgspec.structs.replace(snapshot, run_id=identity, inputs=dict(inputs or {}))


def _check_depth(stage: str, depth: int) -> None:
    """`depth` is the parent's."""
    if depth >= MAX_DEPTH:
        raise DefinitionError(
            f"stage {stage!r} would start a child run at depth {depth + 1}; the limit is {MAX_DEPTH}",
            hint="a graph that contains itself never ends; flatten the nesting",
            depth=depth + 1,
        )


def _ended(child_run_id: str, result: RunResult) -> tuple[str, dict[str, Any]]:
    """The event that tells the parent's sinks how the child ended."""
    if result.success:
        return "pipeline.child_completed", {"child_run_id": child_run_id, "duration_ms": result.duration_ms}
    about = {"child_run_id": child_run_id, "duration_ms": result.duration_ms}
    if result.cancelled:
        return "pipeline.child_cancelled", {**about, "reason": result.cancel_reason}
    return "pipeline.child_failed", {**about, "error": result.error}


class _Told:
    """Sends what is told of a child run on another loop to the sinks of its parent's, as notes of the attempt that
    started it. What it prints and logs arrives as the attempt's own."""

    __slots__ = ("_heard", "_note")

    def __init__(self, ctx: Any, heard: bool) -> None:
        self._note = ctx._port.note
        self._heard = heard

    def emit(self, event: Event) -> None:
        """Send it."""
        if event.type not in _NOT_TOLD and not event.type.startswith("worker."):
            self._note("child", {**msgspec.structs.asdict(event), "heard": self._heard})


async def run_child(
    driver: Driver,
    parent: Job,
    graph: StageGraph,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    stage: str,
    task: int,
) -> RunResult:
    """Run `graph` as a child of `parent`, started by its attempt `task`, on the same loop."""
    from stageflow.runtime.options import RunOptions

    _check_depth(stage, parent.depth)
    engine = driver.engine
    state, job = await engine.begin(
        graph,
        snapshot=child_snapshot(parent.snapshot, inputs),
        options=RunOptions.make(options),
        parent=parent,
        waited=task,
        depth=parent.depth + 1,
    )
    parent.children.add(job.id)
    running = driver.running.get(task)
    if running is not None:
        running.children = {*(running.children or ()), job.id}
    driver._event(
        "pipeline.spawned_child", parent, stage, None, None, None, {"child_run_id": job.run_id, "depth": job.depth}
    )
    if parent.id not in driver.jobs or running is None:
        driver.cancel(job, "the parent run is over")
    try:
        result: RunResult = await asyncio.shield(job.finished)
    except asyncio.CancelledError:
        driver.cancel(job, "the parent stage was cancelled")
        await asyncio.wait([job.finished])
        raise
    finally:
        if job.finished.done() and not job.finished.cancelled() and job.finished.exception() is None:
            type, data = _ended(job.run_id, job.finished.result())
            driver._event(type, parent, stage, None, None, None, data)
        await engine.end(state, job)
    return result


async def spawn(ctx: Any, graph: StageGraph, inputs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> RunResult:
    """`ctx.spawn` of an attempt on the engine's loop; elsewhere the child runs on an engine of that process."""
    found = _attempt(ctx)
    if found is None:
        return await asyncio.get_running_loop().run_in_executor(None, lambda: spawn_sync(ctx, graph, inputs, options))
    driver, job, task = found
    loop = asyncio.get_running_loop()
    if loop is driver.loop:
        return await _waiting(driver, job, task, ctx, graph, inputs, options)
    # a coroutine stage on a loop of a lane's thread: the child runs on the engine's
    return await asyncio.wrap_future(
        asyncio.run_coroutine_threadsafe(_waiting(driver, job, task, ctx, graph, inputs, options), driver.loop)
    )


async def _waiting(
    driver: Driver,
    job: Job,
    task: int,
    ctx: Any,
    graph: StageGraph,
    inputs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> RunResult:
    """Run the child; the slot of the attempt is free meanwhile, and its thread has a stand-in."""
    running = driver.running.get(task)
    waits = getattr(running.executor, "waits", None) if running is not None else None
    driver.signal(sig.ChildrenWait(task, True))
    if waits is not None:
        waits(task, True)
    try:
        return await run_child(driver, job, graph, inputs or {}, options, stage=ctx.stage_name, task=task)
    finally:
        if waits is not None:
            waits(task, False)
        driver.signal(sig.ChildrenWait(task, False))


def spawn_sync(ctx: Any, graph: StageGraph, inputs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> RunResult:
    """`ctx.spawn_sync`: on the parent's loop from its threads, else on an engine of the worker's own (without a
    process lane).

    Raises:
        DefinitionError: called on the engine's loop itself, which it would stop; or the depth limit.
    """
    found = _attempt(ctx)
    if found is None:
        return _elsewhere(ctx, graph, inputs, options, None)
    driver, job, task = found
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is driver.loop and ctx.lane == "inline":
        return _beside(lambda: _elsewhere(ctx, graph, inputs, options, driver.engine))
    if running is driver.loop:
        raise DefinitionError(
            f"stage {ctx.stage_name!r} runs on the engine's loop, which spawn_sync would stop",
            hint='write the stage as a coroutine with `await ctx.spawn(...)`, or declare it executor="thread"',
        )
    waiting = _waiting(driver, job, task, ctx, graph, inputs, options)
    return asyncio.run_coroutine_threadsafe(waiting, driver.loop).result()


def _beside(run: Callable[[], RunResult]) -> RunResult:
    """Run in a thread with a loop of its own while this one waits: the inline lane blocks its loop in any case."""
    with ThreadPoolExecutor(1, thread_name_prefix="stageflow-child") as thread:
        return thread.submit(run).result()


def _elsewhere(
    ctx: Any, graph: StageGraph, inputs: Mapping[str, Any] | None, options: Mapping[str, Any], engine: Any
) -> RunResult:
    """A child run on another loop than its parent's: in a worker (`engine` None: its default one), or beside an
    inline stage. Events and cancellation cross as the attempt's own."""
    from stageflow.runtime.default import default_engine
    from stageflow.runtime.options import RunOptions

    _check_depth(ctx.stage_name, ctx.depth)
    snapshot = child_snapshot(ctx.snapshot, inputs)
    child_run_id = str(snapshot.run_id.pipeline_run_id)
    token = ctx.token.child()
    own = options.get("token")
    unlink = own.on_cancel(token.cancel) if own is not None else None
    ctx.emit("pipeline.spawned_child", {"child_run_id": child_run_id, "depth": ctx.depth + 1})
    try:
        sinks = (*(options.get("event_sinks") or ()), _Told(ctx, heard=engine is not None))
        chosen = RunOptions.make({**options, "token": token, "event_sinks": sinks})
        runs = engine if engine is not None else default_engine()
        result: RunResult = runs.run_child(graph, snapshot, chosen, parent_run_id=ctx.run_id, depth=ctx.depth + 1)
    finally:
        token.close()
        if unlink is not None:
            unlink()
    ctx.emit(*_ended(child_run_id, result))
    return result


def _attempt(ctx: Any) -> tuple[Driver, Job, int] | None:
    """The driver and run of an attempt of this process, by its port; None in a worker."""
    call = getattr(ctx._port, "call", None)
    if call is None:
        return None
    from stageflow.runtime.running import live_drivers

    for driver in list(live_drivers):
        running = driver.running.get(call.id)
        if running is not None and running.job.run_id == ctx.run_id:
            return driver, running.job, call.id
    return None
