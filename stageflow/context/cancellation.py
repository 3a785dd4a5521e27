"""Asking for a stop: a tree of tokens, from a run down to its attempts.

A token is set once, by whoever is first, from any thread or signal handler; it is read everywhere. There are no timer
threads: a deadline is noticed when somebody looks.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from stageflow.core.errors import NotShippableError, StageCancelledError

_log = logging.getLogger("stageflow.cancellation")

#: reason of a token whose deadline passed
DEADLINE: Final = "deadline"
_UNSPECIFIED: Final = "cancelled"

_keys = itertools.count(1)

Unregister = Callable[[], None]


class _Reason:
    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class CancellationToken:
    """Says whether to stop, and why. The first reason wins; parents reach children, never the reverse.

    `deadline` is in seconds of `clock` (default: the monotonic clock). `probe` is asked for a reason whenever the
    token is read and not set yet: a lane passes one that looks at its own flag; `watch(look)` is called with the first
    callback and arranges that `look()` is called once the probe has something to say. All methods may be called from
    any thread and from signal handlers; no lock is taken.
    """

    __slots__ = ("__weakref__", "_callbacks", "_clock", "_deadline", "_parent", "_probe", "_state", "_watch")

    def __init__(
        self,
        *,
        deadline: float | None = None,
        clock: Callable[[], float] | None = None,
        parent: CancellationToken | None = None,
        probe: Callable[[], str | None] | None = None,
        watch: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> None:
        inherited: Callable[[], float] = parent._clock if parent is not None else time.monotonic
        self._clock: Callable[[], float] = clock or inherited
        self._deadline = deadline
        self._parent = parent
        self._probe = probe
        self._watch = watch
        # `setdefault` and `pop` of a dict are atomic, which is all the locking a write-once flag needs. A lock would
        # deadlock when a signal handler cancels in the middle of another call.
        self._state: dict[str, _Reason] = {}
        self._callbacks: dict[int, tuple[Callable[[str], Any], Unregister | None]] = {}

    def __repr__(self) -> str:
        reason = self._state.get("reason")
        return f"<CancellationToken {'active' if reason is None else repr(reason.text)}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise NotShippableError(
            "a CancellationToken cannot cross a process boundary",
            hint="use ctx.token inside the stage: it follows the token of the run in every lane",
            path="CancellationToken",
        )

    @property
    def cancelled(self) -> bool:
        """True once this token, or one above it, was cancelled or passed its deadline."""
        return "reason" in self._state or self._look() is not None

    @property
    def reason(self) -> str | None:
        """Why, or None while not cancelled."""
        set_to = self._state.get("reason")
        return set_to.text if set_to is not None else self._look()

    @property
    def deadline(self) -> float | None:
        """The earliest deadline of this token and those above it, in seconds of the clock."""
        above = self._parent.deadline if self._parent is not None else None
        if self._deadline is None or above is None:
            return above if self._deadline is None else self._deadline
        return min(self._deadline, above)

    @property
    def remaining(self) -> float | None:
        """Seconds until `deadline` (never negative), or None without one."""
        deadline = self.deadline
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _look(self) -> str | None:
        """Adopt a stop from above, from the probe or from the clock; the reason that then holds, or None."""
        found = self._parent.reason if self._parent is not None else None
        if found is None and self._probe is not None:
            found = self._probe()
        if found is None and self._deadline is not None and self._clock() >= self._deadline:
            found = DEADLINE
        if found is None:
            return None
        self._set(found)
        return self._state["reason"].text

    def _set(self, reason: str) -> bool:
        mine = _Reason(reason)
        if self._state.setdefault("reason", mine) is not mine:
            return False
        # A callback added from now on sees the reason and runs itself; one added before is in the table.
        for key in list(self._callbacks):
            self._fire(key, reason)
        return True

    def _fire(self, key: int, reason: str) -> None:
        entry = self._callbacks.pop(key, None)
        if entry is None:
            return
        callback, link = entry
        if link is not None:
            link()
        try:
            callback(reason)
        except Exception:
            _log.exception("a cancellation callback raised; the others still run", extra={"reason": reason})

    def cancel(self, reason: str = _UNSPECIFIED) -> bool:
        """Ask for a stop; True if this call was the first. Runs the callbacks in the order of their registration."""
        if self._look() is not None:
            return False
        return self._set(reason)

    def on_cancel(self, callback: Callable[[str], Any]) -> Unregister:
        """Call `callback(reason)` exactly once when cancelled, or at once; returns how to take it back.

        It runs in the thread that cancels (or that notices a deadline); what it raises is logged and swallowed.
        """
        key = next(_keys)
        link = self._parent.on_cancel(self._set) if self._parent is not None and "reason" not in self._state else None
        self._callbacks[key] = (callback, link)
        watch, self._watch = self._watch, None
        if watch is not None:
            watch(self._look)
        reason = self.reason
        if reason is not None:
            self._fire(key, reason)

        def unregister() -> None:
            entry = self._callbacks.pop(key, None)
            if entry is not None and entry[1] is not None:
                entry[1]()

        return unregister

    def child(
        self, *, deadline: float | None = None, probe: Callable[[], str | None] | None = None
    ) -> CancellationToken:
        """A token that stops when this one does, or by itself. One that keeps callbacks wants `close` at its end."""
        return CancellationToken(deadline=deadline, clock=self._clock, parent=self, probe=probe)

    def with_deadline(self, seconds: float) -> CancellationToken:
        """A child that also stops `seconds` from now, with reason "deadline"."""
        return self.child(deadline=self._clock() + seconds)

    def close(self) -> None:
        """Forget every callback, so that the tokens above no longer hold this one. The token stays readable."""
        for key in list(self._callbacks):
            entry = self._callbacks.pop(key, None)
            if entry is not None and entry[1] is not None:
                entry[1]()

    def raise_if_cancelled(self) -> None:
        """Raise `StageCancelledError` (field `reason`) once cancelled."""
        reason = self.reason
        if reason is not None:
            raise StageCancelledError(f"cancelled: {reason}", reason=reason)

    def reset(self) -> None:
        """Make the token as new, without callbacks. For tests: whoever saw it cancelled has already acted."""
        self.close()
        self._state.clear()
