"""The arena: shared memory that one process writes and others read.

Segments are anonymous: a memfd, or where there is none a POSIX shared memory object or a temporary file that is
unlinked before anything is written. Readers get a descriptor re-opened read-only. Only the arena's own process
allocates in it; who else still reads a block is the parent's business (`lease`). Memory is reserved before it is
used, from the arena's own account first.

Values up to 16 MiB share segments of 64 MiB, by size class; larger ones get a segment of their own. Freed blocks are
kept warm (fresh pages cost more than the copy into them) up to a cap, and no longer than there is room for them beside
what all processes have reserved: then they lie cold, their pages given back, until they are needed.

May import `stageflow.core` and the standard library only: workers load it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any, Final

from stageflow.core.errors import SharedMemoryFullError

SEGMENT: Final = 64 << 20
OWN_SEGMENT_ABOVE: Final = 16 << 20
GROW_BY: Final = 1 << 20
ALIGN: Final = 4096
WARM_CAP: Final = 512 << 20
MAX_SEGMENTS: Final = 200

_MFD_NOEXEC_SEAL: Final = 0x0008
_SEALS: Final = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
_F_ADD_SEALS: Final = 1033


def size_class(nbytes: int) -> int:
    """`nbytes` rounded up to a power of two or one of three steps between two of them; at least one page."""
    if nbytes <= ALIGN:
        return ALIGN
    step = 1 << max((nbytes - 1).bit_length() - 3, 12)
    return -(-nbytes // step) * step


def create_anonymous(nbytes: int, *, memfd: bool | None = None) -> tuple[int, int]:
    """(writable descriptor, read-only descriptor) of new anonymous memory of `nbytes` that is not yet reserved."""
    if memfd is None:
        memfd = hasattr(os, "memfd_create")
    if memfd:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            fd = os.memfd_create("stageflow", flags | _MFD_NOEXEC_SEAL)
        except OSError:
            fd = os.memfd_create("stageflow", flags)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
            return fd, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(fd)
            raise
    name, fd, opened = _create_named()
    try:
        os.ftruncate(fd, nbytes)
        return fd, opened(name)
    except BaseException:
        os.close(fd)
        raise
    finally:
        _unlink(name)


def allocate(fd: int, start: int, nbytes: int) -> None:
    """Have the system set memory aside where it can: what is then missing is an OSError here, and no SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, start, nbytes)


def _create_named() -> tuple[str, int, Callable[[str], int]]:
    """A POSIX shared memory object where the platform has them, else a temporary file."""
    try:
        import _posixshmem  # type: ignore[import-not-found]

        name = f"/sf-{os.getpid()}-{os.urandom(6).hex()}"
        fd = _posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
        return name, fd, lambda name: int(_posixshmem.shm_open(name, os.O_RDONLY, mode=0o600))
    except (ImportError, OSError):
        import tempfile  # 4 ms of every start, for what few need

        fd, path = tempfile.mkstemp(prefix="sf-")
        return path, fd, lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _unlink(name: str) -> None:
    if os.path.dirname(name) == "/":
        import _posixshmem

        _posixshmem.shm_unlink(name)
    else:
        os.unlink(name)


