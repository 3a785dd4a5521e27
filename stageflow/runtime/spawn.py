"""Child runs: a graph as a stage of another, or started from inside a stage. A child is cancelled with its parent,
not the reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from stageflow.core.errors import DefinitionError
from stageflow.pipeline.graph import StageGraph
from stageflow.runtime.result import RunResult

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.job import Job

MAX_DEPTH: Final = 5


async def run_child(
    driver: Driver,
    parent: Job,
    graph: StageGraph,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    stage: str,
) -> RunResult:
    """Run `graph` as a child of `parent` on the same loop."""
    from stageflow.runtime.engine import RunOptions

    if parent.depth + 1 >= MAX_DEPTH:
        raise DefinitionError(
            f"stage {stage!r} would start a child run at depth {parent.depth + 1}; the limit is {MAX_DEPTH}",
            hint="a graph that contains itself never ends; flatten the nesting",
        )
    engine = driver.engine
    state, job = await engine.begin(
        graph, inputs, options=RunOptions.make(options), parent=parent, depth=parent.depth + 1
    )
    parent.children.add(job.id)
    driver._event(
        "pipeline.spawned_child", parent, stage, None, None, None, {"child_run_id": job.run_id, "depth": job.depth}
    )
    if parent.id not in driver.jobs:
        driver.cancel(job, "the parent run is over")
    try:
        result: RunResult = await asyncio.shield(job.finished)
    except asyncio.CancelledError:
        driver.cancel(job, "the parent stage was cancelled")
        await asyncio.wait([job.finished])
        raise
    finally:
        await engine.end(state, job)
    if result.success:
        data = {"child_run_id": job.run_id, "duration_ms": result.duration_ms}
        driver._event("pipeline.child_completed", parent, stage, None, None, None, data)
    else:
        data = {"child_run_id": job.run_id, "error": result.error or result.cancel_reason}
        driver._event("pipeline.child_failed", parent, stage, None, None, None, data)
    return result


async def spawn(ctx: Any, graph: StageGraph, inputs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> RunResult:
    """`ctx.spawn` of an attempt on the engine's loop; elsewhere the child runs on an engine of that process."""
    from stageflow.scheduler import signals as sig

    found = _attempt(ctx)
    if found is None:
        return await asyncio.get_running_loop().run_in_executor(None, lambda: spawn_sync(ctx, graph, inputs, options))
    driver, job, task = found
    driver.signal(sig.ChildrenWait(task, True))
    try:
        return await run_child(driver, job, graph, inputs or {}, options, stage=ctx.stage_name)
    finally:
        driver.signal(sig.ChildrenWait(task, False))


def spawn_sync(ctx: Any, graph: StageGraph, inputs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> RunResult:
    """`ctx.spawn_sync`: on the parent's loop from its threads, else on an engine of the worker's own (without a
    process lane)."""
    from stageflow.runtime.engine import default_engine
    from stageflow.scheduler import signals as sig

    found = _attempt(ctx)
    if found is not None:
        driver, job, task = found

        async def on_loop() -> RunResult:
            driver.signal(sig.ChildrenWait(task, True))
            try:
                return await run_child(driver, job, graph, inputs or {}, options, stage=ctx.stage_name)
            finally:
                driver.signal(sig.ChildrenWait(task, False))

        return asyncio.run_coroutine_threadsafe(on_loop(), driver.loop).result()
    if ctx.depth + 1 >= MAX_DEPTH:
        raise DefinitionError(
            f"stage {ctx.stage_name!r} would start a child run at depth {ctx.depth + 1}", depth=ctx.depth
        )
    from stageflow.context.cancellation import CancellationToken

    token = CancellationToken()
    ctx.token.on_cancel(lambda: token.cancel(ctx.token.reason or "the parent stage was cancelled"))
    return default_engine().run(graph, inputs, token=token, **options)


def _attempt(ctx: Any) -> tuple[Driver, Job, int] | None:
    """The driver and run of an attempt of this process, by its port; None in a worker."""
    call = getattr(ctx._port, "call", None)
    if call is None:
        return None
    from stageflow.runtime.driver import live_drivers

    for driver in list(live_drivers):
        running = driver.running.get(call.id)
        if running is not None and running.job.run_id == ctx.run_id:
            return driver, running.job, call.id
    return None
