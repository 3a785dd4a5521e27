"""Values that cross between processes: P1 to P5."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from benchmarks.executors.bare import bouncing_by_hand, bouncing_on
from benchmarks.harness import MissingPeerError, Row, Scenario, Sides
from benchmarks.measures.common import engine_on_loop, enter, loop_runner, our_pool, standard_pool, timed
from benchmarks.peers import WORKERS, need, ray_here
from benchmarks.work import noop, plus_one, plus_one_in_place, records, touch
from stageflow import PipelineBuilder, StageKind
from stageflow_executors.processes.pool import ProcessExecutor

#: float64 numbers in 100 MB
NUMBERS = 12_500_000
CONSUMERS = 8


def _array(scale: float) -> Any:
    import numpy as np

    return np.arange(max(131_072, int(NUMBERS * scale)), dtype=np.float64)


@contextmanager
def _round_trip(scale: float) -> Iterator[Sides]:
    """One array in, one of the same size out, after each other."""
    sides = Sides()
    with ExitStack() as stack:
        array = _array(scale)
        expected = touch(array) + len(array[::512])

        def check(result: Any) -> None:
            assert result.shape == array.shape
            assert touch(result) == expected

        ours = stack.enter_context(our_pool())
        standard = stack.enter_context(standard_pool())
        sides.add("ours", timed(lambda: check(ours.submit(plus_one, array).result()), repeat=3))
        sides.add("ppe", timed(lambda: check(standard.submit(plus_one, array).result())))
        sides.add("local", timed(lambda: check(plus_one(array)), repeat=3))
        try:
            need("joblib")
            from joblib import Parallel, delayed

            parallel = stack.enter_context(Parallel(n_jobs=WORKERS))
            sides.add("joblib", timed(lambda: check(parallel([delayed(plus_one)(array)])[0])))
        except MissingPeerError as missing:
            sides.lacks("joblib", str(missing))
        ray = enter(stack, sides, "ray", ray_here())
        if ray is not None:
            remote = ray.remote(plus_one)
            sides.add("ray", timed(lambda: check(ray.get(remote.remote(array))), repeat=3))
        yield sides


def consumers(count: int, array: Any = None) -> Any:
    """One array read by `count` process stages: the value of a stage before them, or (None) an input of the graph."""

    async def made() -> Any:
        return array

    builder = PipelineBuilder("consumers", inputs={"array": object} if array is None else {})
    if array is not None:
        builder.stage("array", made)
    for number in range(count):
        builder.stage(f"c{number}", touch, kind=StageKind.TRANSFORM, executor="process", fuse=False)
    return builder.build()


def _anonymous(nbytes: int) -> mmap.mmap:
    """Shared memory of the kind that the lane uses, mapped for writing."""
    fd = os.memfd_create("limit", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)


@contextmanager
def _to_consumers(scale: float) -> Iterator[Sides]:
    """The same array to eight stages."""
    import numpy as np

    sides = Sides()
    with ExitStack() as stack:
        array = _array(scale)
        expected = touch(array)
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))

        def through_engine(graph: Any, inputs: dict[str, Any]) -> None:
            result = runner.run(engine.execute(graph, inputs))
            assert result.success, result.error
            assert result.data("c7") == expected

        sides.add("ours", timed(partial(through_engine, consumers(CONSUMERS, array), {}), repeat=3))
        sides.add("input", timed(partial(through_engine, consumers(CONSUMERS), {"array": array}), repeat=3))
        into = np.empty_like(array)
        sides.add("copy", timed(lambda: np.copyto(into, array), repeat=7))
        shared_memory = np.ndarray(array.shape, array.dtype, _anonymous(array.nbytes))

        def share() -> None:
            """What nobody can do without: the copy into memory that others can map, and one worker's part of the
            reads, through a mapping that it has."""
            np.copyto(shared_memory, array)
            assert [touch(shared_memory) for _ in range(CONSUMERS // WORKERS)][-1] == expected

        sides.add("share", timed(share, repeat=7))
        ray = enter(stack, sides, "ray", ray_here())
        if ray is not None:
            remote = ray.remote(touch)

            def through_ray() -> None:
                shared = ray.put(array)
                assert ray.get([remote.remote(shared) for _ in range(CONSUMERS)])[-1] == expected

            sides.add("ray", timed(through_ray, repeat=3))
        yield sides


def array_chain(length: int, *, in_place: bool) -> Any:
    """Process stages after each other, each touching every page of its array and making a new one."""
    builder = PipelineBuilder("array chain", inputs={"array": object})
    stage = _in_place if in_place else _made
    for number in range(length):
        renamed = {"array": f"s{number - 1}"} if number else None
        builder.stage(f"s{number}", stage, inputs=renamed, kind=StageKind.TRANSFORM, executor="process", fuse=False)
    return builder.build()


def _in_place(array: Any, ctx: Any) -> Any:
    return plus_one_in_place(array, ctx)


def _made(array: Any) -> Any:
    return plus_one(array)


@contextmanager
def _through_chain(scale: float) -> Iterator[Sides]:
    sides = Sides()
    with ExitStack() as stack:
        array = _array(scale)
        expected = touch(array) + 3 * len(array[::512])
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))

        def through(graph: Any) -> None:
            result = runner.run(engine.execute(graph, {"array": array}))
            assert result.success, result.error
            assert touch(result.data("s2")) == expected

        sides.add("ours", timed(partial(through, array_chain(3, in_place=True)), repeat=3))
        sides.add("ours made", timed(partial(through, array_chain(3, in_place=False)), repeat=3))
        sides.add("local", timed(lambda: plus_one(plus_one(plus_one(array)))))
        ray = enter(stack, sides, "ray", ray_here())
        if ray is not None:
            remote = ray.remote(plus_one)

            def through_ray() -> None:
                value = ray.get(remote.remote(remote.remote(remote.remote(array))))
                assert touch(value) == expected

            sides.add("ray", timed(through_ray, repeat=3))
        yield sides


@contextmanager
def _small(scale: float) -> Iterator[Sides]:
    """Typed records, and arrays of 1 KB one after another."""
    import numpy as np

    sides = Sides()
    with ExitStack() as stack:
        ours = stack.enter_context(our_pool())
        standard = stack.enter_context(standard_pool())
        batch = records(10_000)
        little = np.arange(128, dtype=np.float64)
        trips = max(50, int(500 * scale))

        def round_trip(pool: Any) -> None:
            back = pool.submit(noop, batch).result()
            assert len(back) == len(batch)
            assert back[-1] == batch[-1]

        def one_by_one(pool: Any) -> None:
            for _ in range(trips):
                assert pool.submit(noop, little).result().nbytes == 1024

        runner = stack.enter_context(loop_runner())
        lane = ProcessExecutor(1)
        runner.run(lane.open())
        stack.callback(lambda: runner.run(lane.aclose(grace=2.0)))

        async def trip_after_trip() -> None:
            for _ in range(trips):
                assert (await lane.submit(noop, little)).nbytes == 1024

        sides.add("1 KB lane", timed(lambda: runner.run(trip_after_trip())))
        bare = stack.enter_context(loop_runner())
        bounce = stack.enter_context(bouncing_on(bare))
        sides.add("1 KB bounce", timed(lambda: bare.run(bounce.trips(trips, 1100))))
        hand = stack.enter_context(bouncing_by_hand())
        sides.add("1 KB by hand", timed(lambda: hand.trips_by_hand(trips, 1100)))
        for name, call in _both(round_trip, ours, standard, "records"):
            sides.add(name, timed(call, repeat=5))
        for name, call in _both(one_by_one, ours, standard, "1 KB"):
            sides.add(name, timed(call))
        yield sides


def _both(call: Any, ours: Any, standard: Any, what: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield f"{what} ours", lambda: call(ours)
    yield f"{what} ppe", lambda: call(standard)


SCENARIOS = (
    Scenario(
        name="array",
        room="transport",
        open=_round_trip,
        seconds=60.0,
        quick=False,
        rows=(
            Row(
                id="P1",
                what="100 MB array in, same size out",
                against="concurrent.futures",
                over="ppe",
                under="ours",
                bar=12.0,
                at_most=False,
            ),
            Row(
                id="P1",
                what="100 MB array in, same size out",
                against="Ray",
                over="ray",
                under="ours",
                bar=1.0,
                at_most=False,
            ),
            Row(
                id="P1",
                what="100 MB array in, same size out",
                against="joblib",
                over="joblib",
                under="ours",
                at_most=False,
            ),
            Row(
                id="P1",
                what="100 MB array in, same size out",
                against="this process (limit)",
                over="ours",
                under="local",
            ),
        ),
    ),
    Scenario(
        name="consumers",
        room="transport",
        open=_to_consumers,
        quick=False,
        rows=(
            Row(
                id="P2",
                what="100 MB to 8 process stages",
                against="Ray",
                over="ray",
                under="ours",
                bar=1.5,
                at_most=False,
            ),
            Row(
                id="P2",
                what="100 MB to 8 process stages",
                against="warm copies of 100 MB",
                over="ours",
                under="copy",
                bar=1.3,
            ),
            Row(
                id="P2",
                what="the same as an input of the graph",
                against="warm copies of 100 MB",
                over="input",
                under="copy",
                bar=1.3,
            ),
            Row(
                id="P2",
                what="one copy into shared memory, one worker's reads (limit)",
                against="warm copies of 100 MB",
                over="share",
                under="copy",
            ),
        ),
    ),
    Scenario(
        name="array-chain",
        room="transport",
        open=_through_chain,
        quick=False,
        rows=(
            Row(
                id="P3",
                what="3 process stages on 100 MB, ctx.empty",
                against="Ray",
                over="ray",
                under="ours",
                bar=1.3,
                at_most=False,
            ),
            Row(
                id="P3",
                what="3 process stages on 100 MB, results made anew",
                against="Ray",
                over="ray",
                under="ours made",
                at_most=False,
            ),
            Row(
                id="P3",
                what="3 process stages on 100 MB, ctx.empty",
                against="this process (limit)",
                over="ours",
                under="local",
            ),
        ),
    ),
    Scenario(
        name="small-values",
        room="codec",
        open=_small,
        rounds=7,
        rows=(
            Row(
                id="P4",
                what="10,000 typed records in and out",
                against="concurrent.futures",
                over="records ppe",
                under="records ours",
                bar=2.0,
                at_most=False,
                gate=True,
            ),
            Row(
                id="P5",
                what="1 KB array in and out, latency through ProcessExecutor",
                against="concurrent.futures",
                over="1 KB ppe",
                under="1 KB lane",
                bar=3.0,
                at_most=False,
                gate=True,
            ),
            Row(
                id="P5",
                what="1 KB array in and out, latency through our ProcessPoolExecutor",
                against="concurrent.futures",
                over="1 KB ppe",
                under="1 KB ours",
                bar=3.0,
                at_most=False,
                gate=True,
            ),
            Row(
                id="P5",
                what="1 KB there and back, no executor (limit)",
                against="concurrent.futures",
                over="1 KB ppe",
                under="1 KB bounce",
                at_most=False,
            ),
            Row(
                id="P5",
                what="the same by a thread without a loop (limit)",
                against="concurrent.futures",
                over="1 KB ppe",
                under="1 KB by hand",
                at_most=False,
            ),
        ),
    ),
)
