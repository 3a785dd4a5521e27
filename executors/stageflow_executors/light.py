"""`LightFuture`: the standard's future, without the parts that only somebody who waits for it needs.

Of thousands of futures few are ever waited for; a condition with its lock and two lists for each were what the garbage
collector spent its time on. Here they are made when somebody first asks for the condition: under the one lock under
which futures that have none change their state. From then on the future is the standard's.

May import the standard library only.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import Any, Final, Protocol

#: re-entered by finalizers and signal handlers that ask for a condition
_lock: Final = threading.RLock()
_PATIENT: Final = 0.2  #: seconds; who waits no longer does not wait where a quarter of it may pass unnoticed
_OVER: Final = frozenset((CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED))


class Direct(Protocol):
    """Who may have the result before the loop's thread does."""

    def wait(self, future: LightFuture) -> None:
        """Try for some milliseconds to get it."""
        ...

    def hand_over(self) -> None:
        """Let the loop's thread get it."""
        ...


class _Parts:
    __slots__ = ("callbacks", "condition", "waiters")

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiters: list[Any] = []
        self.callbacks: list[Any] = []


class LightFuture(concurrent.futures.Future[Any]):
    """Thread-safe as the standard's."""

    _state = PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _parts: _Parts | None = None
    _direct: Direct | None = None

    def __init__(self) -> None:
        """Makes nothing."""

    def begin_at(self, direct: Direct) -> None:
        """It runs, and its result can be had of `direct`. Nobody else has it yet."""
        self._state = RUNNING
        self._direct = direct

    def leave_direct(self) -> None:
        """Its result cannot be had there any more."""
        self._direct = None

    def _hand_over(self) -> None:
        direct, self._direct = self._direct, None
        if direct is not None:
            direct.hand_over()

    def _asked(self) -> _Parts:
        if self._direct is not None:
            self._hand_over()
        parts = self._parts
        if parts is None:
            with _lock:
                parts = self.__dict__.setdefault("_parts", _Parts())
        return parts

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        return self._asked().condition

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        return self._asked().waiters

    @property
    def _done_callbacks(self) -> list[Any]:
        return self._asked().callbacks

    def done(self) -> bool:
        """As the standard's."""
        if self._direct is not None:
            self._hand_over()
        return self._state in _OVER

    def result(self, timeout: float | None = None) -> Any:
        """As the standard's."""
        direct = self._direct
        if direct is not None and (timeout is None or timeout > _PATIENT):
            began = time.monotonic()
            direct.wait(self)
            if timeout is not None:
                timeout = max(0.0, timeout - (time.monotonic() - began))
        if self._state == FINISHED and self._exception is None:
            return self._result
        return super().result(timeout)

    def set_running_or_notify_cancel(self) -> bool:
        """As the standard's."""
        with _lock:
            if self._parts is None and self._state == PENDING:
                self._state = RUNNING
                return True
        return super().set_running_or_notify_cancel()

    def set_result(self, result: Any) -> None:
        """As the standard's."""
        set_results((self,), (result,))


def set_lone(future: LightFuture, result: Any) -> bool:
    """`set_result` of one that nobody but the caller waits for; False if somebody does, or it has ended."""
    with _lock:
        if future._parts is not None or future._state != RUNNING:
            return False
        future._result = result
        future._state = FINISHED
        future._direct = None
    return True


def set_results(futures: Iterable[concurrent.futures.Future[Any]], results: Iterable[Any]) -> None:
    """`set_result` of many futures."""
    others = []
    with _lock:
        for future, result in zip(futures, results, strict=True):
            if type(future) is LightFuture and future._parts is None and future._state == RUNNING:
                future._result = result
                future._state = FINISHED
            else:
                others.append((future, result))
    for future, result in others:
        concurrent.futures.Future.set_result(future, result)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]

#: Is the standard library's future made of the parts that this one replaces? Else its own is to be used.
FITS: Final = vars(concurrent.futures.Future()).keys() == {
    "_condition",
    "_state",
    "_result",
    "_exception",
    "_waiters",
    "_done_callbacks",
}
