"""Starts another program by `posix_spawn`, without `subprocess`: the fork server waits for what is imported before its
exec, and `subprocess` takes longer than that.

Where the C library cannot pass a descriptor on under its own number, `subprocess` does it. Linux.

May import the standard library only, without asyncio, socket and subprocess at module level.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import Final

#: fields of `sys.flags` that decide which flags a child interpreter is started with; all of them are 0 by default
_FLAGS: Final = (
    "debug",
    "dont_write_bytecode",
    "no_site",
    "no_user_site",
    "ignore_environment",
    "isolated",
    "verbose",
    "bytes_warning",
    "quiet",
    "optimize",
    "dev_mode",
    "safe_path",
)
_CLOSED_WITHIN: Final = 100  #: milliseconds


class Program:
    """A running child process. Its methods are for one thread at a time."""

    __slots__ = ("pid", "returncode")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None  #: minus the signal's number where one has ended it

    def wait(self, timeout: float | None = None) -> int | None:
        """How it ended; None when it is still there after `timeout` seconds."""
        if self.returncode is None and (timeout is None or self._ends_within(timeout)):
            self._reap(0)
        return self.returncode

    def _ends_within(self, timeout: float) -> bool:
        """Sleeps until it has ended, or for so long."""
        try:
            end = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            return self._ends_by_asking(timeout)
        try:
            poll = select.poll()
            poll.register(end, select.POLLIN)
            return bool(poll.poll(timeout * 1000.0))
        finally:
            os.close(end)

    def _ends_by_asking(self, timeout: float) -> bool:
        import time

        deadline = time.monotonic() + timeout
        while not self._reap(os.WNOHANG):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def _reap(self, flags: int) -> bool:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, flags)
            except ChildProcessError:  # somebody else in this process has waited for all children
                self.returncode = 0
                return True
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode is not None

    def kill(self) -> None:
        """SIGKILL, if it has not been waited for."""
        if self.returncode is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def interpreter_flags() -> list[str]:
    """The flags this interpreter was started with."""
    if not (sys.warnoptions or sys._xoptions or any(getattr(sys.flags, name) for name in _FLAGS)):
        return []
    import subprocess

    found: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return found


def start(command: list[str], environment: dict[str, str], stderr: int, passed: Sequence[int]) -> Program:
    """Exec `command` in a session of its own, with nothing to read, descriptor `stderr` as its 2, and those of `passed`
    under their own numbers. Other descriptors of ours that are not close-on-exec are its to close. Raises OSError."""
    if not _passes_descriptors():
        import subprocess

        made = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=stderr, pass_fds=passed, start_new_session=True, env=environment
        )
        made.returncode = 0  # it is ours to wait for
        return Program(made.pid)
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, stderr, 2),
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in passed),
    ]
    told, telling = os.pipe()
    try:
        pid = os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=actions,
            setsid=True,
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        )
        os.close(telling)
        telling = -1
        # The kernel lets us go on a moment before it has closed the new program's copies of our descriptors. This one
        # tells when it is at it; but for a copy that another thread's fork has just made.
        poll = select.poll()
        poll.register(told, select.POLLIN)
        poll.poll(_CLOSED_WITHIN)
    finally:
        for fd in (told, telling):
            if fd >= 0:
                os.close(fd)
    return Program(pid)


def _passes_descriptors() -> bool:
    """Does `dup2` of a descriptor to itself take its close-on-exec flag away? glibc does since 2.29."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor = map(int, version.split(".")[:2])
    except (AttributeError, ValueError, OSError):
        return False
    return name == "glibc" and (major, minor) >= (2, 29) and hasattr(os, "posix_spawn")
