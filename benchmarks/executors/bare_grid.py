"""The floor of METG: the same grids over bare frames.

Interpreters behind the lane's kind of socket, and a loop that hands a task to the one with the least to do as soon as
its dependencies are there, one ahead; tuples by marshal. No stages, no books, no cancel, no events, only small numbers.

May not import: stageflow, any peer.
"""

from __future__ import annotations

import asyncio
import marshal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

AHEAD: Final = 2  #: tasks that a worker holds at once: the one that runs and the next
_ROOM: Final = 4096

_WORKER: Final = """
import marshal, socket, sys
sys.path.insert(0, sys.argv[2])
from benchmarks.work import burn
sock, room = socket.socket(fileno=int(sys.argv[1])), [bytearray(4096)]
view = memoryview(room[0])
while size := sock.recvmsg_into(room)[0]:
    task, loops, given = marshal.loads(view[:size])
    sock.send(marshal.dumps((task, (burn(loops) + sum(given)) & 7)))
"""


class BareGrid:
    """Runs grids on workers behind bare sockets. Bound to one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sockets: Sequence[socket.socket]) -> None:
        self._loop = loop
        self._sockets = list(sockets)
        self._held = [0] * len(sockets)
        self._room = [bytearray(_ROOM)]
        self._view = memoryview(self._room[0])
        self._flags = int(socket.MSG_DONTWAIT)
        self._ready: deque[int] = deque()
        self._deps: list[list[int]] = []
        self._dependents: list[list[int]] = []
        self._left: list[int] = []
        self._values: list[int] = []
        self._loops = self._open = 0
        self._over: asyncio.Future[None] = loop.create_future()
        for worker, sock in enumerate(self._sockets):
            loop.add_reader(sock.fileno(), self._answered, worker)

    async def run(self, cells: Sequence[Sequence[tuple[int, ...]]], loops: int) -> list[int]:
        """The value of each task, step by step."""
        first = [0]
        for points in cells:
            first.append(first[-1] + len(points))
        self._deps = [[first[step - 1] + dep for dep in deps] for step, points in enumerate(cells) for deps in points]
        self._left = [len(deps) for deps in self._deps]
        self._dependents = [[] for _ in self._deps]
        for task, deps in enumerate(self._deps):
            for dep in deps:
                self._dependents[dep].append(task)
        self._values = [0] * len(self._deps)
        self._ready = deque(task for task, left in enumerate(self._left) if not left)
        self._loops, self._open = loops, len(self._deps)
        self._over = self._loop.create_future()
        self._feed()
        await self._over
        return self._values

    def _feed(self) -> None:
        while self._ready:
            held = min(self._held)
            if held >= AHEAD:
                return
            worker = self._held.index(held)
            self._held[worker] += 1
            task = self._ready.popleft()
            frame = marshal.dumps((task, self._loops, [self._values[dep] for dep in self._deps[task]]))
            self._sockets[worker].send(frame, self._flags)

    def _answered(self, worker: int) -> None:
        size = self._sockets[worker].recvmsg_into(self._room, 0, self._flags)[0]
        self._held[worker] -= 1
        task, self._values[task] = marshal.loads(self._view[:size])
        for dependent in self._dependents[task]:
            self._left[dependent] -= 1
            if not self._left[dependent]:
                self._ready.append(dependent)
        self._open -= 1
        self._feed()
        if not self._open:
            self._over.set_result(None)


@contextmanager
def bare_grid(runner: asyncio.Runner, workers: int) -> Iterator[BareGrid]:
    """A `BareGrid` on that many fresh interpreters and the loop of `runner`."""
    root = str(Path(__file__).resolve().parents[2])
    with ExitStack() as stack:
        sockets = []
        for _ in range(workers):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-c", _WORKER, str(theirs.fileno()), root]
                other = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            stack.callback(other.wait, 10)
            stack.callback(ours.close)
            stack.callback(ours.shutdown, socket.SHUT_RDWR)
            sockets.append(ours)
        loop = runner.get_loop()
        grid = BareGrid(loop, sockets)
        try:
            yield grid
        finally:
            for sock in sockets:
                loop.remove_reader(sock.fileno())
