"""What every executor must keep, as one suite: `check_executor(make)` for ours and for yours.

    def test_my_lane_keeps_the_promises_of_the_port():
        check_executor(lambda: MyExecutor())

`make` gives a fresh, unopened executor. Each behaviour runs on an event loop of its own; the first broken promise is an
AssertionError that names it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from stageflow.core.errors import StageflowError
from stageflow.core.executor import Call, Executor, Outcome, OutcomeKind, Reply, Shipped
from stageflow.core.worker import WorkerPort

__all__ = ["PROMISES", "check_executor"]

Make = Callable[[], Executor]
_ids = itertools.count(1)
PATIENCE: Final = 20.0  # seconds for one outcome


# ---------------------------------------------------------------- what is run; importable, so that it crosses


def answer(port: WorkerPort, a: Any, b: Any) -> Any:
    """The plainest call."""
    return [a, b]


def explode(port: WorkerPort, text: str) -> Any:
    """Raises."""
    raise ValueError(text)


class CannotTravelError(Exception):
    """An exception that neither pickles nor prints."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise RuntimeError("even its text cannot be had")


def explode_badly(port: WorkerPort) -> Any:
    """Raises what cannot travel."""
    raise CannotTravelError(1, 2)


def leave(port: WorkerPort) -> Any:
    """A stage that tries to end its process."""
    raise SystemExit(3)


def parts(port: WorkerPort, count: int) -> Iterator[Reply]:
    """Gives `count` replies; the last is the end."""
    for number in range(count):
        yield Reply(number, {"number": number})


def until_cancelled(port: WorkerPort, path: str) -> Any:
    """Waits for its flag."""
    with open(path, "w") as file:
        file.write("entered")
    while not port.cancelled():
        time.sleep(0.002)
    return "stopped"


async def until_cancelled_async(port: WorkerPort, path: str) -> Any:
    """The same for lanes that run on a loop."""
    os.close(os.open(path, os.O_CREAT))
    while not port.cancelled():
        await asyncio.sleep(0.002)
    return "stopped"


def speak(port: WorkerPort, count: int) -> int:
    """Sends notes before it ends."""
    for number in range(count):
        port.note("event", {"type": "test.note", "data": {"number": number}})
    return count


def types_of(port: WorkerPort, value: Any) -> Any:
    """Hands its argument back."""
    return value


# ---------------------------------------------------------------- listening


