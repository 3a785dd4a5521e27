"""The floor of a hand-off: a frame to another interpreter and back, over the lane's kind of socket and the same loop,
with nothing encoded, looked up, measured or reported. Also with a thread between, as a drop-in pool's caller has it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

_ECHO = """
import socket, sys
sock, room = socket.socket(fileno=int(sys.argv[1])), [bytearray(132_000)]
view = memoryview(room[0])
while size := sock.recvmsg_into(room, 272)[0]:
    sock.send(view[:size])
"""


class Bounce:
    """One end of a socket whose other end sends back what it gets. Bound to one loop."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._loop = loop
        self._room = [bytearray(132_000)]
        self._flags = int(socket.MSG_DONTWAIT)
        self._waiting: asyncio.Future[int] | concurrent.futures.Future[int] = loop.create_future()

    def listen(self) -> None:
        """Hear answers on the loop."""
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def _readable(self) -> None:
        self._waiting.set_result(self._sock.recvmsg_into(self._room, 272, self._flags)[0])

    async def trips(self, count: int, nbytes: int) -> None:
        """So many frames, one after another, awaited on the loop."""
        frame = bytes(nbytes)
        for _ in range(count):
            self._waiting = waiting = self._loop.create_future()
            self._sock.send(frame, self._flags)
            assert await waiting == nbytes

    def trips_from_outside(self, count: int, nbytes: int) -> None:
        """The same, asked for and waited for in a thread that is not the loop's."""
        frame = bytes(nbytes)

        def send(future: concurrent.futures.Future[int]) -> None:
            self._waiting = future
            self._sock.send(frame, self._flags)

        for _ in range(count):
            future: concurrent.futures.Future[int] = concurrent.futures.Future()
            self._loop.call_soon_threadsafe(send, future)
            assert future.result() == nbytes


@contextmanager
def echoing() -> Iterator[socket.socket]:
    """A socket whose other end is held by an interpreter that sends back what it gets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            command = [sys.executable, "-c", _ECHO, str(theirs.fileno())]
            other = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        try:
            yield ours
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            other.wait(10)


@contextmanager
def bouncing_on(runner: asyncio.Runner) -> Iterator[Bounce]:
    """A bounce on the loop of `runner`."""
    with echoing() as sock:
        loop = runner.get_loop()
        bounce = Bounce(sock, loop)
        bounce.listen()
        try:
            yield bounce
        finally:
            loop.remove_reader(sock.fileno())


@contextmanager
def bouncing_in_a_thread() -> Iterator[Bounce]:
    """A bounce on the loop of a thread of its own."""
    with echoing() as sock:
        loop = uvloop.new_event_loop()
        bounce = Bounce(sock, loop)
        bounce.listen()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield bounce
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.remove_reader(sock.fileno())
            loop.close()
