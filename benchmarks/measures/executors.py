"""Round trips and throughput of the process lane: L1, L2, T1, T2, T3."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from benchmarks.executors.bare import bouncing_on
from benchmarks.graphs import CountingSink
from benchmarks.harness import Row, Scenario, Sides
from benchmarks.measures.common import engine_on_loop, enter, loop_runner, our_pool, standard_pool, timed
from benchmarks.peers import WORKERS, dask_here, need, ray_here
from benchmarks.work import burn, burn_many, loops_per_second, noop
from stageflow import PipelineBuilder, StageKind


def process_chain(length: int) -> Any:
    """A chain of no-op process stages, each in a round trip of its own."""
    builder = PipelineBuilder("process chain", inputs={"value": int})
    builder.stage("s0", noop, kind=StageKind.TRANSFORM, executor="process", fuse=False)
    for number in range(1, length):
        before = {"value": f"s{number - 1}"}
        builder.stage(f"s{number}", noop, inputs=before, kind=StageKind.TRANSFORM, executor="process", fuse=False)
    return builder.build()


@contextmanager
def _lane_side(stack: ExitStack, trips: int) -> Iterator[Any]:
    """One call after another through `ProcessExecutor` on uvloop."""
    from stageflow.core.executor import Call, Shipped
    from stageflow_executors.processes.pool import ProcessExecutor
    from stageflow_executors.processes.port import Plain

    runner = stack.enter_context(loop_runner())
    lane = ProcessExecutor(1)
    runner.run(lane.open())
    shipped = Shipped(Plain(noop))
    ids = itertools.count(1)

    async def trip_after_trip() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(trips):
            ended: asyncio.Future[Any] = loop.create_future()
            lane.start(Call(next(ids), shipped, (None, 1)), ended.set_result)
            await ended

    try:
        yield lambda: runner.run(trip_after_trip())
    finally:
        runner.run(lane.aclose(grace=2.0))


@contextmanager
def _latency(scale: float) -> Iterator[Sides]:
    trips = max(50, int(1000 * scale))
    sides = Sides()
    with ExitStack() as stack:
        lane = stack.enter_context(_lane_side(stack, trips))
        sides.add("lane", timed(lane))
        bare = stack.enter_context(loop_runner())
        bounce = stack.enter_context(bouncing_on(bare))
        sides.add("bounce", timed(lambda: bare.run(bounce.trips(trips, 40))))
        asleep = stack.enter_context(bouncing_on(bare, asleep=True))
        sides.add("asleep", timed(lambda: bare.run(asleep.trips(trips, 40))))

        runner, engine = stack.enter_context(engine_on_loop(processes=1))
        length = max(20, int(200 * scale))
        graph = process_chain(length)

        def through_engine() -> None:
            result = runner.run(engine.execute(graph, {"value": 1}))
            result.raise_for_failure()

        per_stage = timed(through_engine, repeat=3)
        sides.add("engine", lambda: per_stage() * trips / length)
        pool = stack.enter_context(standard_pool(1))
        sides.add("ppe", timed(lambda: [pool.submit(noop, 1).result() for _ in range(trips)]))
        try:
            need("loky")
            from loky import get_reusable_executor

            loky = get_reusable_executor(max_workers=1)
            stack.callback(loky.shutdown, wait=True)
            sides.add("loky", timed(lambda: [loky.submit(noop, 1).result() for _ in range(trips)]))
        except Exception as missing:
            sides.lacks("loky", str(missing))
        context = multiprocessing.get_context("fork")
        plain = stack.enter_context(context.Pool(1))
        sides.add("mp.Pool", timed(lambda: [plain.apply(noop, (1,)) for _ in range(trips)]))
        yield sides


@contextmanager
def _latency_cluster(scale: float) -> Iterator[Sides]:
    trips = max(20, int(200 * scale))
    sides = Sides()
    with ExitStack() as stack:
        lane = stack.enter_context(_lane_side(stack, trips))
        sides.add("lane", timed(lane))
        ray = enter(stack, sides, "ray", ray_here(1))
        if ray is not None:
            remote = ray.remote(noop)
            sides.add("ray", timed(lambda: [ray.get(remote.remote(1)) for _ in range(trips)]))
        client = enter(stack, sides, "dask", dask_here(1))
        if client is not None:
            sides.add("dask", timed(lambda: [client.submit(noop, 1, pure=False).result() for _ in range(trips)]))
        yield sides


@contextmanager
def _futures(scale: float) -> Iterator[Sides]:
    """20,000 futures; the standard pool with one item per message."""
    count = max(500, int(20_000 * scale))
    sides = Sides()
    with ExitStack() as stack:
        ours = stack.enter_context(our_pool())
        standard = stack.enter_context(standard_pool())

        def one_future_each() -> None:
            for future in [ours.submit(noop, number) for number in range(count)]:
                future.result()

        sides.add("ours", timed(one_future_each))
        sides.add("ppe", timed(lambda: list(standard.map(noop, range(count), chunksize=1))))
        sides.add("ppe256", timed(lambda: list(standard.map(noop, range(count), chunksize=256))))
        try:
            need("joblib")
            from joblib import Parallel, delayed

            parallel = stack.enter_context(Parallel(n_jobs=WORKERS))
            sides.add("joblib", timed(lambda: parallel(delayed(noop)(number) for number in range(count))))
        except Exception as missing:
            sides.lacks("joblib", str(missing))
        try:
            need("mpire")
            from mpire import WorkerPool

            workers = stack.enter_context(WorkerPool(WORKERS, keep_alive=True))
            sides.add("mpire", timed(lambda: workers.map(noop, range(count))))
        except Exception as missing:
            sides.lacks("mpire", str(missing))
        yield sides


@contextmanager
def _items(scale: float) -> Iterator[Sides]:
    """20,000 no-op items as a `.map` stage; `multiprocessing.Pool.map` with its own chunks."""
    count = max(500, int(20_000 * scale))
    items = list(range(count))
    graph = PipelineBuilder("items", inputs={"items": list}).map("noop", noop, over="items").build()
    sides = Sides()
    with ExitStack() as stack:
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))

        def run(sinks: tuple[Any, ...]) -> None:
            result = runner.run(engine.execute(graph, {"items": items}, event_sinks=sinks))
            result.raise_for_failure()
            assert len(result.data("noop")) == count

        sides.add("ours", timed(lambda: run(()), repeat=5))
        sides.add("ours+sink", timed(lambda: run((CountingSink(wants_items=True),)), repeat=5))
        pool = stack.enter_context(multiprocessing.get_context("fork").Pool(WORKERS))
        sides.add("mp.Pool", timed(lambda: pool.map(noop, items), repeat=9))
        sides.add("list", timed(lambda: list(map(noop, items)), repeat=9))
        yield sides


@contextmanager
def _tasks(scale: float) -> Iterator[Sides]:
    """Tasks of 1 ms, and of 0.1 to 20 ms, against the best of several chunk sizes chosen by hand: the one that is best
    before the rounds begin. The luckiest of three in every round would be a peer that nobody can run.

    The limit is that pool with one chunk for each worker, of equal work: it needs to know beforehand what a task takes.
    """
    speed = loops_per_second()
    equal = [int(speed * 0.001)] * max(200, int(2000 * scale))
    dice = random.Random(11)
    mixed = [int(speed * 0.0001 * 200 ** dice.random()) for _ in range(max(60, int(600 * scale)))]
    graph = PipelineBuilder("tasks", inputs={"items": list}).map("burn", burn, over="items", keep=False).build()
    sides = Sides()
    with ExitStack() as stack:
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))
        standard = stack.enter_context(standard_pool())

        def ours(tasks: list[int]) -> None:
            result = runner.run(engine.execute(graph, {"items": tasks}))
            result.raise_for_failure()
            assert result.stats["burn"].items_in == len(tasks)

        def by_hand(tasks: list[int], chunk: int) -> None:
            chunks = [tasks[at : at + chunk] for at in range(0, len(tasks), chunk)]
            assert sum(len(part) for part in standard.map(burn_many, chunks)) == len(tasks)

        def dealt_out(shares: list[list[int]]) -> None:
            assert len(list(standard.map(burn_many, shares))) == len(shares)

        for kind, tasks, sizes in (("equal", equal, (8, 32, 128)), ("mixed", mixed, (1, 4, 16))):
            sides.add(f"{kind} ours", timed(partial(ours, tasks)))
            calls = {size: timed(partial(by_hand, tasks, size)) for size in sizes}
            seconds = {size: statistics.median(calls[size]() for _ in range(3)) for size in sizes}
            best = min(sizes, key=seconds.__getitem__)
            sides.add(f"{kind} ppe", calls[best])
            sides.notes[f"{kind} chunks"] = f"{best} tasks each, of {seconds}"
            sides.add(f"{kind} limit", timed(partial(dealt_out, equal_shares(tasks, WORKERS))))
        yield sides


def equal_shares(tasks: list[int], count: int) -> list[list[int]]:
    """The tasks dealt out so that every share is the same amount of work: the largest first, each to the smallest."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for task in sorted(tasks, reverse=True):
        min(shares, key=sum).append(task)
    return shares


