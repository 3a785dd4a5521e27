"""Large copies by two cores: one keeps half of a machine's memory busy at best.

May import the standard library and `stageflow_executors.shm.lease` only.
"""

from __future__ import annotations

import _thread
import ctypes
from collections import deque
from typing import Any, Final

from stageflow_executors.shm.lease import address_of

#: bytes from which a second thread is worth its start
SHARED_ABOVE: Final = 8 << 20
#: taken at a time: where the second thread comes late, or has its core taken, the first does more
PIECE: Final = 4 << 20


def copy_by_two(into: memoryview, data: Any) -> None:
    """`into[:] = data` for flat buffers of bytes of one size, by this thread and one of its own. Returns, or raises
    what interrupted it, when nobody writes any more. Others run meanwhile: the interpreter is let go."""
    nbytes = into.nbytes
    target, source = address_of(into), address_of(data)
    pieces = iter(range(0, nbytes, PIECE))
    ended = _thread.allocate_lock()

    def copy() -> None:
        for at in pieces:
            ctypes.memmove(target + at, source + at, min(PIECE, nbytes - at))

    def help_with_it() -> None:
        try:
            copy()
        finally:
            ended.release()

    ended.acquire()
    interrupted: BaseException | None = None
    try:
        try:
            _thread.start_new_thread(help_with_it, ())  # the thread of `threading` is waited for until it has begun
        except RuntimeError:  # no more threads here
            ended.release()
        copy()
    finally:
        while True:
            try:
                deque(pieces, maxlen=0)  # after an interrupt: the rest is not wanted
                ended.acquire()
                break
            except BaseException as error:  # Ctrl-C: the block must not be given to others while it is written
                interrupted = error
    if interrupted is not None:
        raise interrupted
