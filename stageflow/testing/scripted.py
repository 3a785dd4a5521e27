"""A lane whose outcomes the test dictates: nothing runs, the test says how each call ends.

    lane = ScriptedExecutor("process", slots=2)
    engine = Engine(lanes={"process": lambda: lane})

`script` answers calls by itself, in order; without a script a call waits until the test ends it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from stageflow.core.errors import LaneClosedError
from stageflow.core.executor import Call, Deliver, Noted, Outcome, OutcomeKind
from stageflow.core.failure import capture
from stageflow.core.output import ErrorInfo

__all__ = ["ScriptedExecutor"]

#: what a script holds: a value, an exception, an OutcomeKind, a whole Outcome, or a function of the call giving one
Step = Any


class ScriptedExecutor:
    """An executor for tests. `calls` are all it was given, `waiting` those without an outcome, `cancels` what it was
    asked to stop."""

    def __init__(self, lane: str = "process", *, slots: int = 1, script: Iterable[Step] = ()) -> None:
        self.lane = lane
        self.slots = slots
        self.script: deque[Step] = deque(script)
        self.calls: list[Call] = []
        self.waiting: dict[int, Call] = {}
        self.cancels: list[tuple[int, str, bool]] = []
        self.on_note: Noted | None = None
        self.closed = False
        self._deliver: dict[int, Deliver] = {}
        self._arrived = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        """Bind to the running loop."""
        self._loop = asyncio.get_running_loop()

    def start(self, call: Call, deliver: Deliver) -> None:
        """Take a call; the script's next step ends it in a later turn of the loop."""
        if self._loop is None or self.closed:
            raise LaneClosedError("the scripted lane is not open")
        self.calls.append(call)
        self.waiting[call.id] = call
        self._deliver[call.id] = deliver
        self._arrived.set()
        if self.script:
            self._loop.call_soon(self._play, call, self.script.popleft())

    async def next_call(self) -> Call:
        """The oldest call that waits, as soon as there is one."""
        while not self.waiting:
            self._arrived.clear()
            await self._arrived.wait()
        return next(iter(self.waiting.values()))

    # ------------------------------------------------------------ how calls end

    def succeed(self, call: Call | int, value: Any = None, meta: Any = None, *, final: bool = True) -> None:
        """The call returns `value`; with `final=False` it is a part."""
        self.deliver(Outcome(_id(call), OutcomeKind.OK, value, meta, final=final))

    def fail(self, call: Call | int, error: BaseException) -> None:
        """The call raises."""
        self.deliver(Outcome(_id(call), OutcomeKind.ERROR, error=capture(error, lane=self.lane), exception=error))

    def lose(self, call: Call | int, *, suspect: bool = True, signal: int = 9) -> None:
        """The call's worker dies."""
        error = ErrorInfo(
            type="stageflow.core.errors.WorkerDiedError", message=f"the worker died of signal {signal}", signal=signal
        )
        self.deliver(Outcome(_id(call), OutcomeKind.LOST, error=error, suspect=suspect))

    def stop(self, call: Call | int) -> None:
        """The call ends cancelled."""
        self.deliver(Outcome(_id(call), OutcomeKind.CANCELLED))

    def deliver(self, outcome: Outcome) -> None:
        """Any outcome. One for a call that has already ended is dropped."""
        if outcome.call_id not in self.waiting:
            return
        deliver = self._deliver[outcome.call_id]
        if outcome.final:
            del self.waiting[outcome.call_id]
            del self._deliver[outcome.call_id]
        deliver(outcome)

    def _play(self, call: Call, step: Step) -> None:
        if isinstance(step, Callable) and not isinstance(step, type):  # type: ignore[arg-type]
            step = step(call)
        if isinstance(step, Outcome):
            self.deliver(step)
        elif isinstance(step, BaseException):
            self.fail(call, step)
        elif step is OutcomeKind.LOST:
            self.lose(call)
        elif step is OutcomeKind.CANCELLED:
            self.stop(call)
        else:
            self.succeed(call, step)

    # ------------------------------------------------------------ the rest of the port

    def cancel(self, call_id: int, *, reason: str, force: bool = False) -> None:
        """Note the wish; a forced one is granted."""
        self.cancels.append((call_id, reason, force))
        if force and call_id in self.waiting:
            self.stop(call_id)

    def encode(self, value: Any) -> Any:
        """The value itself."""
        return value

    def running_since(self, call_id: int) -> float | None:
        """Every call that waits is taken to run since long ago."""
        return 0.0 if call_id in self.waiting else None

    def progress_of(self, call_id: int) -> tuple[float, float] | None:
        """None: nothing runs."""
        return None

    async def aclose(self, *, grace: float) -> None:
        """End every call that waits as cancelled."""
        self.closed = True
        for call_id in list(self.waiting):
            self.stop(call_id)
        self._loop = None


def _id(call: Call | int) -> int:
    return call if isinstance(call, int) else call.id
