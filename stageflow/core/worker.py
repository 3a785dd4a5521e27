"""`WorkerPort`: what a running attempt may ask of the place it runs in. Each lane has an implementation; a stage
never sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from stageflow.core.executor import Reply

_ITEM: Final = "\x1f"  # begins the reason of a stop that is meant for one item of a block

#: the stage that runs, and the index path of its item
UnderWay = tuple[str, tuple[int, ...] | None]


def item_stop(index: int, reason: str) -> str:
    """The reason that a lane is given to stop only the item `index` of a block."""
    return f"{_ITEM}{index}:{reason}"


def stops_item(reason: str | None) -> bool:
    """Whether a reason is meant for items of the call, not for all of it."""
    return reason is not None and reason.startswith(_ITEM)


def stop_of(reason: str | None, index: int) -> str | None:
    """Why the item `index` is to stop, by the reason its call was given; None where only others are meant."""
    if reason is None or not reason.startswith(_ITEM):
        return reason
    for part in reason.split(_ITEM)[1:]:
        number, _, why = part.partition(":")
        if number == str(index):
            return why
    return None


def both_stops(first: str | None, second: str) -> str:
    """What a call is to be told that is asked to stop a second time: all of it counts for more than an item."""
    if first is None or (stops_item(first) and not stops_item(second)):
        return second
    return first + second if stops_item(first) and second not in first else first


class WorkerPort(Protocol):
    """One per running call. All methods may be called from the thread that runs the call, and from threads it
    starts."""

    @property
    def lane(self) -> str:
        """The lane's name."""
        ...

    @property
    def worker_pid(self) -> int:
        """The process that runs the call."""
        ...

    def cancelled(self) -> bool:
        """True once the call was asked to stop. Costs about as much as reading an attribute."""
        ...

    def cancel_reason(self) -> str | None:
        """Why, as far as the lane was told."""
        ...

    def progress(self, done: float, total: float) -> None:
        """Publish numbers the parent can read without a message."""
        ...

    def note(self, kind: str, data: Any) -> None:
        """Send small msgpack-able data to the parent, in order, before the call's outcome. Kinds: "event", "log",
        "defer", ..."""
        ...

    def buffer(self, nbytes: int) -> memoryview:
        """Writable memory that is already shared, so that a result written there is not copied again."""
        ...

    def items(self, current: Callable[[], UnderWay]) -> None:
        """From now on `current()` says where in the call it is, for whoever takes in what it prints."""
        ...

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` (from any thread) when the call is asked to stop; best effort in lanes that only have a
        flag."""
        ...


class PacedPort(WorkerPort, Protocol):
    """The port of a lane whose calls can stand still behind what they have given. Calls of other lanes never do."""

    def stand(self, stopped: Callable[[], bool]) -> tuple[int, int] | None:
        """Wait behind a part that asks (`Reply.asks`) until the engine lets the call go on, or `stopped()` says so. The
        items and bytes that it then may give, where the engine counts them."""
        ...


class TimedPort(WorkerPort, Protocol):
    """The port of a lane that regions run in."""

    def clock(self, runs: bool) -> None:
        """Stop the time of the call that its timeout is compared with, or let it run anew from zero."""
        ...


class TellingPort(WorkerPort, Protocol):
    """The port of a lane on whose loop calls are coroutines, which cannot yield their parts."""

    async def tell(self, reply: Reply) -> None:
        """Deliver a part; behind one that asks, wait until the engine lets the call go on."""
        ...
