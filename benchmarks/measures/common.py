"""What the measures share: loops, engines, standard pools, timing of calls."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.harness import MissingPeerError, Sides
from benchmarks.peers import WORKERS
from benchmarks.work import noop


def timed(call: Callable[[], Any], *, repeat: int = 1) -> Callable[[], float]:
    """A side that costs the wall seconds of `call`: the median of `repeat` calls."""

    def side() -> float:
        taken = []
        for _ in range(repeat):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        return sorted(taken)[len(taken) // 2]

    return side


def cpu_timed(call: Callable[[], Any], *, repeat: int = 1) -> Callable[[], float]:
    """A side that costs the CPU seconds of this process, all threads: for work that stays in this process."""

    def side() -> float:
        taken = []
        for _ in range(repeat):
            began = time.process_time()
            call()
            taken.append(time.process_time() - began)
        return sorted(taken)[len(taken) // 2]

    return side


@contextmanager
def loop_runner() -> Iterator[asyncio.Runner]:
    """A uvloop to run coroutines on, the same for us and for hand-written asyncio."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@contextmanager
def engine_on_loop(**config: Any) -> Iterator[tuple[asyncio.Runner, Any]]:
    """(runner, engine), the engine open on the runner's loop."""
    from stageflow import Engine

    with loop_runner() as runner:
        engine = Engine(**config)
        runner.run(engine.__aenter__())
        try:
            yield runner, engine
        finally:
            runner.run(engine.__aexit__(None, None, None))


@contextmanager
def standard_pool(workers: int = WORKERS, method: str | None = None) -> Iterator[ProcessPoolExecutor]:
    """concurrent.futures' process pool as it comes, warm."""
    context = multiprocessing.get_context(method) if method else None
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(noop, range(4 * workers)))
        yield pool


@contextmanager
def our_pool(workers: int = WORKERS) -> Iterator[Any]:
    """Our drop-in pool, warm."""
    from stageflow_executors.futures import ProcessPoolExecutor as Ours

    with Ours(workers) as pool:
        list(pool.map(noop, range(4 * workers)))
        yield pool


def enter(stack: ExitStack, sides: Sides, name: str, manager: Any) -> Any:
    """Open a peer; None when it is missing, and the reason noted for each side in `name` (separated by blanks)."""
    try:
        return stack.enter_context(manager)
    except MissingPeerError as missing:
        for side in name.split():
            sides.lacks(side, str(missing))
        return None