class Segment:
    """The owner's side of one segment: a writable mapping and how far it is reserved and used."""

    __slots__ = (
        "cold",
        "fd",
        "free_bytes",
        "live",
        "memory",
        "own",
        "read_fd",
        "reserved",
        "sid",
        "size",
        "top",
        "view",
    )

    def __init__(self, sid: int, size: int, *, own: bool, memfd: bool | None) -> None:
        self.sid = sid
        self.size = size
        self.own = own
        self.fd, self.read_fd = create_anonymous(size, memfd=memfd)
        self.memory = mmap.mmap(self.fd, size)
        self.view = memoryview(self.memory)
        self.reserved = 0  # how far
        self.cold = 0  # bytes of it that were given back
        self.top = 0  # where the next fresh block begins
        self.live = 0  # blocks in use

    def close(self) -> None:
        """Drop descriptors; the mapping goes with its last view."""
        for fd in (self.fd, self.read_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.read_fd = -1


class Block:
    """Writable memory for one value."""

    __slots__ = ("nbytes", "off", "segment", "view")

    def __init__(self, segment: Segment, off: int, nbytes: int) -> None:
        self.segment = segment
        self.off = off
        self.nbytes = nbytes
        self.view = segment.view[off : off + nbytes]

    @property
    def key(self) -> tuple[int, int]:
        """(segment number, offset): the block's name in every process."""
        return self.segment.sid, self.off


class Arena:
    """All segments one process writes. Thread-safe.

    `budget()` gives the bytes above which nothing is kept warm; `hard` those that may be reserved in all (None: the
    same).
    """

    def __init__(
        self,
        owner: int,
        *,
        budget: Callable[[], int],
        on_segment: Callable[[Segment], None],
        memfd: bool | None = None,
        hard: int | None = None,
    ) -> None:
        self._owner = owner
        self._budget = budget
        self._hard = hard
        self._on_segment = on_segment
        self._memfd = memfd
        self._anonymous = hasattr(os, "memfd_create") if memfd is None else memfd
        self._lock = threading.Lock()
        self._numbers = 0
        self._pid = os.getpid()
        self.segments: dict[int, Segment] = {}
        self.reserved = 0
        self._warm = 0  # reserved bytes in free blocks and free own segments
        self._free: dict[int, list[tuple[Segment, int]]] = {}  # size class -> free blocks, most recently used last
        self._cold: dict[int, list[tuple[Segment, int]]] = {}  # the same of blocks without pages
        self._classes: dict[tuple[int, int], int] = {}  # block -> its size class
        self._current: Segment | None = None
        #: numbers of segments given back to the system, for the owner of the table to announce
        self.closed: list[int] = []

    def allocate(self, nbytes: int) -> Block:
        """Memory for `nbytes`, reserved. Raises SharedMemoryFullError."""
        size = size_class(nbytes)
        with self._lock:
            segment, off = self._take(size)
            segment.live += 1
            self._classes[segment.sid, off] = size
        return Block(segment, off, nbytes)

    def _take(self, size: int) -> tuple[Segment, int]:
        free = self._free.get(size)
        if free:
            self._warm -= size
            return free.pop()
        if size > OWN_SEGMENT_ABOVE:
            # A free one that is a little larger is still warm; a much larger one would waste what others may need.
            for other in sorted(self._free):
                if size < other <= size + size // 4 and self._free[other]:
                    self._warm -= other
                    segment, off = self._free[other].pop()
                    return segment, off
            segment = self._new_segment(size, own=True)
            try:
                self._reserve(segment, size)
            except BaseException:
                self._drop(segment)
                raise
            segment.top = size
            return segment, 0
        if cold := self._cold.get(size):
            segment, off = cold.pop()
            try:
                self._claim(segment, off, size)
            except BaseException:
                self._cold.setdefault(size, []).append((segment, off))
                raise
            segment.cold -= size
            return segment, off
        current = self._current
        if current is None or current.size - current.top < size:
            current = self._current = self._new_segment(SEGMENT, own=False)
        if current.top + size > current.reserved:
            # What has a name lies in a file system that may be small, and others need some of it too.
            ahead = max(size, min(GROW_BY, current.size - current.reserved)) if self._anonymous else size
            if not self._reserve(current, ahead, ahead_of_need=ahead > size):
                self._reserve(current, current.top + size - current.reserved)  # not a byte more than it takes
        off = current.top
        current.top += size
        return current, off

    def _new_segment(self, size: int, *, own: bool) -> Segment:
        if len(self.segments) >= MAX_SEGMENTS:
            self._trim(0)
        if len(self.segments) >= MAX_SEGMENTS:
            raise SharedMemoryFullError(
                f"{len(self.segments)} shared memory segments are in use, which is the most one process may have",
                hint="release results that are no longer needed, or make fewer values larger than 16 MiB live at once",
                needed=size,
            )
        self._numbers += 1
        try:
            segment = Segment((self._owner << 24) | self._numbers, size, own=own, memfd=self._memfd)
        except OSError as error:
            raise self._full(size, error) from error
        self.segments[segment.sid] = segment
        self._on_segment(segment)
        return segment

    def _reserve(self, segment: Segment, nbytes: int, *, ahead_of_need: bool = False) -> bool:
        """Make room in `segment`. What is only ahead of need is refused where it would cost others their warm blocks;
        the rest raises SharedMemoryFullError."""
        if not self._claim(segment, segment.reserved, nbytes, ahead_of_need=ahead_of_need):
            return False
        segment.reserved += nbytes
        return True

    def _claim(self, segment: Segment, off: int, nbytes: int, *, ahead_of_need: bool = False) -> bool:
        """Have the system lay down pages, if the account allows."""
        segment.live += 1  # it is not to be dropped to make room for itself
        try:
            if self.reserved + nbytes > self._budget():
                if ahead_of_need:
                    return False
                self._shrink(max(0, self._budget() - nbytes))
            if self.reserved + nbytes > (self._budget() if self._hard is None else self._hard):
                raise self._full(nbytes, None)
            try:
                allocate(segment.fd, off, nbytes)
            except OSError as error:
                if ahead_of_need:
                    return False
                self._trim(0)
                raise self._full(nbytes, error) from error
        finally:
            segment.live -= 1
        self.reserved += nbytes
        return True

    def _full(self, needed: int, error: OSError | None) -> SharedMemoryFullError:
        why = f": {error.strerror}" if error is not None else ""
        return SharedMemoryFullError(
            f"{needed:,} bytes of shared memory are not free (reserved {self.reserved:,} of {self._budget():,}){why}",
            hint="raise memory_limit, or let fewer values live at once (max_in_flight)",
            needed=needed,
            reserved=self.reserved,
        )

    def free(self, key: tuple[int, int]) -> None:
        """Nobody reads the block any more. Unknown keys are ignored (a segment may be gone)."""
        with self._lock:
            size = self._classes.pop(key, None)
            if size is None:
                return
            segment = self.segments[key[0]]
            segment.live -= 1
            self._free.setdefault(size, []).append((segment, key[1]))
            self._warm += size
            self._fit()

    def fit(self) -> None:
        """Keep no more warm than there is room for: it may have become less."""
        with self._lock:
            self._fit()

    def _fit(self) -> None:
        over = max(self._warm - WARM_CAP, min(self._warm, self.reserved - self._budget()))
        if over > 0:
            self._shrink(self.reserved - over)

    def _trim(self, target: int) -> None:
        """Close segments without live blocks until `reserved <= target`."""
        for segment in sorted(self.segments.values(), key=lambda s: s.own, reverse=True):
            if self.reserved <= target:
                return
            if segment.live == 0:
                # others may still have it mapped, and would keep its pages
                with contextlib.suppress(AttributeError, OSError):
                    segment.memory.madvise(mmap.MADV_REMOVE)
                self._drop(segment)

    def _shrink(self, target: int) -> None:
        """Give back the pages of free blocks, and where that cannot be done close segments, until `reserved <=
        target`."""
        for size in sorted((size for size in self._free if size <= OWN_SEGMENT_ABOVE), reverse=True):
            while self.reserved > target and self._free[size] and self._cool(size):
                pass
        self._trim(target)

    def _cool(self, size: int) -> bool:
        """Give back the pages of the free block of a size that was used least recently. Nobody reads it."""
        free = self._free[size]
        segment, off = free[0]
        try:
            segment.memory.madvise(mmap.MADV_REMOVE, off, size)
        except (AttributeError, OSError):
            return False  # not on this platform
        del free[0]
        self._cold.setdefault(size, []).append((segment, off))
        segment.cold += size
        self.reserved -= size
        self._warm -= size
        return True

    def _drop(self, segment: Segment) -> None:
        for size, free in list(self._free.items()):
            kept = [entry for entry in free if entry[0] is not segment]
            self._warm -= size * (len(free) - len(kept))
            if kept:
                self._free[size] = kept
            else:
                del self._free[size]
        for size, cold in list(self._cold.items()) if segment.cold else ():
            self._cold[size] = [entry for entry in cold if entry[0] is not segment]
        del self.segments[segment.sid]
        self.reserved -= segment.reserved - segment.cold
        if self._current is segment:
            self._current = None
        self.closed.append(segment.sid)
        segment.close()

    def trim(self) -> None:
        """Give every segment without live blocks back to the system."""
        with self._lock:
            self._trim(0)

    def close(self) -> None:
        """Give every descriptor back. Mappings live as long as their views."""
        with self._lock:
            for segment in list(self.segments.values()):
                self._drop(segment)
            self._classes.clear()

    def stats(self) -> dict[str, Any]:
        """Bytes reserved, bytes warm and free, number of segments, number of live blocks."""
        with self._lock:
            return {
                "reserved": self.reserved,
                "warm": self._warm,
                "segments": len(self.segments),
                "live": len(self._classes),
            }
