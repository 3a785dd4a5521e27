"""The executor port: how the engine hands a call to a lane and hears how it ended.

An executor runs opaque calls. It never decides, retries or reorders across calls; it knows no stage, graph or run.

Guarantees every executor keeps (`stageflow.testing.check_executor`):
- for each `start`, `deliver` is called with exactly one *final* Outcome, on the thread of the loop the executor is
  bound to,
  never from inside `start` itself; parts (`final=False`) come before it, in order;
- `cancel` is idempotent and may come before, during or after; the final Outcome still comes, whatever it is;
- after `aclose` no callback is called any more, and no thread, process, descriptor or byte of its own is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from stageflow.core.output import ErrorInfo


@runtime_checkable
class Payload(Protocol):
    """An encoded value that an executor holds for the engine. The engine passes it on without decoding it."""

    @property
    def nbytes(self) -> int:
        """Encoded size."""
        ...

    def load(self) -> Any:
        """Decode. May be called any number of times; big buffers come back as read-only views of the same bytes."""
        ...


_shipped_keys = itertools.count(1)


class Shipped:
    """A callable that is sent to each worker at most once and then addressed by `key`.

    `function(port, *args)` is what runs. It returns a plain value, or a `Reply`, or a generator of `Reply` parts.
    `modules` are preloaded where workers are forked from.
    """

    __slots__ = ("__weakref__", "function", "key", "label", "modules")

    def __init__(self, function: Callable[..., Any], *, label: str = "", modules: Sequence[str] = ()) -> None:
        self.function = function
        self.key: Final[int] = next(_shipped_keys)
        self.label = label or getattr(function, "__qualname__", repr(function))
        self.modules = tuple(modules)


class Reply(msgspec.Struct):
    """What a shipped function hands back: `value` crosses as payload; `meta` (small) crosses beside it by the same
    codec, types kept,
    and is decoded by the parent at once."""

    value: Any = None
    meta: Any = None
    has_value: bool = True  #: False sends no payload at all
    asks: bool = False  #: of a part: the call waits behind it (`WorkerPort.stand`), so it must be on its way


class Call(msgspec.Struct):
    """One thing to run: `shipped.function(port, *args)`. Arguments are plain values or Payloads of an earlier outcome.

    `short` allows the lane to send the call ahead of need (it takes a few milliseconds and has no timeout). `alone`
    forbids
    sharing a worker's queue with any other call (a suspect after a worker died).
    """

    id: int
    shipped: Shipped
    args: tuple[Any, ...] = ()
    short: bool = False
    alone: bool = False
    writable: int = 0  #: arguments (bits) whose buffers are given as private copy-on-write pages, not read-only views
    apart: bool = False  #: it gets a worker beside those that the lane has, and takes no slot of theirs
    lazy: int = 0  #: in lanes that encode, arguments from this place on are given as what `load()` decodes (0: none)


class OutcomeKind(IntEnum):
    """How a call ended."""

    OK = 0
    ERROR = 1  #: the function raised
    LOST = 2  #: the worker died while this call ran (`suspect=True`), or before it began
    CANCELLED = 3  #: stopped because of `cancel`
    REFUSED = 4  #: an argument or result could not be encoded; nothing was decided by the stage


class Outcome(msgspec.Struct):
    """A part (`final=False`) or the end of a call.

    `value` is a plain object in lanes of this process and a Payload in others. Times: `started` is the monotonic
    second at which
    the function was entered; `seconds` and `cpu_seconds` are spent inside it.
    """

    call_id: int
    kind: OutcomeKind = OutcomeKind.OK
    value: Any = None
    meta: Any = None
    final: bool = True
    error: ErrorInfo | None = None
    exception: BaseException | None = None  #: the original, in lanes of this process
    suspect: bool = False
    worker_pid: int = 0
    started: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    rss_bytes: int = 0


Deliver = Callable[[Outcome], None]
#: (call id, kind, data): what `WorkerPort.note` sent
Noted = Callable[[int, str, Any], None]


class Executor(Protocol):
    """A lane. Bound to the running loop it was opened on; not thread-safe unless a method says so."""

    @property
    def lane(self) -> str:
        """The lane's name."""
        ...

    @property
    def slots(self) -> int:
        """How many calls it runs at once."""
        ...

    async def open(self) -> None:
        """Become usable. Cheap: workers start when the first call needs them."""
        ...

    def start(self, call: Call, deliver: Deliver) -> None:
        """Run `call`; returns at once. Arguments that cannot be encoded end in a REFUSED outcome, not in an
        exception."""
        ...

    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Ask the call to stop; with `force` stop it by the strongest means the lane has (a process: kill)."""
        ...

    def encode(self, value: Any) -> Any:
        """`value` in the form in which several calls of this lane can share it (a Payload), or `value` itself."""
        ...

    def running_since(self, call_id: int) -> float | None:
        """Monotonic second at which the call's function was entered; None while it is queued or being decoded."""
        ...

    def progress_of(self, call_id: int) -> tuple[float, float] | None:
        """What `WorkerPort.progress` last said."""
        ...

    async def aclose(self, *, grace: float) -> None:
        """Stop everything within `grace` seconds, then by force, and give back every resource."""
        ...


class Paces(Protocol):
    """What a lane has besides if its ports can `stand` (`stageflow.core.worker.PacedPort`)."""

    def stand(self, call_id: int) -> None:
        """The call stands still behind a part that asks: another may have its place until it goes on or ends."""
        ...

    def go_on(self, call_id: int) -> None:
        """Let a call go on that stands, or is about to."""
        ...
