"""The floor of a hand-off: a frame to another interpreter and back, over the lane's kind of socket and the same loop,
with nothing encoded, looked up, measured or reported. Also without a loop, as a drop-in pool's lone caller has it.

Both ends look for the next frame for a moment before they sleep, as ours do (`processes/lookout.py`); `asleep` is the
same without that: what being woken costs.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_ECHO = """
import os, socket, sys, time
sock, room = socket.socket(fileno=int(sys.argv[1])), [bytearray(132_000)]
view, look, now = memoryview(room[0]), int(sys.argv[2]), int(socket.MSG_DONTWAIT)
clock, receive, give, size = time.monotonic_ns, sock.recvmsg_into, os.sched_yield, 1
while size:
    size, end = 0, clock() + look
    while not size and clock() < end:
        try:
            size = receive(room, 272, now)[0] or sys.exit()
        except BlockingIOError:
            give()
    size = size or receive(room, 272)[0]
    if size:
        sock.send(view[:size])
"""
_LOOK_NS: Final = 60_000


class Bounce:
    """One end of a socket whose other end sends back what it gets. Bound to one loop, if any."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop | None, *, asleep: bool = False) -> None:
        self._sock = sock
        self._loop = loop
        self._look_ns = 0 if asleep else _LOOK_NS
        self._room = [bytearray(132_000)]
        self._flags = int(socket.MSG_DONTWAIT)
        self._waiting: asyncio.Future[int] | None = None
        self._until = 0

    def listen(self) -> None:
        """Hear answers on the loop."""
        assert self._loop is not None
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def _readable(self) -> None:
        if self._waiting is not None:
            size = self._sock.recvmsg_into(self._room, 272, self._flags)[0]
            self._waiting.set_result(size)
            self._waiting = None

    def _look(self) -> None:
        """Once in each turn of the loop."""
        try:
            self._readable()
        except BlockingIOError:
            os.sched_yield()
            if time.monotonic_ns() < self._until and self._loop is not None:
                self._loop.call_soon(self._look)

    async def trips(self, count: int, nbytes: int) -> None:
        """So many frames, one after another, awaited on the loop."""
        frame, loop = bytes(nbytes), self._loop
        assert loop is not None
        for _ in range(count):
            self._waiting = waiting = loop.create_future()
            self._sock.send(frame, self._flags)
            if self._look_ns:
                self._until = time.monotonic_ns() + self._look_ns
                loop.call_soon(self._look)
            assert await waiting == nbytes

    def trips_by_hand(self, count: int, nbytes: int) -> None:
        """The same by a thread that sends and receives itself."""
        frame, clock = bytes(nbytes), time.monotonic_ns
        ready = select.poll()
        ready.register(self._sock.fileno(), select.POLLIN)
        for _ in range(count):
            self._sock.send(frame, self._flags)
            until, size = clock() + self._look_ns, 0
            while not size:
                try:
                    size = self._sock.recvmsg_into(self._room, 272, self._flags)[0]
                except BlockingIOError:
                    if clock() < until:
                        os.sched_yield()
                    else:
                        ready.poll()
            assert size == nbytes


@contextmanager
def echoing(*, asleep: bool = False) -> Iterator[socket.socket]:
    """A socket whose other end is held by an interpreter that sends back what it gets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            command = [sys.executable, "-c", _ECHO, str(theirs.fileno()), "0" if asleep else str(_LOOK_NS)]
            other = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        try:
            yield ours
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            other.wait(10)


@contextmanager
def bouncing_on(runner: asyncio.Runner, *, asleep: bool = False) -> Iterator[Bounce]:
    """A bounce on the loop of `runner`."""
    with echoing(asleep=asleep) as sock:
        loop = runner.get_loop()
        bounce = Bounce(sock, loop, asleep=asleep)
        bounce.listen()
        try:
            yield bounce
        finally:
            loop.remove_reader(sock.fileno())


@contextmanager
def bouncing_by_hand() -> Iterator[Bounce]:
    """A bounce without a loop."""
    with echoing() as sock:
        yield Bounce(sock, None)
