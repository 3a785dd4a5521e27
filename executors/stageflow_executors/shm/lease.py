"""Leases: the right to read a block of shared memory, counted.

`Books` is the parent's account of every block and who may still read it; `Mappings` is the reading side in any
process. A lease ends when the *exporter* of its view is collected: a finalizer on a memoryview given to numpy would
fire while the array lives, because numpy takes a view of its own. Finalizers run anywhere, also inside locks, so
they only append to a deque.

May import the standard library and `stageflow_executors.shm` only: workers load it. numpy is used where it is
already loaded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from stageflow_executors.shm import codec
from stageflow_executors.shm.codec import Key, Ref

PARENT: Final = 0  #: the parent's number as an owner of segments


class _PyBuffer(ctypes.Structure):
    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]


def address_of(buffer: Any) -> int:
    """Where a contiguous buffer begins, read-only ones included."""
    described = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(described), 0)
    try:
        return int(described.buf or 0)
    finally:
        _release_buffer(ctypes.byref(described))


_ndarray_exporter: Any = None


def export(memory: Any, address: int, start: int, nbytes: int, ended: Callable[..., None], *args: Any) -> memoryview:
    """A writable view of `memory[start:start+nbytes]`; `ended(*args)` is called once nothing made from the view lives.

    `address` is where `memory` (kept alive by the view) begins.
    """
    exporter: Any
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "ndarray"):
        global _ndarray_exporter
        if _ndarray_exporter is None:
            # A class of its own: numpy shortens base chains, but never across types.
            _ndarray_exporter = type("Exporter", (numpy.ndarray,), {})
        # Its base is the mapping itself. With a plain array in between, `np.ndarray(buffer=view)` would keep that
        # one instead: numpy looks through the memoryview, and then shortens past an exporter whose own base has the
        # new array's type.
        exporter = _ndarray_exporter((nbytes,), numpy.uint8, memory, start)
    else:
        exporter = (ctypes.c_char * nbytes).from_address(address + start)
        exporter.keeps = memory
    finalizer = weakref.finalize(exporter, ended, *args)
    finalizer.atexit = False
    return memoryview(exporter).cast("B")


#: CPython before 3.13 keeps a descriptor of its own with every mapping, as long as a view lives
_NO_FD: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class Mapping:
    """One segment as a reader sees it: the descriptor, and mappings made on first use and kept."""

    __slots__ = ("_address", "_memory", "fd", "sid", "size")

    def __init__(self, sid: int, size: int, fd: int) -> None:
        self.sid = sid
        self.size = size
        self.fd = fd
        self._memory: mmap.mmap | None = None
        self._address = 0

    def memory(self) -> tuple[mmap.mmap, int]:
        """The read-only mapping and its address."""
        memory = self._memory
        if memory is None:
            memory = mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ, **_NO_FD)
            self._address = address_of(memory)
            self._memory = memory
        return memory, self._address

    def private(self, start: int, nbytes: int) -> tuple[mmap.mmap, int]:
        """A private copy-on-write mapping of a range, of its own: nothing stale can show when the block is reused."""
        base = start - start % mmap.ALLOCATIONGRANULARITY
        memory = mmap.mmap(
            self.fd,
            start - base + nbytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=base,
            **_NO_FD,
        )
        return memory, start - base

    def detach(self) -> None:
        """Give the descriptor back and keep the bytes mapped: they are still read, and by this process alone."""
        self.memory()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Give the descriptor back; views keep the mapping."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._memory = None


class ValueReader:
    """Decodes one value: one exporter per block, and every lease ended exactly once, whatever happens.

    `ended(key)` may be called from any thread, also by the garbage collector.
    """

    __slots__ = ("_ended", "_mappings", "_views")

    def __init__(self, mappings: dict[int, Mapping], ended: Callable[[Key], None]) -> None:
        self._mappings = mappings
        self._ended = ended
        self._views: dict[Key, tuple[memoryview, int]] | None = None

    def peek(self, ref: Ref) -> memoryview:
        """The bytes, for use during decoding only."""
        memory, _ = self._mappings[ref[0]].memory()
        return memoryview(memory)[ref[2] : ref[2] + ref[3]]

    def view(self, ref: Ref, *, writable: bool) -> memoryview:
        """The bytes, for as long as anything made from the view lives."""
        key = (ref[0], ref[1])
        mapping = self._mappings[ref[0]]
        if writable:
            # The copy-on-write range outlives the block's content only in pages that were written: the lease is
            # still needed.
            private, start = mapping.private(ref[2], ref[3])
            if self._views is None:
                self._views = {}
            if key not in self._views:
                self._views[key] = (memoryview(b""), 0)
                return export(private, address_of(private), start, ref[3], self._ended, key)
            whole = self._views[key][0]
            return _keeping(export(private, address_of(private), start, ref[3], _nothing, whole), whole)
        if self._views is None:
            self._views = {}
        known = self._views.get(key)
        if known is None:
            memory, address = mapping.memory()
            size = mapping.size - ref[1]
            exported = export(memory, address, ref[1], size, self._ended, key).toreadonly()
            known = self._views[key] = (exported, ref[1])
        return known[0][ref[2] - known[1] : ref[2] - known[1] + ref[3]]

    def finish(self, keys: Iterable[Key]) -> None:
        """End the leases among `keys` that no view took over."""
        views = self._views
        for key in keys:
            if views is None or key not in views:
                self._ended(key)
        self._views = None


class _Lease:
    """What a value in encoded form refers to: let go of when nobody has this any more."""

    __slots__ = ("_ended", "_keys")

    def __init__(self, keys: Iterable[Key], ended: Callable[[Key], None]) -> None:
        self._keys = tuple(keys)
        self._ended = ended

    def still(self, key: Key) -> None:
        """One view less; who is told so has kept this until now."""

    def __del__(self) -> None:
        for key in self._keys:
            self._ended(key)


class Undecoded:
    """A value in encoded form. `load` makes it anew each time; its leases end with the last of what was made from it,
    and with this."""

    __slots__ = ("_encoded", "_lease", "_mappings", "_writable")

    def __init__(
        self,
        encoded: codec.Encoded,
        mappings: dict[int, Mapping],
        ended: Callable[[Key], None],
        writable: bool = False,
    ) -> None:
        self._encoded = encoded
        self._mappings = mappings
        self._writable = writable
        self._lease = _Lease(codec.blocks_of(encoded), ended)

    def load(self) -> Any:
        """The value."""
        reader = ValueReader(self._mappings, self._lease.still)
        try:
            return codec.decode(self._encoded, reader, self._writable)
        finally:
            reader.finish(())


def _nothing(*_: Any) -> None:
    """A finalizer that only keeps its arguments alive."""


def _keeping(view: memoryview, _whole: memoryview) -> memoryview:
    return view


class Books:
    """The parent's account: how many leases every block has, in which segment it lies, and whose it is.

    Thread-safe. `dropped` may be appended to from finalizers; everything else takes the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Key, int] = {}
        self._held: dict[int, int] = {}  # segment -> blocks with leases
        self._retired: set[int] = set()  # segments whose owner is gone
        self._freed: dict[int, list[Key]] = {}  # owner -> blocks it may reuse
        self.dropped: deque[Key] = deque()
        self.mappings: dict[int, Mapping] = {}
        self.pid = os.getpid()

    def add_segment(self, sid: int, size: int, fd: int) -> None:
        """A segment that may be referred to from now on; takes over the read-only descriptor."""
        with self._lock:
            self.mappings[sid] = Mapping(sid, size, fd)

    def lease(self, keys: Iterable[Key]) -> None:
        """One more lease on each block."""
        with self._lock:
            counts = self._counts
            for key in keys:
                count = counts.get(key, 0)
                counts[key] = count + 1
                if not count:
                    self._held[key[0]] = self._held.get(key[0], 0) + 1

    def settle(self) -> None:
        """Take the leases that finalizers dropped off the books."""
        if self.dropped:
            with self._lock:
                self._settle()

    def _settle(self) -> None:
        dropped, counts = self.dropped, self._counts
        while dropped:
            try:
                key = dropped.popleft()
            except IndexError:  # another thread was faster
                return
            count = counts.get(key, 0) - 1
            if count > 0:
                counts[key] = count
                continue
            if count < 0:
                continue
            del counts[key]
            sid = key[0]
            self._held[sid] -= 1
            if sid in self._retired:
                if not self._held[sid]:
                    self._forget(sid)
            else:
                self._freed.setdefault(sid >> 24, []).append(key)

    @property
    def any_to_tell(self) -> bool:
        """Are there blocks that some worker has to be told of? The parent looks after its own when it needs one."""
        freed = self._freed
        return bool(freed) and (len(freed) > 1 or PARENT not in freed)

    def take_freed(self, owner: int) -> list[Key]:
        """Blocks of `owner` that nobody reads any more."""
        if not self.dropped and owner not in self._freed:
            return []
        self.settle()
        if owner not in self._freed:
            return []
        with self._lock:
            return self._freed.pop(owner, [])

    def detach(self) -> None:
        """No process will read any more but this one: what is still leased is kept mapped, without descriptors."""
        with self._lock:
            self._settle()
            for mapping in self.mappings.values():
                mapping.detach()

    def retire(self, owner: int) -> None:
        """The owner is gone: nothing of it is written again, and each segment closes with its last lease."""
        with self._lock:
            self._settle()
            self._freed.pop(owner, None)
            for sid in [sid for sid in self.mappings if sid >> 24 == owner]:
                if self._held.get(sid):
                    self._retired.add(sid)
                else:
                    self._forget(sid)

    def forget(self, sids: Iterable[int]) -> None:
        """The owner gave these segments back to the system."""
        with self._lock:
            for sid in sids:
                if sid in self.mappings:
                    self._forget(sid)

    def _forget(self, sid: int) -> None:
        self._held.pop(sid, None)
        self._retired.discard(sid)
        self.mappings.pop(sid).close()

    def live(self) -> int:
        """Blocks with leases."""
        self.settle()
        with self._lock:
            return len(self._counts)

    def after_fork(self) -> None:
        """In a child of the user's making: these are the parent's books; keep only what is mapped."""
        self._lock = threading.Lock()
        self.dropped = deque()
