"""The clock as an argument: deciders get `now`, the runtime reads a `Clock`, tests give a virtual one."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Where time comes from. `monotonic` is in seconds and never goes back; `time_ns` is Unix time in nanoseconds."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start."""
        ...

    def time_ns(self) -> int:
        """Unix time in nanoseconds."""
        ...
