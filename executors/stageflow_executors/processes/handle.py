"""`WorkerHandle`: the parent's side of one worker.

May import this package and the standard library only; no asyncio.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections import Counter
from typing import Final, Protocol

from stageflow_executors.processes import channel as ch
from stageflow_executors.processes.status import StatusPage
from stageflow_executors.shm.codec import Key

TAIL: Final = 16 * 1024


class Borrower(Protocol):
    """A lane, as the supply sees it. Both methods may be called from any thread."""

    def granted(self, worker: WorkerHandle) -> None: ...
    def reported(self, worker: WorkerHandle) -> None: ...
    def held(self) -> int: ...


class WorkerHandle:
    """The parent's side of one worker."""

    def __init__(
        self, number: int, channel: ch.Channel, peer: socket.socket | None, page: StatusPage, output: int
    ) -> None:
        self.number = number
        self.channel = channel
        self.peer = peer
        self.page = page
        self.output = output
        self.pid = 0
        self.pidfd = -1
        self.process: subprocess.Popen[bytes] | None = None
        self.lane: Borrower | None = None
        self.ready = False
        self.ended: tuple[int, int] | None = None  #: wait status, peak resident KiB
        self.failed: str | None = None  #: why it could not be started
        self.removed = False
        self.retiring = False
        self.killed = False  #: by us, on purpose
        self.shed = False  #: by us, because memory was about to run out
        self.said_bye = False
        self.started_at = time.monotonic()
        self.idle_since = 0.0
        self.calls = 0
        self.base_anon = 0
        self.checked_at = 0.0
        self.tail = bytearray()
        self.functions: set[int] = set()
        self.segments: set[int] = set()
        self.main_version = 0
        self.leases: Counter[Key] = Counter()

    def read_output(self) -> None:
        """Keep the end of what the worker wrote to its raw descriptors 1 and 2."""
        if self.output < 0:
            return
        try:
            while data := os.read(self.output, 65536):
                self.tail += data
                if len(self.tail) > 4 * TAIL:
                    del self.tail[:-TAIL]
                if len(data) < 65536:
                    break
        except (BlockingIOError, OSError):
            return

    def stderr_tail(self) -> str:
        """The last 16 KiB of raw output."""
        self.read_output()
        return bytes(self.tail[-TAIL:]).decode("utf-8", "replace")

    def kill(self) -> None:
        """SIGKILL, to the process that we started and to no other that may have its number by now."""
        self.killed = True
        try:
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            elif self.process is not None:
                self.process.kill()
            elif self.pid and self.ended is None:
                os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def memory(self) -> tuple[int, int]:
        """(resident, resident without files and shared memory) in bytes; zeros when it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as statm:
                _, resident, shared, *_ = statm.read().split()
        except (OSError, ValueError):
            return 0, 0
        page = os.sysconf("SC_PAGESIZE")
        return int(resident) * page, (int(resident) - int(shared)) * page

    def close(self) -> None:
        """Give every descriptor back."""
        self.channel.close()
        if self.peer is not None:
            self.peer.close()
            self.peer = None
        for fd in (self.pidfd, self.output):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.output = -1


def kill_group(pid: int) -> None:
    """SIGKILL the process group that a worker leads."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError, AttributeError):
        pass
