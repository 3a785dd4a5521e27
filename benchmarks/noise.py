"""How much of the machine is ours right now: told by loops of known work, not by guesses about the load.

May not import: stageflow, any peer.
"""

from __future__ import annotations

import time
from typing import Final

#: wall time over CPU time of the probe above which a round is thrown away. A quiet machine gives 1.00 to 1.05
LIMIT: Final = 1.25
_SLICES: Final = 8


def spin(loops: int = 20_000) -> float:
    """A fixed amount of pure-Python work; returns its CPU seconds. The unit that stored results are ratios to."""
    began = time.thread_time()
    total = 0
    for number in range(loops):
        total += number & 3
    return time.thread_time() - began


def stolen(slices: int = _SLICES) -> float:
    """Wall time over CPU time of a short spin: 1.0 where nobody else wants this core, 2.0 where one other does."""
    wall = time.perf_counter()
    cpu = time.thread_time()
    for _ in range(slices):
        spin()
    cpu = time.thread_time() - cpu
    return (time.perf_counter() - wall) / cpu if cpu > 0 else 1.0


def calibrate(repetitions: int = 7) -> float:
    """CPU seconds of one spin, the best of some: what this interpreter on this machine takes when nobody disturbs."""
    return min(spin() for _ in range(repetitions))
