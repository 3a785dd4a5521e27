"""`Lookout`: whether to look for the next frame for a moment before sleeping until it comes.

To be woken takes longer than a short call does: on a machine with nothing else to do, half of its round trip. So
both ends of a channel look a while first, where the last call was short, cores are to spare, and looking has paid
lately. Between two looks each gives its core to whoever waits for it; where somebody does, it goes to sleep.

May import the standard library only: workers load it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

LOOK_NS: Final = 60_000  #: of looking, at most
#: a step takes one or two microseconds; after so many somebody else had the core
CROWDED_NS: Final = 20_000
SHORT_NS: Final = 20_000  #: calls that take longer are waited for asleep
_LONGEST_PAUSE: Final = 1024
_yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: None)
_clock = time.monotonic_ns


class Lookout:
    """Remembers whether looking paid. Each time that it did not, twice as many calls go without; one thread."""

    __slots__ = ("_began", "_pause", "_seen", "rest")

    def __init__(self) -> None:
        self.rest = 0  #: calls that are to go without
        self._pause = 0
        self._began = self._seen = 0

    def worth(self) -> bool:
        """Is the call at hand one to look for?"""
        if self.rest:
            self.rest -= 1
            return False
        return True

    def begin(self) -> None:
        """The first look is about to be taken."""
        self._began = self._seen = _clock()

    def again(self) -> bool:
        """Nothing was there: let others run. False when it is time to sleep."""
        _yield_core()
        now = _clock()
        if now - self._began < LOOK_NS and now - self._seen < CROWDED_NS:
            self._seen = now
            return True
        self._pause = self.rest = min(2 * self._pause + 8, _LONGEST_PAUSE)
        return False

    def found(self) -> None:
        """It was worth it."""
        self._pause >>= 1

    def look(self, receive: Callable[[], Any]) -> Any:
        """What `receive` gives within the time; None when it is time to sleep."""
        self.begin()
        while (found := receive()) is None:
            if not self.again():
                return None
        self.found()
        return found
