"""`Direct`: somebody who makes one short call after another talks to a worker without the loop's thread between.

Handing a call to that thread and being woken by it takes longer than the call. So while calls come one at a time, the
pool's lane parts with a worker: the thread that submits sends, and the thread that asks for the result receives. The
loop's thread takes the worker back, with what is under way, as soon as anything is not of that kind: a second call, a
call nobody waits for, an answer that is more than a value, a death, an abort, a shutdown, or nothing for a while.

The main thread may be interrupted between any two steps (Ctrl-C), so each step leaves books from which the loop's
thread can go on: a frame is received and kept in one step of the interpreter, is dropped last, and hearing it twice
does nothing. A tick of the loop looks after what an interrupted thread has left.

May import `stageflow.core` and `stageflow_executors` only.
"""

from __future__ import annotations

import asyncio
import itertools
import select
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.core.executor import Call
from stageflow_executors import light
from stageflow_executors.processes import channel as ch
from stageflow_executors.processes import status
from stageflow_executors.processes.lookout import SHORT_NS, Lookout
from stageflow_executors.processes.payload import encode_value
from stageflow_executors.processes.state import Lent, Task
from stageflow_executors.shm import codec, fidelity

if TYPE_CHECKING:
    from stageflow_executors.futures import ProcessPoolExecutor
    from stageflow_executors.processes.pool import ProcessExecutor

BRIEF: Final = 0.002  #: seconds; who waits for a function that takes longer does not wait at the socket
_TICK: Final = 0.005
_UNHEARD_NS: Final = 2_000_000  #: an answer that nobody waits for is looked for after this
_STUCK_NS: Final = 200_000_000  #: the same of one that somebody seems to wait for
_IDLE_TICKS: Final = 10  #: without a call, after which the lane has its worker back
_LEAVE_TICKS: Final = 20  #: in which who waits at the socket has left it
_PATIENCE: Final = 64
_WORDS: Final = frozenset((type(None), bool, float))
_I64: Final = 1 << 63
_SMALL: Final = 1024
_ARRAY: Final = 16384
_ITEMS: Final = 16
_WAIT_MS: Final = 50  #: a busy machine may not turn to the worker before


class _Errand(msgspec.Struct, eq=False):
    """The call under way. Holds its pool, which must not end before it."""

    call: Call
    data: bytes
    work: Any
    function: Any
    pool: ProcessPoolExecutor
    began: int


def _is_scalar(value: Any) -> bool:
    kind = type(value)
    return (
        kind in _WORDS
        or (kind is int and -_I64 <= value < _I64)
        or (kind is bytes and len(value) < _SMALL)
        or (kind is str and len(value) < _SMALL and value.isascii())
    )


def _is_light(value: Any) -> bool:
    """Is encoding it so little work that the submitting thread may do it, and none of the user's code?"""
    kind = type(value)
    if kind is list or kind is tuple:
        return len(value) <= _ITEMS and all(map(_is_scalar, value))
    if kind is dict:
        return len(value) <= _ITEMS and all(map(_is_scalar, value)) and all(map(_is_scalar, value.values()))
    return codec.is_array(value) and value.nbytes <= _ARRAY and not value.dtype.hasobject


