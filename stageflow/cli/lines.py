"""A text stream that gives away whole lines only, whichever threads write to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class WholeLines:
    """Wraps a text stream: what a thread writes is held until its line ends, so that prints of threads never mix.

    `print` writes text and line end one after the other; two threads that print would otherwise share lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._held: dict[int, str] = {}

    def write(self, text: str) -> int:
        """Give away the finished lines, hold the rest."""
        me = threading.get_ident()
        with self._lock:
            whole, newline, rest = (self._held.pop(me, "") + text).rpartition("\n")
            if rest:
                self._held[me] = rest
            if newline:
                self._stream.write(whole + newline)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what was given away; an unfinished line of this thread (a prompt) goes as it is."""
        with self._lock:
            rest = self._held.pop(threading.get_ident(), "")
            if rest:
                self._stream.write(rest)
            self._stream.flush()

    def close_lines(self) -> None:
        """Give away what no thread has finished."""
        with self._lock:
            for rest in self._held.values():
                self._stream.write(rest)
            self._held.clear()
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def closing_lines(stream: Any) -> Iterator[None]:
    """At the end, give away the unfinished lines of a `WholeLines`."""
    try:
        yield
    finally:
        if isinstance(stream, WholeLines):
            stream.close_lines()
