"""`ProcessPort`: what a running call may ask of its worker; `Plain`: a function that asks nothing.

Loaded in workers: no asyncio.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stageflow.core.worker import UnderWay, both_stops, stops_item
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes import status

if TYPE_CHECKING:
    from stageflow_executors.processes.worker_main import Worker


class ProcessPort:
    """One per call; answers to `stageflow.core.worker.WorkerPort`. Any thread."""

    __slots__ = ("_callbacks", "_page", "_seen", "_slot", "_words", "_worker", "call_id", "closed")
    lane = "process"

    def __init__(self, worker: Worker, call_id: int) -> None:
        self._worker = worker
        self._page = worker.page
        self._words = worker.page.words
        self._seen = self._words[status.CANCEL_SEQ]
        self._slot: int | None = None
        self._callbacks: list[Callable[[], None]] | None = None
        self.call_id = call_id
        self.closed = False

    @property
    def worker_pid(self) -> int:
        """The worker's pid."""
        return self._worker.pid

    def cancelled(self) -> bool:
        """True once the parent wrote this call's number into the status page."""
        if self._slot is not None:
            return True
        seen = self._words[status.CANCEL_SEQ]
        if seen == self._seen:
            return False
        self._slot = self._page.cancel_slot(self.call_id)
        self._seen = seen
        return self._slot is not None

    def cancel_reason(self) -> str | None:
        """The reason beside the request; None if there is none."""
        if not self.cancelled():
            return None
        reason = None
        for text in self._page.cancel_reasons(self.call_id):
            reason = both_stops(reason, text)
        return reason

    def progress(self, done: float, total: float) -> None:
        """Two stores into the status page."""
        if not self.closed:
            self._page.doubles[status.TOTAL] = total
            self._page.doubles[status.DONE] = done

    def progress_words(self) -> memoryview[float]:
        """(done, total) on the status page, for whoever tells of each of many steps and closes before the call
        does."""
        return self._page.doubles[status.DONE : status.TOTAL + 1]

    def note(self, kind: str, data: Any) -> None:
        """Send at once: what is said must be heard also if the worker dies in the next moment."""
        self._worker.post([ch.NOTE, self.call_id, kind, data])

    def buffer(self, nbytes: int) -> memoryview:
        """Memory in the worker's arena. Raises SharedMemoryFullError."""
        return self._worker.memory.lend(nbytes)

    def items(self, current: Callable[[], UnderWay]) -> None:
        """What the call prints, logs and warns is tagged with the item that is under way then."""
        self._worker.item = current

    def clock(self, runs: bool) -> None:
        """Stop the time of the call that its timeout is compared with, or let it run anew from zero."""
        if runs:
            self._words[status.STARTED_NS] = time.monotonic_ns()
        self._words[status.PHASE] = status.RUN if runs else status.DECODE

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """`callback` runs on a watching thread, within about 20 ms of the request."""
        if self._callbacks is None:
            self._callbacks = []
            self._callbacks.append(callback)
            threading.Thread(target=self._watch, name="stageflow-cancel", daemon=True).start()
        else:
            self._callbacks.append(callback)

    def stand(self, stopped: Callable[[], bool]) -> tuple[int, int] | None:
        """Wait for the parent's word, or until `stopped()`, which is looked at every 20 ms. How much more it allows, if
        it said so."""
        return self._worker.stand(self.call_id, stopped) if not self.closed else None

    def _watch(self) -> None:
        told = None
        while not self.closed:
            reason = self.cancel_reason()
            if reason != told:
                told = reason
                for callback in self._callbacks or ():
                    try:
                        callback()
                    except Exception as error:
                        self.note(
                            "log", {"logger": "stageflow", "level": 40, "message": f"on_cancel callback: {error!r}"}
                        )
                if not stops_item(reason):
                    return
            time.sleep(0.02)

    def close(self) -> None:
        """The call has ended."""
        self.closed = True


class Plain:
    """Calls a function that knows nothing of ports: keywords first, because a call has only positional arguments."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, port: Any, keywords: dict[str, Any] | None, *args: Any) -> Any:
        """Ignores the port."""
        return self.function(*args, **keywords) if keywords else self.function(*args)