class _Heard:
    """Collects the outcomes of the calls of one executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.outcomes: dict[int, list[Outcome]] = {}
        self.finals: dict[int, asyncio.Future[Outcome]] = {}
        self.starting = False
        self.thread = threading.get_ident()
        self.complaints: list[str] = []
        self.notes: list[tuple[int, str, Any]] = []
        self.closed = False
        executor.on_note = self.note  # type: ignore[attr-defined]

    def note(self, call_id: int, kind: str, data: Any) -> None:
        if self.finals[call_id].done():
            self.complaints.append("a note came after the outcome of its call")
        self.notes.append((call_id, kind, data))

    def start(self, function: Callable[..., Any], *args: Any) -> int:
        call = Call(next(_ids), Shipped(function), args)
        self.finals[call.id] = asyncio.get_running_loop().create_future()
        self.outcomes[call.id] = []
        self.starting = True
        self.executor.start(call, self.deliver)
        self.starting = False
        return call.id

    def deliver(self, outcome: Outcome) -> None:
        if self.starting:
            self.complaints.append("deliver was called from inside start")
        if threading.get_ident() != self.thread:
            self.complaints.append("deliver was called on another thread than the loop's")
        if self.closed:
            self.complaints.append("deliver was called after aclose")
        self.outcomes[outcome.call_id].append(outcome)
        final = self.finals[outcome.call_id]
        if final.done():
            self.complaints.append("an outcome came after the final one")
        elif outcome.final:
            final.set_result(outcome)

    async def end(self, call_id: int) -> Outcome:
        try:
            return await asyncio.wait_for(asyncio.shield(self.finals[call_id]), PATIENCE)
        except TimeoutError:
            raise AssertionError(f"no final outcome within {PATIENCE:g} s") from None

    async def call(self, function: Callable[..., Any], *args: Any) -> Outcome:
        return await self.end(self.start(function, *args))

    async def entered(self, path: str) -> None:
        """Until the call has written that it runs."""
        limit = time.monotonic() + PATIENCE
        while not os.access(path, os.F_OK):
            assert time.monotonic() < limit, "the call never began"
            await asyncio.sleep(0.002)

    def waiting(self) -> Callable[..., Any]:
        return until_cancelled if self.executor.lane in ("thread", "process") else until_cancelled_async


def _load(value: Any) -> Any:
    return value.load() if hasattr(value, "load") else value


# ---------------------------------------------------------------- the promises


async def _one_final_outcome_each(heard: _Heard, folder: str) -> None:
    calls = [heard.start(answer, number, "x") for number in range(50)]
    for number, call in enumerate(calls):
        outcome = await heard.end(call)
        assert outcome.kind == OutcomeKind.OK, f"a plain call ended {outcome.kind.name}: {outcome.error}"
        assert _load(outcome.value) == [number, "x"], f"a call gave {_load(outcome.value)!r}"
    await asyncio.sleep(0.02)
    counts = {len(heard.outcomes[call]) for call in calls}
    assert counts == {1}, f"calls had {counts} outcomes; each has exactly one"


async def _parts_come_before_the_end_and_in_order(heard: _Heard, folder: str) -> None:
    call = heard.start(parts, 20)
    await heard.end(call)
    seen = heard.outcomes[call]
    assert [outcome.final for outcome in seen] == [False] * (len(seen) - 1) + [True], (
        "the final outcome is not the last"
    )
    numbers = [outcome.meta["number"] for outcome in seen if outcome.meta is not None]
    assert numbers == list(range(20)), f"parts came as {numbers}"
    assert [_load(outcome.value) for outcome in seen if outcome.meta is not None] == numbers


async def _exceptions_are_data(heard: _Heard, folder: str) -> None:
    outcome = await heard.call(explode, "boom")
    assert outcome.kind == OutcomeKind.ERROR, f"an exception ended as {outcome.kind.name}"
    assert outcome.error is not None, "an ERROR outcome carries no error"
    assert outcome.error.type.endswith("ValueError"), outcome.error.type
    assert outcome.error.message == "boom", outcome.error.message
    assert "explode" in outcome.error.traceback, "the traceback lacks the function's own frame"
    bad = await heard.call(explode_badly)
    assert bad.kind == OutcomeKind.ERROR, f"an exception that cannot travel ended as {bad.kind.name}"
    assert bad.error is not None
    assert bad.error.type.endswith("CannotTravelError"), bad.error.type
    left = await heard.call(leave)
    assert left.kind == OutcomeKind.ERROR, f"SystemExit in a call ended as {left.kind.name}"
    assert (await heard.call(answer, 1, 2)).kind == OutcomeKind.OK, "the lane did not survive exceptions"


async def _cancel_before_during_and_after(heard: _Heard, folder: str) -> None:
    executor = heard.executor
    executor.cancel(1 << 50, reason="unknown call")
    path = os.path.join(folder, "running")
    running = heard.start(heard.waiting(), path)
    await heard.entered(path)
    for _ in range(3):
        executor.cancel(running, reason="stop")
    ended = await heard.end(running)
    assert ended.kind in (OutcomeKind.CANCELLED, OutcomeKind.OK), f"a cancelled call ended {ended.kind.name}"
    executor.cancel(running, reason="again")
    executor.cancel(running, reason="again", force=True)
    early = heard.start(answer, 1, 2)
    executor.cancel(early, reason="at once")
    assert (await heard.end(early)).kind in (OutcomeKind.CANCELLED, OutcomeKind.OK)
    assert (await heard.call(answer, 1, 2)).kind == OutcomeKind.OK, "the lane did not survive cancels"


async def _queued_calls_can_be_cancelled(heard: _Heard, folder: str) -> None:
    slots = min(heard.executor.slots, 64)
    if slots == 64:
        return  # nothing queues
    paths = [os.path.join(folder, str(number)) for number in range(slots)]
    busy = [heard.start(heard.waiting(), path) for path in paths]
    for path in paths:
        await heard.entered(path)
    queued = heard.start(answer, 1, 2)
    heard.executor.cancel(queued, reason="not wanted")
    assert (await heard.end(queued)).kind == OutcomeKind.CANCELLED, "a queued call ran although it was cancelled"
    for call in busy:
        heard.executor.cancel(call, reason="stop")
    for call in busy:
        await heard.end(call)


async def _force_ends_a_call_now(heard: _Heard, folder: str) -> None:
    path = os.path.join(folder, "forced")
    call = heard.start(heard.waiting(), path)
    await heard.entered(path)
    heard.executor.cancel(call, reason="now", force=True)
    outcome = await heard.end(call)
    assert outcome.kind in (OutcomeKind.CANCELLED, OutcomeKind.OK), f"force ended the call as {outcome.kind.name}"
    assert (await heard.call(answer, 1, 2)).kind == OutcomeKind.OK, "the lane did not survive a forced end"


async def _values_keep_their_types(heard: _Heard, folder: str) -> None:
    value = {1: (1, 2.0, "x", b"y", None, True), "deep": [{"k": {3, 4}}], "big": "z" * 100_000}
    outcome = await heard.call(types_of, value)
    assert _load(outcome.value) == value, "a value changed on its way"
    assert type(_load(outcome.value)[1]) is tuple, "a tuple did not stay one"
    shared = heard.executor.encode(value)
    again = await heard.call(types_of, shared)
    assert _load(again.value) == value, "an encoded value changed on its way"


async def _what_cannot_cross_is_refused_or_runs(heard: _Heard, folder: str) -> None:
    outcome = await heard.call(types_of, threading.Lock())
    assert outcome.kind in (OutcomeKind.OK, OutcomeKind.REFUSED), f"it ended {outcome.kind.name}"
    if outcome.kind == OutcomeKind.REFUSED:
        assert outcome.error is not None, "REFUSED says no reason"


async def _notes_come_in_order_before_the_end(heard: _Heard, folder: str) -> None:
    call = heard.start(speak, 30)
    await heard.end(call)
    numbers = [data["data"]["number"] for call_id, kind, data in heard.notes if call_id == call and kind == "event"]
    assert numbers == list(range(30)), f"notes came as {numbers}"


async def _running_since_is_when_it_began(heard: _Heard, folder: str) -> None:
    assert heard.executor.running_since(1 << 50) is None, "an unknown call is said to run"
    path = os.path.join(folder, "since")
    before = time.monotonic()
    call = heard.start(heard.waiting(), path)
    await heard.entered(path)
    since = heard.executor.running_since(call)
    assert since is not None, "a running call is not said to run"
    assert before - 0.01 <= since <= time.monotonic() + 0.01, "it began at another time"
    heard.executor.cancel(call, reason="stop")
    await heard.end(call)


async def _closing_stops_what_runs(heard: _Heard, folder: str) -> None:
    paths = [os.path.join(folder, f"c{number}") for number in range(min(2, heard.executor.slots))]
    calls = [heard.start(heard.waiting(), path) for path in paths]
    for path in paths:
        await heard.entered(path)
    calls.append(heard.start(answer, 1, 2))
    await heard.executor.aclose(grace=2.0)
    heard.closed = True
    for call in calls:
        assert heard.finals[call].done(), "a call has no outcome although the lane is closed"
    await heard.executor.aclose(grace=1.0)
    await asyncio.sleep(0.05)
    try:
        heard.executor.start(Call(next(_ids), Shipped(answer), (1, 2)), heard.deliver)
    except StageflowError:
        return
    raise AssertionError("a closed lane took a call")


#: name -> what it checks; in this order
PROMISES: Final[dict[str, Callable[[_Heard, str], Awaitable[None]]]] = {
    check.__name__.strip("_"): check
    for check in (
        _one_final_outcome_each,
        _parts_come_before_the_end_and_in_order,
        _exceptions_are_data,
        _cancel_before_during_and_after,
        _queued_calls_can_be_cancelled,
        _force_ends_a_call_now,
        _values_keep_their_types,
        _what_cannot_cross_is_refused_or_runs,
        _notes_come_in_order_before_the_end,
        _running_since_is_when_it_began,
        _closing_stops_what_runs,
    )
}


def check_executor(make: Make, *, only: str | None = None) -> None:
    """Hold an executor to the promises of the port (`only`: to one of `PROMISES`). Blocks; needs no running loop.

    Raises AssertionError with the name of the promise that was broken.
    """
    import tempfile

    for name, check in PROMISES.items():
        if only is not None and name != only:
            continue
        with tempfile.TemporaryDirectory(prefix="stageflow-check-") as folder:
            try:
                _check_one(make, check, folder)
            except AssertionError as error:
                raise AssertionError(f"the executor breaks the promise {name!r}: {error}") from error


def _check_one(make: Make, check: Callable[[_Heard, str], Awaitable[None]], folder: str) -> None:
    threads, children, descriptors = set(threading.enumerate()), _children(), _descriptors()

    async def body() -> None:
        executor = make()
        await executor.open()
        heard = _Heard(executor)
        try:
            await check(heard, folder)
        finally:
            for outcome in itertools.chain.from_iterable(heard.outcomes.values()):
                outcome.value = None  # what the caller still holds may stay beyond the lane
            await executor.aclose(grace=2.0)
            heard.closed = True
            await executor.aclose(grace=1.0)
            await asyncio.sleep(0.01)
        assert not heard.complaints, "; ".join(dict.fromkeys(heard.complaints))

    with asyncio.Runner() as runner:
        runner.run(body())
    _gone("threads", lambda: {thread for thread in threading.enumerate() if thread not in threads})
    _gone("processes", lambda: _children() - children)
    _gone("descriptors", lambda: set(range(max(0, _descriptors() - descriptors))))


def _gone(what: str, left: Callable[[], set[Any]]) -> None:
    limit = time.monotonic() + 3.0
    gc.collect()  # values that came back hold their memory until they are dropped
    while (found := left()) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not found, f"{what} are left after aclose: {found}"


def _children() -> set[int]:
    import psutil

    try:
        return {child.pid for child in psutil.Process().children(recursive=True)}
    except psutil.Error:
        return set()


def _descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
