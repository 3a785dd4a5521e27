"""`Engine`: keeps workers warm across runs, serves any number of loops and threads, closes everything it opened."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.errors import DefinitionError, LaneClosedError
from stageflow.core.executor import Executor
from stageflow.core.loading import leave, uncollected
from stageflow.runtime.clock import DriverClock, RealClock
from stageflow.runtime.config import ASYNC_SLOTS, EngineConfig
from stageflow.runtime.early import IN_WORKER, LOOK_AT, fork_server_for
from stageflow.runtime.loops import LoopState, OwnLoops, no_running_loop
from stageflow.runtime.options import RunOptions, from_context, only_run_keys, snapshot_of
from stageflow.runtime.surroundings import Surroundings

# What runs a graph (driver, scheduler, lanes, events) is imported by the methods that need it: a script that only
# builds a pipeline, or is still parsing its arguments, does not wait for it.
if TYPE_CHECKING:
    from stageflow.context.pipeline_context import PipelineContext
    from stageflow.events.fanout import FanOut
    from stageflow.pipeline.graph import StageGraph
    from stageflow.runtime.code import GraphCode
    from stageflow.runtime.handles import RunHandle
    from stageflow.runtime.job import Job
    from stageflow.runtime.result import RunResult

#: lane -> where its executor is. Loaded by name, on first use: the engine never imports an executor
LANES: Final[Mapping[str, str]] = {
    "async": "stageflow_executors.async_tasks:AsyncExecutor",
    "inline": "stageflow_executors.async_tasks:InlineExecutor",
    "thread": "stageflow_executors.threads:ThreadExecutor",
    "process": "stageflow_executors.processes.pool:ProcessExecutor",
    "dask": "stageflow_executors.cluster.dask_lane:DaskExecutor",
}
#: process tasks per worker that are handed over ahead of need when they are short
AHEAD: Final = 2

_scopes = itertools.count(1)


def load(path: str) -> Any:
    """What "module:name" names."""
    module, _, name = path.partition(":")
    with uncollected():
        return getattr(import_module(module), name)


class Engine:
    """Runs graphs. A sync and an async context manager; any number of runs, loops and threads at once.

    `Engine(EngineConfig(...))` or `Engine(processes=2, ...)`. Workers, shared memory and the fork server belong to
    the engine and to
    no loop; each loop that runs something has a scheduler of its own. `events` takes sinks for all runs:
    `engine.events.add(sink)`. `clock` and `lanes` (lane -> what makes its executor) are for tests.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        clock: DriverClock | None = None,
        lanes: Mapping[str, Callable[[], Executor]] | None = None,
        **fields: Any,
    ) -> None:
        if config is not None and fields:
            raise DefinitionError(
                "give Engine either a configuration or keywords, not both", hint="EngineConfig(**keywords)"
            )
        self.config = config.overridden(os.environ) if config is not None else EngineConfig.make(**fields)
        self.clock: DriverClock = clock if clock is not None else RealClock()
        self._made_by = dict(lanes or {})
        from stageflow.events.fanout import FanOut

        self.events = FanOut(self.config.event_sinks, redact=self.config.redact)
        self.closed = False
        self._scope = next(_scopes)
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._states: dict[int, LoopState] = {}
        self._own = OwnLoops()
        self._supply: Any = None
        self._in_worker = bool(os.environ.get(IN_WORKER))
        self._slots: dict[str, int] | None = None
        self._graphs: weakref.WeakSet[StageGraph] = weakref.WeakSet()
        self._around = Surroundings(self.config)
        self._exporter: Any = None  # of OpenTelemetry, where the program has set up providers
        self._started: set[asyncio.Task[RunResult]] = set()  # runs begun by `start`

    # ------------------------------------------------------------ what it has

    def slots(self) -> dict[str, int]:
        """Attempts at once, by lane."""
        if self._slots is None:
            processes = self.config.processes
            if processes is None:
                processes = load("stageflow_executors.processes.machine:usable_cores")()
            self._slots = {
                "async": ASYNC_SLOTS,
                "inline": 1,
                "thread": self.config.threads,
                "process": processes,
                "dask": 1024,
                "ray": 1024,
            }
        return self._slots

    def memory_bytes(self) -> int:
        """The byte budget of live values."""
        limit = self.config.memory_limit
        usable = 0
        if isinstance(limit, float):
            usable = load("stageflow_executors.processes.machine:usable_memory")()
        return self.config.memory_bytes(usable)

    def code(self, graph: StageGraph) -> GraphCode:
        """The graph with its lanes decided under this configuration."""
        config = self.config
        placement: Mapping[str, str] = config.placement
        self._graphs.add(graph)
        from stageflow.runtime.code import code_of

        made = code_of(
            graph,
            placement=placement,
            lane=config.lane,
            resources=config.resources,
            scope=self._scope,
            nested=self._in_worker,
            annotations=config.check_annotations,
            isolate=config.isolate,
            grace=config.grace,
        )
        return made

    def supply(self) -> Any:
        """The workers, shared by all loops."""
        with self._lock:
            if self._supply is None:
                config = self.config
                limit = config.worker_memory_limit
                self._supply = load("stageflow_executors.processes.supply:WorkerSupply")(
                    self.slots()["process"],
                    start_method=config.start_method,
                    inline_threshold=config.inline_threshold,
                    idle_timeout=config.idle_timeout,
                    memory_limit=self.memory_bytes(),
                    # an item larger than the budget passes alone: only the machine's memory stops it
                    hard_limit=max(self.memory_bytes(), load("stageflow_executors.processes.machine:usable_memory")()),
                    worker_memory_limit=_size(limit),
                    max_tasks_per_child=config.max_tasks_per_child,
                )
            return self._supply

    def _ahead(self, graph: StageGraph) -> None:
        """Ask for the first worker, where a stage that waits for no other wants one: it comes up while what runs the
        graph is imported."""
        if self._supply is not None or "process" in self._made_by or self._in_worker:
            return
        with fork_server_for(graph, self.config) as wanted:
            if wanted:
                code = self.code(graph)
                if any(code.lanes[i] == "process" for i, deps in enumerate(islice(graph.deps, LOOK_AT)) if not deps):
                    self.supply().start_ahead(code.modules())

    # ------------------------------------------------------------ loops

    def _state(self) -> LoopState:
        """What the engine has on the running loop."""
        self._check_open()
        loop = asyncio.get_running_loop()
        with self._lock:
            state = self._states.get(id(loop))
            if state is not None and state.loop is loop:
                return state
            with uncollected():
                from stageflow.runtime.driver import Driver
                from stageflow.runtime.monitor import Monitor
                from stageflow.runtime.watchdog import Watchdog
                from stageflow.scheduler.backpressure import countable
                from stageflow.scheduler.machine import Machine

            machine = Machine(
                self.slots(),
                tokens=self.config.tokens,
                memory=countable(self.memory_bytes()),
                grace=self.config.grace,
                poison_limit=self.config.poison_limit,
                ahead={"process": AHEAD},
                policies=self.config.backpressure,
            )
            driver = Driver(loop, machine, {}, clock=self.clock, events=self.events, policies=self._around, engine=self)
            if type(self.clock) is RealClock:
                driver.watchers = (Monitor(driver, self.config.ladder), Watchdog(loop, driver.loop_blocked))
            state = self._states[id(loop)] = LoopState(loop, driver)
            return state

    async def _open_lanes(self, state: LoopState, lanes: Iterable[str]) -> None:
        missing = [lane for lane in lanes if lane not in state.lanes]
        if not missing:
            return
        async with state.opening:
            for lane in missing:
                if lane in state.lanes:
                    continue
                executor = self._make_lane(lane)
                await executor.open()
                state.lanes[lane] = executor
                state.driver.attach(lane, executor)

    def _make_lane(self, lane: str) -> Executor:
        if lane in self._made_by:
            made: Executor = self._made_by[lane]()
        elif lane == "process":
            made = load(LANES[lane])(supply=self.supply(), grace=self.config.grace)
        elif lane == "thread":
            made = load(LANES[lane])(self.config.threads)
        elif lane in LANES:
            made = load(LANES[lane])()
        else:
            raise DefinitionError(
                f"the lane {lane!r} is not built", hint=f"give the engine an executor: Engine(lanes={{{lane!r}: make}})"
            )
        return made

    async def _close_state(self, state: LoopState) -> None:
        """Stop what runs on this loop and give back its lanes."""
        driver = state.driver
        for job in list(driver.jobs.values()):
            driver.cancel(job, "the engine is closing")
        pending = [job.finished for job in driver.jobs.values()]
        if pending:
            await asyncio.wait(pending, timeout=self.config.grace + 5.0)
        with self._lock:
            self._states.pop(id(state.loop), None)
        for watcher in driver.watchers:
            watcher.close()
        for executor in state.lanes.values():
            await executor.aclose(grace=self.config.grace)
        state.lanes.clear()

    # ------------------------------------------------------------ runs

    def _check_open(self) -> None:
        if self.closed:
            raise LaneClosedError("the engine is closed", hint="make a new one, or run inside its `with` block")
        if self._pid != os.getpid():
            raise LaneClosedError(
                "the engine belongs to another process (this one was forked)", hint="make a new engine here"
            )

    async def _opened(self, graph: StageGraph) -> tuple[LoopState, GraphCode]:
        """What the engine has on the running loop, with one more run active and the lanes that `graph` needs open."""
        state = self._state()
        if state.driver.broken:
            # its books are not to be trusted any more; the workers are
            held = state.held
            await self._close_state(state)
            state = self._state()
            state.held = held
        code = self.code(graph)
        for spec in graph.specs if state.driver.machine.admission.total_tokens or code.layout.has_resources else ():
            state.driver.machine.admission.check(spec.name, spec.policies)
        state.active += 1
        try:
            await self._open_lanes(state, code.needed)
        except BaseException:
            state.active -= 1
            raise
        return state, code

    async def begin(
        self,
        graph: StageGraph,
        inputs: Mapping[str, Any] | None = None,
        *,
        snapshot: ContextSnapshot | None = None,
        options: RunOptions,
        index: int | None = None,
        parent: Job | None = None,
        waited: int = 0,
        parent_run_id: str | None = None,
        depth: int = 0,
    ) -> tuple[LoopState, Job]:
        """Start a run on the running loop; `job.finished` has its result. The attempt `waited` of `parent` waits for
        it."""
        self._check_open()
        ready = snapshot_of(graph, inputs, snapshot, options)
        first = self._supply is None and "process" not in self._made_by
        with fork_server_for(graph, self.config) if first else contextlib.nullcontext():
            state, code = await self._opened(graph)
        from stageflow.runtime.job import Job

        try:
            sinks = parent.sinks if parent is not None else None
            if options.event_sinks:
                from stageflow.events.fanout import FanOut
                from stageflow.runtime.handles import ParentSinks

                above = (ParentSinks(sinks),) if sinks is not None else ()
                sinks = FanOut((*options.event_sinks, *above), redact=self.config.redact, shared=False)
            self._export(sinks, ready.run_id.pipeline_run_id)
            mode = options.failure_mode or self.config.failure_mode
            seed = options.seed

            def make(id: int) -> Job:
                job = Job(
                    id,
                    code,
                    ready,
                    ready.run_id.pipeline_run_id or "",
                    state.loop,
                    sinks=sinks,
                    index=index,
                    depth=depth,
                    parent=parent,
                    seed=seed,
                )
                job.token = options.token
                job.about = options.about
                if parent_run_id is not None:
                    job.parent_run_id = parent_run_id
                return job

            return state, state.driver.submit(make, mode=str(mode), deadline=options.timeout, waited=waited)
        except BaseException:
            state.active -= 1
            raise

    def _export(self, sinks: FanOut | None, run_id: str | None) -> None:
        """Give every run to the OpenTelemetry providers that the program has set up, unless a sink of its own does."""
        if self._exporter is None and not self._in_worker:
            from stageflow.observability.otel_auto import configured_sink

            found = configured_sink()
            if found is not None and not any(getattr(sink, "exports", False) for sink in self.events.sinks):
                self._exporter = found
                self.events.add(found)
        if self._exporter is not None and sinks is not None:
            if any(getattr(sink, "exports", False) for sink in sinks.sinks):
                self._exporter.leave(run_id)

    async def end(self, state: LoopState, job: Job) -> None:
        """The caller has the result: drain the run's sinks, and give the lanes back where nobody else uses them."""
        state.active -= 1
        if job.sinks is not None and job.owns_sinks:
            await job.sinks.drain(timeout=self.config.grace)
        if state.active == 0 and not state.held:
            await self._close_state(state)

    async def execute(
        self,
        graph: StageGraph,
        inputs: Mapping[str, Any] | None = None,
        *,
        ctx: PipelineContext | None = None,
        snapshot: ContextSnapshot | None = None,
        **options: Any,
    ) -> RunResult:
        """Run `graph` once on the running loop. Cancelling the caller cancels the run and waits until it has
        stopped."""
        chosen = RunOptions.make(only_run_keys(options))
        if ctx is not None:
            snapshot, chosen = from_context(ctx, snapshot, chosen)
        state, job = await self.begin(graph, inputs, snapshot=snapshot, options=chosen)
        job.context = ctx
        return await self._to_end(state, job)

    async def start(
        self,
        graph: StageGraph,
        inputs: Mapping[str, Any] | None = None,
        *,
        ctx: PipelineContext | None = None,
        snapshot: ContextSnapshot | None = None,
        **options: Any,
    ) -> RunHandle:
        """Begin a run on the running loop and return at once: `await handle` has its result, `handle.cancel(reason,
        stage=...)` stops it, one stage of it or one item."""
        chosen = RunOptions.make(only_run_keys(options))
        if ctx is not None:
            snapshot, chosen = from_context(ctx, snapshot, chosen)
        state, job = await self.begin(graph, inputs, snapshot=snapshot, options=chosen)
        job.context = ctx
        task = state.loop.create_task(self._to_end(state, job))
        self._started.add(task)
        task.add_done_callback(self._started.discard)
        from stageflow.runtime.handles import RunHandle

        return RunHandle(state.driver, job, task)

    async def _to_end(self, state: LoopState, job: Job) -> RunResult:
        """Wait for a run that was begun, and give back what it used."""
        try:
            result = await self._await(state, job)
        finally:
            await self.end(state, job)
        if job.context is not None and result.cancelled:
            job.context.mark_cancelled(result.cancel_reason or "cancelled")
        return result

    async def _await(self, state: LoopState, job: Job) -> RunResult:
        try:
            return await asyncio.shield(job.finished)
        except asyncio.CancelledError:
            if job.finished.done():
                raise
            state.driver.cancel(job, "the caller was cancelled")
            while not job.finished.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(job.finished)
            raise

    def run(
        self,
        graph: StageGraph,
        inputs: Mapping[str, Any] | None = None,
        *,
        snapshot: ContextSnapshot | None = None,
        **options: Any,
    ) -> RunResult:
        """Run `graph` once and block. In the main thread Ctrl-C drains the run within the grace and raises
        KeyboardInterrupt with the result as its `result`; a second one stops at once."""
        no_running_loop("run", "result = await graph.execute(inputs=...)")
        chosen = RunOptions.make(only_run_keys(options))
        if self._supply is None and not self.closed:
            ready = snapshot_of(graph, inputs, snapshot, chosen)
            self._ahead(graph)
            inputs, snapshot = None, ready
        result: RunResult = self._on_own_loop(self._run(graph, inputs, snapshot, chosen))
        return result

    def run_child(
        self, graph: StageGraph, snapshot: ContextSnapshot, options: RunOptions, *, parent_run_id: str, depth: int
    ) -> RunResult:
        """Run `graph` as the child of a run of another process, and block: `ctx.spawn` in a worker."""
        no_running_loop("run_child", "await ctx.spawn(...)")
        result: RunResult = self._on_own_loop(
            self._run(graph, None, snapshot, options, parent_run_id=parent_run_id, depth=depth)
        )
        return result

    async def _run(
        self,
        graph: StageGraph,
        inputs: Mapping[str, Any] | None,
        snapshot: ContextSnapshot | None,
        options: RunOptions,
        **origin: Any,
    ) -> RunResult:
        state, job = await self.begin(graph, inputs, snapshot=snapshot, options=options, **origin)
        try:
            from stageflow.runtime.interrupt import Interrupt

            with Interrupt(
                asyncio.get_running_loop(), lambda reason, force: state.driver.cancel(job, reason, force=force)
            ) as stop:
                result = await self._await(state, job)
            stop.raise_if_asked(result)
            return result
        finally:
            await self.end(state, job)

    def _on_own_loop(self, coroutine: Any) -> Any:
        """Run a coroutine on the loop that the engine keeps for this thread."""
        try:
            self._check_open()
        except BaseException:
            coroutine.close()
            raise
        return self._own.run(self._held(coroutine), self._leave_loop)

    async def _held(self, coroutine: Any) -> Any:
        try:
            self._state().held = True
        except BaseException:
            coroutine.close()
            raise
        try:
            return await coroutine
        finally:
            self._rest()

    def _rest(self) -> None:
        """This loop is about to stand still: other loops may have what its lanes have borrowed and do not use."""
        state = self._states.get(id(asyncio.get_running_loop()))
        for executor in state.lanes.values() if state is not None else ():
            if hasattr(executor, "rest"):
                executor.rest()

    async def _leave_loop(self) -> None:
        state = self._states.get(id(asyncio.get_running_loop()))
        if state is not None:
            await self._close_state(state)

    def stream(
        self,
        graph: StageGraph,
        snapshots: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        max_in_flight: int | None = None,
        **options: Any,
    ) -> AsyncIterator[RunResult]:
        """Run once per snapshot (or input mapping), pulled lazily; at most `max_in_flight` at once. Results carry
        `index`."""
        chosen = RunOptions.make(only_run_keys(options))
        most = max_in_flight or chosen.max_in_flight or self.config.max_in_flight or max(8, 2 * self.slots()["process"])
        from stageflow.runtime.streaming import stream_runs

        return stream_runs(self, graph, snapshots, ordered=ordered, most=most, options=chosen)

    def run_many(
        self,
        graph: StageGraph,
        snapshots: Iterable[Any],
        *,
        ordered: bool = True,
        max_in_flight: int | None = None,
        **options: Any,
    ) -> Iterator[RunResult]:
        """`stream` for code without an event loop."""
        no_running_loop("run_many", "async for result in graph.stream(...)")
        results = self.stream(graph, snapshots, ordered=ordered, max_in_flight=max_in_flight, **options)
        step = results.__aiter__()

        async def following() -> Any:
            try:
                return (await step.__anext__(),)
            except StopAsyncIteration:
                return None

        try:
            while (found := self._on_own_loop(following())) is not None:
                yield found[0]
        finally:
            if not self.closed:
                self._on_own_loop(results.aclose())  # type: ignore[attr-defined]

    # ------------------------------------------------------------ open and close

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        self._state().held = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def close(self) -> None:
        """Stop what runs, end every worker, give back every resource. Results stay valid. Idempotent."""
        if self.closed or self._pid != os.getpid():
            self.closed = True
            return
        no_running_loop("close", "await engine.aclose()")
        self._own.close(self._leave_loop)
        self._finish_close()

    async def aclose(self) -> None:
        """`close` on a running loop."""
        if self.closed:
            return
        await self._leave_loop()

        def close_others() -> None:
            self._own.close(self._leave_loop)
            self._finish_close()

        await asyncio.get_running_loop().run_in_executor(None, close_others)

    def __del__(self) -> None:
        """Dropped without `close`: its processes, threads and loops end, and its resources are closed. What an
        interpreter still holds at its end is closed there."""
        if getattr(self, "closed", True) or self._pid != os.getpid() or sys.is_finalizing():
            return
        self._own.drop()
        for state in self._states.values():
            if state.loop.is_closed():
                for watcher in state.driver.watchers:
                    watcher.close()
            else:
                self._supply = None  # its lanes watch descriptors there: it ends with that loop
        self._finish_close()

    def _finish_close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
            supply, self._supply = self._supply, None
        if supply is not None:
            supply.close()
        self._around.close()
        from stageflow.context.resources import close_all

        close_all(self._scope)
        for graph in list(self._graphs):
            from stageflow.runtime.code import forget_code

            forget_code(graph, self._scope)
        self.events.close()


def _size(limit: int | str | None) -> int | None:
    from stageflow.pipeline.policies import parse_size

    return None if limit is None else parse_size(limit)


atexit.register(leave)  # behind what is registered later: first the default engine is closed
