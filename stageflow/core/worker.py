"""`WorkerPort`: what a running attempt may ask of the place it runs in. Each lane has an implementation; a stage
never sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


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

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` (from any thread) when the call is asked to stop; best effort in lanes that only have a
        flag."""
        ...
