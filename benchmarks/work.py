"""What the stages and tasks of the benchmarks do. Importable, so that every kind of worker finds it by name.

May not import: stageflow, any peer but numpy (and that only where an array is handled).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec


def noop(value: Any) -> Any:
    """Give back what was given."""
    return value


async def anoop() -> None:
    """A stage that does nothing on the loop."""


def burn(loops: int) -> int:
    """A fixed amount of pure-Python work. Judged by tasks finished: CPU time inflates under contention."""
    total = 0
    for number in range(loops):
        total += number & 3
    return total


def burn_many(loops: Sequence[int]) -> list[int]:
    """A chunk made by hand."""
    return [burn(count) for count in loops]


def loops_per_second(repetitions: int = 9) -> float:
    """Loops of `burn` in a CPU second of this thread."""
    best = 0.0
    for _ in range(repetitions):
        began = time.thread_time()
        burn(40_000)
        best = max(best, 40_000 / (time.thread_time() - began))
    return best


def plus_one(array: Any) -> Any:
    """An array of the same size, every page of both touched."""
    return array + 1.0


def plus_one_in_place(array: Any, ctx: Any) -> Any:
    """The same, written straight into shared memory."""
    import numpy as np

    return np.add(array, 1.0, out=ctx.empty(array.shape, array.dtype))


def touch(array: Any) -> float:
    """Read one number of every page."""
    return float(array[::512].sum())


class Record(msgspec.Struct, frozen=True, gc=False):
    """A typed record of the usual kind."""

    number: int
    name: str
    weight: float
    tags: tuple[str, ...] = ()


def records(count: int) -> list[Record]:
    """`count` records, all different."""
    return [Record(number, f"record {number}", number / 7.0, ("a", f"t{number % 10}")) for number in range(count)]
