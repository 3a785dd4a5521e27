"""Lets the loop have the interpreter back sooner while threads of a stage hold it.

A thread that computes in Python gives the interpreter away every `sys.getswitchinterval()` seconds, 5 ms by default; a
loop that has a hand-off to make waits that long. While a run with thread stages is active the interval is shorter, for
the whole process; after the last such run it is what it was, unless somebody else has set it meanwhile. Any thread.
"""

from __future__ import annotations

import sys
import threading

_lock = threading.Lock()
_active: list[float] = []
_before = 0.0
_set = 0.0


def enter(seconds: float) -> None:
    """One more run wants thread switches at least every `seconds`."""
    global _before
    with _lock:
        if not _active:
            _before = sys.getswitchinterval()
        _active.append(seconds)
        _apply()


def leave(seconds: float) -> None:
    """One run less, which had entered with `seconds`."""
    with _lock:
        _active.remove(seconds)
        _apply()


def _apply() -> None:
    global _set, _before
    now = sys.getswitchinterval()
    if _set and abs(now - _set) > _set / 100:
        _before, _set = now, 0.0  # somebody else has set it: theirs counts
        if not _active:
            return
    wanted = min([_before, *_active])
    sys.setswitchinterval(wanted)
    _set = sys.getswitchinterval() if _active else 0.0
