"""The status page: 4 KiB of memory shared by one worker and the parent, readable after the worker's death.

Every 8-byte word has one writer, so there is no lock and no dead holder of one. Stores go through `memoryview.cast`,
which writes eight bytes at once (`struct.pack_into` with an explicit byte order tears).

May import the standard library only: workers load it.
"""

from __future__ import annotations

import mmap
from typing import Final

PAGE: Final = 4096

# The worker's words.
TASK, PHASE, STARTED_NS, LAST_DONE, DONE, TOTAL, RESERVED, HELD = range(8)
IDLE, DECODE, RUN, ENCODE = range(4)

# The parent's words, in cache lines of their own.
CANCEL_SEQ: Final = 64  #: grows with every cancel request; a worker that saw no change need not look further
CANCEL_SLOTS: Final = 65
SLOTS: Final = 16
LIMIT: Final = 82  #: bytes of shared memory this worker may reserve
SPARE: Final = 83  #: 1 while there are more cores than workers at work: it may look for a frame before it sleeps
REASON_AT: Final = 1024
REASON_ROOM: Final = 160


class StatusPage:
    """Both sides' view of one page. `fd` stays the caller's."""

    __slots__ = ("_memory", "_next_slot", "doubles", "words")

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, PAGE)
        self.words = memoryview(self._memory).cast("Q")
        self.doubles = memoryview(self._memory).cast("d")
        self._next_slot = 0

    # ------------------------------------------------------------ parent

    def request_cancel(self, task: int, reason: str) -> None:
        """Ask for `task` to stop. The sixteen latest requests are remembered."""
        slot = self._next_slot % SLOTS
        self._next_slot += 1
        text = reason.encode("utf-8", "replace")[: REASON_ROOM - 1]
        at = REASON_AT + slot * REASON_ROOM
        self._memory[at : at + len(text) + 1] = text + b"\0"
        self.words[CANCEL_SLOTS + slot] = task
        self.words[CANCEL_SEQ] = self._next_slot

    def running(self) -> tuple[int, int, int]:
        """(task, phase, monotonic nanosecond of entry); task 0 when idle."""
        words = self.words
        while True:
            task, phase, started = words[TASK], words[PHASE], words[STARTED_NS]
            if words[TASK] == task and words[PHASE] == phase:
                return (task if phase else 0), phase, started

    def last_done(self) -> int:
        """The task that ended last, told of or not."""
        return self.words[LAST_DONE]

    def progress(self) -> tuple[float, float]:
        """What the running task last published."""
        return self.doubles[DONE], self.doubles[TOTAL]

    # ------------------------------------------------------------ worker

    def cancel_slot(self, task: int) -> int | None:
        """The slot that names `task`, if any."""
        words = self.words
        for slot in range(SLOTS):
            if words[CANCEL_SLOTS + slot] == task:
                return slot
        return None

    def cancel_reasons(self, task: int) -> list[str]:
        """The texts given with the requests for `task`."""
        found = []
        for slot in range(SLOTS):
            if self.words[CANCEL_SLOTS + slot] == task:
                at = REASON_AT + slot * REASON_ROOM
                text = bytes(self._memory[at : at + REASON_ROOM]).split(b"\0", 1)[0]
                found.append(text.decode("utf-8", "replace"))
        return found
