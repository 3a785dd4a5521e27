"""Who holds a claim, and whether that process still lives."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec
import psutil

_PROC: Final = Path("/proc")


class Owner(msgspec.Struct, frozen=True):
    """A process, told apart from every later one with the same number.

    `started` is when it started, `boot` the machine's boot, `space` the process-number space it lives in (containers).
    """

    pid: int
    started: str
    boot: str
    space: str

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        return _me(os.getpid())

    @property
    def is_dead(self) -> bool:
        """True if the process certainly is gone. One in another container is believed until its lease ends."""
        mine = Owner.me()
        if self == mine:
            return False
        if self.boot != mine.boot:
            return True
        if self.space != mine.space:
            return False
        return _started(self.pid) != self.started


@lru_cache(maxsize=1)
def _me(pid: int) -> Owner:
    return Owner(pid, _started(pid) or "?", _boot(), _space())


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return sys.platform


def _started(pid: int) -> str | None:
    """Start of a living process, in ticks since boot where the kernel says so; None if it is gone or a zombie."""
    try:
        # The command may contain blanks and parentheses: fields count from the last one.
        fields = (_PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        pass
    if (_PROC / "self").exists():
        return None
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return None
