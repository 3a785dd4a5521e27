"""Many runs of one graph: pulled lazily, a bounded number at once, in order or as they finish."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.errors import DefinitionError
from stageflow.pipeline.graph import StageGraph
from stageflow.runtime.result import RunResult

if TYPE_CHECKING:
    from stageflow.runtime.engine import Engine
    from stageflow.runtime.options import RunOptions


async def stream_runs(
    engine: Engine,
    graph: StageGraph,
    snapshots: Iterable[Any] | AsyncIterable[Any],
    *,
    ordered: bool,
    most: int,
    options: RunOptions,
) -> AsyncGenerator[RunResult, None]:
    """Results of one run per snapshot. Closing it early cancels what is in flight and returns when that has stopped."""
    items = _each(snapshots)
    window: deque[Any] = deque()  # (state, job) in order of start
    waiting: dict[asyncio.Future[Any], Any] = {}
    index = 0
    more = True
    try:
        while True:
            while more and len(window) < most:
                try:
                    item = await items.__anext__()
                except StopAsyncIteration:
                    more = False
                    break
                inputs, snapshot = _parse(item, index)
                pair = await engine.begin(graph, inputs, snapshot=snapshot, options=options, index=index)
                window.append(pair)
                waiting[pair[1].finished] = pair
                index += 1
            if not window:
                return
            if ordered:
                pair = window[0]
                await asyncio.wait([pair[1].finished])
            else:
                done, _ = await asyncio.wait(list(waiting), return_when=asyncio.FIRST_COMPLETED)
                pair = min((waiting[future] for future in done), key=lambda found: found[1].index)
            window.remove(pair)
            del waiting[pair[1].finished]
            await engine.end(*pair)
            yield pair[1].finished.result()
    finally:
        for state, job in window:
            state.driver.cancel(job, "the consumer of the stream left")
        for state, job in window:
            while not job.finished.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([job.finished])
            await engine.end(state, job)
        with contextlib.suppress(Exception):
            await items.aclose()


async def _each(snapshots: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if hasattr(snapshots, "__aiter__"):
        async for item in snapshots:
            yield item
    else:
        for item in snapshots:
            yield item


def _parse(item: Any, index: int) -> tuple[Mapping[str, Any] | None, ContextSnapshot | None]:
    if isinstance(item, ContextSnapshot):
        return None, item
    if isinstance(item, Mapping):
        return item, None
    raise DefinitionError(
        f"stream: item {index} is {type(item).__name__}",
        hint="give a ContextSnapshot or a mapping of inputs",
        index=index,
    )