SCENARIOS = (
    Scenario(
        name="latency",
        room="executors",
        open=_latency,
        rounds=7,
        rows=(
            Row(
                id="L1",
                what="no-op round trip, ProcessExecutor",
                against="concurrent.futures",
                over="lane",
                under="ppe",
                bar=0.25,
                gate=True,
            ),
            Row(
                id="L1",
                what="a frame there and back, no executor (limit)",
                against="concurrent.futures",
                over="bounce",
                under="ppe",
            ),
            Row(
                id="L1",
                what="the same, both sides asleep meanwhile",
                against="concurrent.futures",
                over="asleep",
                under="ppe",
            ),
            Row(id="L1", what="no-op round trip, ProcessExecutor", against="mp.Pool", over="lane", under="mp.Pool"),
            Row(id="L1", what="no-op round trip, ProcessExecutor", against="loky", over="lane", under="loky"),
            Row(
                id="L2",
                what="per process stage, whole engine",
                against="concurrent.futures",
                over="engine",
                under="ppe",
                bar=0.45,
                gate=True,
            ),
        ),
    ),
    Scenario(
        name="latency-cluster",
        room="executors",
        open=_latency_cluster,
        quick=False,
        rows=(
            Row(id="L1", what="no-op round trip, ProcessExecutor", against="Ray", over="lane", under="ray"),
            Row(id="L1", what="no-op round trip, ProcessExecutor", against="Dask", over="lane", under="dask"),
        ),
    ),
    Scenario(
        name="futures",
        room="executors",
        open=_futures,
        rows=(
            Row(
                id="T1",
                what="20,000 no-ops, a future each",
                against="PPE.map(chunksize=1)",
                over="ppe",
                under="ours",
                bar=15.0,
                at_most=False,
                gate=True,
            ),
            Row(
                id="T1",
                what="20,000 no-ops, a future each",
                against="PPE.map(chunksize=256)",
                over="ppe256",
                under="ours",
                at_most=False,
            ),
            Row(
                id="T1",
                what="20,000 no-ops, a future each",
                against="joblib",
                over="joblib",
                under="ours",
                at_most=False,
            ),
            Row(
                id="T1", what="20,000 no-ops, a future each", against="mpire", over="mpire", under="ours", at_most=False
            ),
        ),
    ),
    Scenario(
        name="items",
        room="streams",
        open=_items,
        rounds=7,
        rows=(
            Row(
                id="T2",
                what="20,000 no-op items of a map",
                against="mp.Pool.map",
                over="mp.Pool",
                under="ours",
                bar=0.25,
                at_most=False,
                gate=True,
            ),
            Row(
                id="T2",
                what="the same, a sink called per item",
                against="mp.Pool.map",
                over="mp.Pool",
                under="ours+sink",
                bar=0.10,
                at_most=False,
                gate=True,
            ),
        ),
    ),
    Scenario(
        name="tasks",
        room="streams",
        open=_tasks,
        rounds=7,
        max_rounds=15,
        seconds=90.0,
        rows=(
            Row(
                id="T3",
                what="2,000 tasks of 1 ms, finished/s",
                against="best hand-chunked PPE",
                over="equal ppe",
                under="equal ours",
                bar=0.97,
                at_most=False,
            ),
            Row(
                id="T3",
                what="2,000 tasks of 1 ms, dealt out by known length (limit)",
                against="best hand-chunked PPE",
                over="equal ppe",
                under="equal limit",
                at_most=False,
            ),
            Row(
                id="T3",
                what="600 tasks of 0.1 to 20 ms, finished/s",
                against="best hand-chunked PPE",
                over="mixed ppe",
                under="mixed ours",
                bar=1.1,
                at_most=False,
            ),
            Row(
                id="T3",
                what="600 tasks of 0.1 to 20 ms, dealt out by known length (limit)",
                against="best hand-chunked PPE",
                over="mixed ppe",
                under="mixed limit",
                at_most=False,
            ),
        ),
    ),
)
