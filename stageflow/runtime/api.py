"""What `graph.run`, `graph.execute`, `graph.stream` and `graph.run_many` do: choose the engine, split the options,
run.

The engine and the event loop are imported by the first run, once its fork server is on its way.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from stageflow.core.errors import DefinitionError
from stageflow.core.loading import uncollected
from stageflow.pipeline.graph import StageGraph
from stageflow.runtime.config import EngineConfig
from stageflow.runtime.early import fork_server_for

if TYPE_CHECKING:
    from stageflow.runtime.engine import Engine
    from stageflow.runtime.result import RunResult

_ENGINE: Final = "stageflow.runtime.engine"


def _split(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    from stageflow.runtime.options import split_options

    return split_options(config)


def _shared(engine: Engine | None) -> Engine:
    """The engine that was given, or that of the process."""
    if engine is not None:
        return engine
    from stageflow.runtime.default import default_engine

    return default_engine()


def _private(engine: Engine | None, of_engine: Mapping[str, Any]) -> Engine | None:
    """An engine for this call alone, where engine settings were given."""
    if not of_engine:
        return None
    if engine is not None:
        raise DefinitionError(
            f"engine= and engine settings ({', '.join(of_engine)}) were given together",
            hint="give the settings to Engine(...)",
        )
    from stageflow.runtime.engine import Engine

    return Engine(**of_engine)


def run(
    graph: StageGraph,
    inputs: Mapping[str, Any] | None = None,
    *,
    snapshot: Any = None,
    engine: Engine | None = None,
    **config: Any,
) -> RunResult:
    """Run once and block."""
    if _ENGINE not in sys.modules:
        settings = {name: value for name, value in config.items() if name in EngineConfig.__struct_fields__}
        with fork_server_for(graph, EngineConfig.make(**settings)):
            with uncollected():
                import_module(_ENGINE)
            return run(graph, inputs, snapshot=snapshot, engine=engine, **config)
    from stageflow.runtime.loops import no_running_loop

    no_running_loop("run", "result = await graph.execute(inputs=...)")
    of_run, of_engine = _split(config)
    private = _private(engine, of_engine)
    if private is not None:
        with private:
            return private.run(graph, inputs, snapshot=snapshot, **of_run)
    return _shared(engine).run(graph, inputs, snapshot=snapshot, **of_run)


async def execute(
    graph: StageGraph,
    ctx: Any = None,
    snapshot: Any = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    **config: Any,
) -> RunResult:
    """Run once on the running loop."""
    of_run, of_engine = _split(config)
    private = _private(engine, of_engine)
    if private is not None:
        async with private:
            return await private.execute(graph, inputs, ctx=ctx, snapshot=snapshot, **of_run)
    return await _shared(engine).execute(graph, inputs, ctx=ctx, snapshot=snapshot, **of_run)


def stream(
    graph: StageGraph,
    snapshots: Iterable[Any] | AsyncIterable[Any],
    *,
    ordered: bool = True,
    max_in_flight: int | None = None,
    engine: Engine | None = None,
    **config: Any,
) -> AsyncIterator[RunResult]:
    """Run once per snapshot."""
    of_run, of_engine = _split(config)
    private = _private(engine, of_engine)
    chosen = private or _shared(engine)
    results = chosen.stream(graph, snapshots, ordered=ordered, max_in_flight=max_in_flight, **of_run)
    return _closing(results, private) if private is not None else results


async def _closing(results: AsyncIterator[RunResult], private: Engine) -> AsyncIterator[RunResult]:
    async with private:
        try:
            async for result in results:
                yield result
        finally:
            await results.aclose()  # type: ignore[attr-defined]


def run_many(
    graph: StageGraph,
    snapshots: Iterable[Any],
    *,
    ordered: bool = True,
    max_in_flight: int | None = None,
    engine: Engine | None = None,
    **config: Any,
) -> Iterator[RunResult]:
    """`stream` without an event loop."""
    of_run, of_engine = _split(config)
    private = _private(engine, of_engine)
    chosen = private or _shared(engine)
    try:
        yield from chosen.run_many(graph, snapshots, ordered=ordered, max_in_flight=max_in_flight, **of_run)
    finally:
        if private is not None:
            private.close()
