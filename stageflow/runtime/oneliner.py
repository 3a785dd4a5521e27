"""`stageflow.map`: one function over many items, for people who come from joblib and `concurrent.futures`.

The run has a thread and a loop of its own; results come over a short queue. A consumer that is slow fills the queue,
the last stage waits, and from there on the engine's own budget holds everything back, down to the iterator of items.

May not import: any executor, any room above the runtime.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from stageflow.context.cancellation import CancellationToken
from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import Lane, StageKind
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.graph import StageGraph

#: results that wait for the consumer before the last stage stops taking more
QUEUE: Final = 256
# Names that are no identifiers, so that no parameter of the function can bind to them by accident.
_ITEMS: Final = "map items"
_RESULTS: Final = "map results"


def map(
    fn: Callable[..., Any],
    items: Iterable[Any],
    *,
    kind: StageKind | str | None = None,
    batch: int | None = None,
    ordered: bool = True,
    engine: Any = None,
    **policies: Any,
) -> Iterator[Any]:
    """Apply `fn` to every item, on all cores, and yield the results as they are wanted.

    A plain function runs in processes, a coroutine function on an event loop, kinds and policies as in
    `PipelineBuilder.map`: with `batch=n` it takes lists of up to n items, a generator function gives any number of
    results, `DROP` none. `items` may be endless: it is read, on a thread, only as far ahead as the engine's memory
    budget allows. Closing the iterator early stops what runs and returns when it has stopped.

    Raises:
        DefinitionError: at the call, when `fn` or a policy cannot be.
        StageFailedError: when an item has failed for good, after the results that were delivered before. With
            `on_failure="continue_on_failure"` the iterator goes on without the failed items, and raises at its end.
    """
    queue = _Queue()
    graph = _graph(fn, items, queue, kind, batch, ordered, policies)
    return _results(graph, queue, engine)


def _graph(
    fn: Callable[..., Any],
    items: Iterable[Any],
    queue: _Queue,
    kind: StageKind | str | None,
    batch: int | None,
    ordered: bool,
    policies: dict[str, Any],
) -> StageGraph:
    iterator = iter(items)  # what cannot be iterated over is a mistake of the call

    def source() -> Iterator[Any]:
        yield from iterator

    async def deliver(result: Any) -> None:
        await queue.put(result)

    name = getattr(fn, "__name__", type(fn).__name__)
    label = f"map {name}"
    graph = (
        PipelineBuilder("map")
        .stage(_ITEMS, source, executor=str(Lane.THREAD))
        .map(label, fn, over=_ITEMS, kind=kind, batch=batch, **policies)
        .sink(_RESULTS, deliver, over=label, kind=StageKind.WORK, ordered=ordered, executor=str(Lane.ASYNC))
        .build()
    )
    if graph.inputs:
        listed = ", ".join(repr(parameter) for parameter in graph.inputs)
        raise DefinitionError(
            f"map: {name} takes more than one item: nothing gives it {listed}",
            hint="Give it one parameter, or defaults for the others, as functools.partial does.",
        )
    return graph


def _results(graph: StageGraph, queue: _Queue, engine: Any) -> Iterator[Any]:
    token = CancellationToken()
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(graph.run(engine=engine, token=token))
        except BaseException as error:
            ended.append(error)
        finally:
            queue.end()

    thread = threading.Thread(target=run, name="stageflow-map", daemon=True)
    thread.start()
    try:
        yield from queue
    finally:
        # Closed early, or interrupted while waiting: nothing may be left running behind the caller's back.
        token.cancel("the iterator of map was closed")
        thread.join()
    result = ended[0]
    if isinstance(result, BaseException):
        raise result
    result.raise_for_failure()


class _Queue:
    """From a coroutine to a thread that iterates. `put` waits while `QUEUE` results are waiting."""

    def __init__(self) -> None:
        self._ready: deque[Any] = deque()
        self._changed = threading.Condition()
        self._over = False
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    async def put(self, result: Any) -> None:
        """Hand over one result, then wait for room."""
        with self._changed:
            self._ready.append(result)
            self._changed.notify()
            if len(self._ready) <= QUEUE:
                return
            loop = asyncio.get_running_loop()
            room: asyncio.Future[None] = loop.create_future()
            self._waiting.append((loop, room))
        await room

    def end(self) -> None:
        """No result will follow."""
        with self._changed:
            self._over = True
            self._changed.notify()

    def __iter__(self) -> Iterator[Any]:
        while True:
            with self._changed:
                while not self._ready and not self._over:
                    self._changed.wait()
                if not self._ready:
                    return
                result = self._ready.popleft()
                wake = list(self._waiting) if len(self._ready) <= QUEUE // 2 else []
                if wake:
                    self._waiting.clear()
            for loop, room in wake:
                try:
                    loop.call_soon_threadsafe(_let_go, room)
                except RuntimeError:  # the run was stopped and its loop is closed
                    pass
            yield result


def _let_go(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
