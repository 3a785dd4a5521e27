"""Importing many modules at once, quickly.

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
