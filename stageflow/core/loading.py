"""Importing many modules at once, quickly; and leaving an interpreter that has done so.

May import the standard library only, and nothing that is not loaded anyway.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it, Python's garbage collector rests: what imports make stays, and it would walk through all of that every
    few hundred objects, a tenth of the time. Afterwards it works as before, with what was made counted as old."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # moves lists of objects as a whole, without a look at any
            gc.unfreeze()
        gc.enable()


def leave() -> None:
    """For the end of an interpreter: what has become garbage lately is collected now, and all the rest once, not twice.

    Python collects before it takes modules down and again when it has, each time through all that imports have made: a
    third of the time that its end takes. Old garbage in cycles is finalized by the second, as what is in use is.
    """
    if gc.isenabled() and not gc.get_debug():
        gc.collect(1)
        gc.disable()
