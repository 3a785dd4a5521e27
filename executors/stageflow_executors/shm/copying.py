"""Large copies by two cores: one keeps half of a machine's memory busy at best.

May import the standard library and `stageflow_executors.shm.lease` only.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, Final

from stageflow_executors.shm.lease import address_of

#: bytes from which a second thread is worth its start (some 0.1 ms)
HALVES_ABOVE: Final = 8 << 20
_PAGE: Final = 4096


def copy_in_halves(into: memoryview, data: Any) -> None:
    """`into[:] = data` for flat buffers of bytes of one size, the second half by a thread of its own. Returns, or
    raises what interrupted it, when nobody writes any more. Others run meanwhile: the interpreter is let go."""
    nbytes = into.nbytes
    half = nbytes // 2 // _PAGE * _PAGE
    target, source = address_of(into), address_of(data)
    rest = (target + half, source + half, nbytes - half)
    other = threading.Thread(target=ctypes.memmove, args=rest, name="stageflow-copy", daemon=True)
    try:
        other.start()
    except RuntimeError:  # no more threads here
        into[:] = data
        return
    interrupted: BaseException | None = None
    try:
        ctypes.memmove(target, source, half)
    finally:
        while other.is_alive():
            try:
                other.join()
            except BaseException as error:  # Ctrl-C: the block must not be given to others while it is written
                interrupted = error
    if interrupted is not None:
        raise interrupted
