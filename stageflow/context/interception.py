"""One attempt as interceptors see it, and what they may ask for; in the parent and in a worker alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Literal, Protocol, TypeVar

import msgspec

S = TypeVar("S")
Scope = Literal["run", "engine"]


class Gate(Protocol):
    """Something one coroutine awaits and another opens."""

    def __await__(self) -> Generator[Any, Any, Any]: ...

    def done(self) -> bool:
        """True once opened, or once its waiter has gone."""
        ...

    def set_result(self, result: None, /) -> None:
        """Open it."""
        ...


class Services(Protocol):
    """What the runtime does for interceptors."""

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Wait; ends early only by cancellation."""
        ...

    def gate(self) -> Gate:
        """A closed gate on the loop of the run."""
        ...

    def later(self, seconds: float, callback: Callable[[], Any]) -> Any:
        """Call back in so many seconds; what is returned has `cancel()`."""
        ...

    def log(self, level: int, message: str, fields: dict[str, Any]) -> None:
        """Write to the log."""
        ...

    def digest(self, value: Any) -> str:
        """A hash of a value's content, however deep."""
        ...

    def state(self, owner: Any, factory: Callable[[], Any], scope: Scope) -> Any:
        """What `owner` keeps in this run or engine; made on first use."""
        ...


class InterceptorContext(msgspec.Struct, kw_only=True):
    """One attempt as interceptors see it. `now()` is in monotonic seconds; `emit(type, data)` sends an event.

    `inputs` and `snapshot` are what the stage gets; reading a value of them may decode it.
    """

    stage: str
    run_id: str
    services: Services
    emit: Callable[[str, dict[str, Any]], Any]
    now: Callable[[], float]
    attempt: int = 1
    item: tuple[int, ...] | None = None
    lane: str = ""
    kind: str = ""
    inputs: Any = None
    snapshot: Any = None
    memory: dict[int, Any] = {}

    def state(self, owner: Any, factory: Callable[[], S], scope: Scope = "run") -> S:
        """What `owner` keeps across attempts."""
        kept: S = self.services.state(owner, factory, scope)
        return kept

    def remember(self, owner: Any, value: Any) -> None:
        """Keep a value from `before` to `after` of this attempt."""
        self.memory[id(owner)] = value

    def recall(self, owner: Any, default: Any = None) -> Any:
        """What `remember` kept, once."""
        return self.memory.pop(id(owner), default)