class Direct:
    """One worker that a lane has parted with. `reclaim` and `tick` on the loop's thread, the rest on any."""

    def __init__(self, pool: ProcessPoolExecutor, lane: ProcessExecutor, lent: Lent, loop: Any) -> None:
        self._pool = weakref.ref(pool)
        self._functions = pool._functions
        self._ids: itertools.count[int] = pool._ids
        self._lane = lane
        self._lent = lent
        self._loop: asyncio.AbstractEventLoop = loop
        self._thread = threading.get_ident()
        self._lock = threading.Lock()  # held for moments, never while waiting
        self._open = True
        self._errand: _Errand | None = None
        self._reading = threading.Lock()  # who waits at the socket
        self._room = [bytearray(ch.MAX_FRAME + 4096)]
        self._view = memoryview(self._room[0])
        self._inbox: deque[tuple[int, Any, int, Any]] = deque()  # received, not yet heard; one at a time
        self._lookout = Lookout()
        self._ticks = 0  # since the last call
        self._resumed = False  # the lane listens again
        self.answers = 0
        self._receive = lent.handle.channel.sock.recvmsg_into
        self._ready = select.poll()  # libuv has made the socket one that never waits
        self._ready.register(lent.handle.channel.fileno(), select.POLLIN)
        lent.apart = self.end
        loop.call_later(_TICK, self.tick)

    # ------------------------------------------------------------ any thread

    def submit(self, pool: ProcessPoolExecutor, work: Any) -> bool:
        """Send the call at once. False if it must go the usual way."""
        if self._errand is not None or threading.get_ident() == self._thread:
            return False
        lane, handle = self._lane, self._lent.handle
        supply = lane.supply
        function = self._functions.get(id(work.fn))
        if function is None or function.fn is not work.fn or function.seconds is None or function.seconds > BRIEF:
            return False
        encoded = []
        for value in (work.kwargs or None, *work.args):
            if not _is_scalar(value):
                if not _is_light(value):
                    return False
                value = encode_value(supply, lane._memory, value).encoded
            encoded.append(value)
        shipped = function.plain
        call = Call(next(self._ids), shipped, short=True)
        data = ch.encode_message([ch.TASK, call.id, shipped.key, 0, encoded])
        if (
            len(data) > ch.MAX_MESSAGE
            or shipped.key not in handle.functions
            or handle.main_version != supply.shipping.version
            or supply.books.dropped
            or supply.books.any_to_tell
            or supply.closed
        ):
            return False
        errand = _Errand(call, data, work, function, pool, time.monotonic_ns())
        with self._lock:
            if not self._open or self._errand is not None:
                return False
            try:
                if not handle.channel.send(b"\x91" + data):
                    return False
            except ch.Closed:
                return False
            # Sent before it is noted: whoever is interrupted between has no future, and the answer is nobody's.
            work.future.begin_at(self)
            self._errand, self._ticks = errand, 0
        return True

    def wait(self, future: light.LightFuture) -> None:
        """Receive the answer here. `future` may be as unfinished as before on return: then the loop must see to it."""
        if not self._open or not self._reading.acquire(blocking=False):
            return
        try:
            if self._inbox or self._take():
                self._hear(future)
        finally:
            self._leave()

    def _leave(self) -> None:
        """The loop's thread lets this one leave before it listens itself."""
        self._reading.release()
        if not self._open:
            self.hand_over()

    def _take(self) -> bool:
        """Get a frame, within some milliseconds."""
        inbox, receive, errand = self._inbox, self._receive, self._errand
        room, ancillary, now = (self._room,), (ch.ROOM,), (ch.MSG_CMSG_CLOEXEC | ch.MSG_DONTWAIT,)
        if (
            errand is not None
            and errand.function.seconds * 1e9 < SHORT_NS
            and self._lent.handle.page.words[status.SPARE]
            and self._lookout.worth()
        ):
            self._lookout.begin()
            while True:
                try:
                    inbox.extend(map(receive, room, ancillary, now))  # in one step: received is kept
                    self._lookout.found()
                    return True
                except BlockingIOError:
                    if not self._lookout.again():
                        break
                except OSError:
                    return False
        if not self._ready.poll(_WAIT_MS):
            return False
        try:
            inbox.extend(map(receive, room, ancillary, now))
        except OSError:  # somebody else had it, or the channel is closed
            return False
        return True

    def _hear(self, future: light.LightFuture) -> None:
        """Resolve `future` if what was received is its value and nothing else."""
        errand = self._errand
        size, ancillary, _, _ = self._inbox[0]
        if errand is None or errand.work.future is not future or ancillary or not size:
            return
        messages = ch.decode_frame(self._view[:size])
        message = messages[0]
        if len(messages) > 1 or message[0] != ch.DONE or message[1] != errand.call.id:
            return
        value = message[2]
        if type(value) is list:
            if codec.any_shared((value,)):
                return
            try:
                value = codec.decode(value, None)
            except Exception:
                return  # the loop's thread will meet it again, and tell
        with self._lock:
            if self._open and self._errand is errand and light.set_lone(future, value):
                errand.function.learn(message[7] / 1e9)
                self.answers += 1
                self._errand = None
                self._inbox.popleft()

    def hand_over(self) -> None:
        """Have the loop's thread take over: somebody wants of the call under way what only it can give."""
        try:
            self._loop.call_soon_threadsafe(self.reclaim)
        except RuntimeError:
            pass  # it has ended, and took everything before

    # ------------------------------------------------------------ the loop's thread

    def tick(self) -> None:
        """Look after what nobody waits for, and whether the worker is still of use here."""
        if self._resumed:
            return
        self._ticks += 1
        read, errand = self._reading.locked(), self._errand
        if not self._open:
            if not read or self._ticks > _LEAVE_TICKS:
                self._resume()
                return
        elif errand is not None:
            waited = time.monotonic_ns() - errand.began
            if waited > (_STUCK_NS if read else _UNHEARD_NS):
                self.reclaim()
        elif (self._inbox and not read) or self._ticks > _IDLE_TICKS:
            self.reclaim()
        self._loop.call_later(_TICK, self.tick)

    def reclaim(self) -> None:
        """Give the worker back to the lane, with what is under way. Idempotent."""
        with self._lock:
            was_open, self._open = self._open, False
            errand, self._errand = self._errand, None
        if was_open:
            self._ticks = 0
            self._settle(errand)
        if self._resumed:
            self._hear_late()
        elif not self._reading.locked():
            self._resume()

    def end(self) -> None:
        """The same, also if somebody waits at the socket."""
        self.reclaim()
        if not self._resumed:
            self._resume()

    def _settle(self, errand: _Errand | None) -> None:
        """Enter what is under way into the books."""
        pool = errand.pool if errand is not None else self._pool()
        if pool is not None:
            pool.direct_ended(self)
        if errand is None:
            return
        future = errand.work.future
        future.leave_direct()
        if not future.done():
            deliver = errand.pool.adopt(errand.call.id, errand.function, errand.work)
            self._lane.take_over(self._lent, Task(errand.call, deliver, True, False, data=errand.data))

    def _resume(self) -> None:
        """The lane listens again."""
        self._resumed = True
        self._lent.apart = None
        self._hear_late()
        self._lane.take_in(self._lent)

    def _hear_late(self) -> None:
        while self._inbox:
            size, ancillary, _, _ = self._inbox.popleft()
            if size:
                self._lane.hear(self._lent, self._view[:size], ch.unpack_fds(ancillary))


class Lone:
    """Notices calls that come one at a time. The loop's thread."""

    __slots__ = ("_patience", "_seen")

    def __init__(self) -> None:
        self._seen = 0
        self._patience = 2

    def saw(self, alone: bool) -> bool:
        """A call has ended, and it was the only one, or not. True when it is time to try."""
        self._seen = self._seen + 1 if alone else 0
        return self._seen >= self._patience

    def ended(self, answers: int) -> None:
        """It brought so many answers. Where it brought none, it is tried half as often."""
        self._seen = 0
        self._patience = 2 if answers > 1 else min(2 * self._patience, _PATIENCE)


def may_part(pool: Any) -> bool:
    """Can this pool's calls take the direct way at all?"""
    return light.FITS and not fidelity.CHECK and pool._max_tasks_per_child is None
