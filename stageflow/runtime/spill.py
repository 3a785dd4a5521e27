"""Values that wait behind a barrier, on disk: one file per run, appended to, read from any thread.

The file has no name once it is open (it is unlinked at once, inside a private folder where the system cannot make one
without a name), so it is gone when the last value is dropped or the process dies, however it dies.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
import weakref
import zlib
from typing import Any, Final

import msgspec

from stageflow.runtime.sequence import Elsewhere, Values

SAMPLE: Final = 64 << 10  # bytes on which compression is tried
TRY_EVERY: Final = 16  # lists between two tries
SMOOTHING: Final = 0.3


class Pace(msgspec.Struct):
    """Measured speeds, in bytes per second, and the share of bytes that compression leaves."""

    write: float = 0.0
    squeeze: float = 0.0
    left: float = 1.0

    def worth_it(self) -> bool:
        """Whether compressing and then writing less is faster than writing."""
        if self.write <= 0 or self.squeeze <= 0:
            return False
        return 1.0 / self.squeeze + self.left / self.write < 1.0 / self.write

    def wrote(self, nbytes: int, seconds: float) -> None:
        """Note how long writing took."""
        rate = nbytes / max(seconds, 1e-9)
        self.write = rate if self.write == 0 else self.write + SMOOTHING * (rate - self.write)

    def tried(self, before: int, after: int, seconds: float) -> None:
        """Note what compressing a sample gave."""
        self.squeeze = before / max(seconds, 1e-9)
        self.left = after / max(before, 1)


class SpillFile:
    """An append-only file without a name. Thread-safe."""

    def __init__(self, folder: str | None = None) -> None:
        with tempfile.TemporaryFile(prefix="stageflow-", dir=folder, buffering=0) as file:
            self._fd = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()
        self._end = 0
        self.pace = Pace()
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self._end

    def put(self, values: Any) -> Stored:
        """Write one list; blocks for as long as the disk takes. Raises what pickling or writing raises."""
        data = pickle.dumps(values, protocol=5)
        squeezed = self._squeezed(data)
        packed = squeezed is not None
        data = squeezed if squeezed is not None else data
        with self._lock:
            at = self._end
            self._end += len(data)
        started = time.perf_counter()
        view = memoryview(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, view[done : done + (64 << 20)], at + done)
        self.pace.wrote(len(data), time.perf_counter() - started)
        return Stored(self, at, len(data), packed)

    def _squeezed(self, data: bytes) -> bytes | None:
        """The compressed form where that saves time."""
        self._count += 1
        if self._count % TRY_EVERY == 1:
            sample = data[:SAMPLE]
            started = time.perf_counter()
            small = zlib.compress(sample, 1)
            self.pace.tried(len(sample), len(small), time.perf_counter() - started)
        if not self.pace.worth_it():
            return None
        small = zlib.compress(data, 1)
        return small if len(small) < len(data) else None

    def read(self, at: int, nbytes: int) -> bytes:
        """What was written there."""
        return _read(self._fd, at, nbytes)

    def elsewhere(self) -> tuple[str, tuple[int, int]] | None:
        """By what path another process of this user opens it while it is open here, and which file that then is."""
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        if not os.path.exists("/proc/self/fd"):
            return None
        seen = os.fstat(self._fd)
        return path, (seen.st_dev, seen.st_ino)


def _read(fd: int, at: int, nbytes: int) -> bytes:
    parts = []
    while nbytes > 0:
        part = os.pread(fd, nbytes, at)
        if not part:
            raise OSError(f"the spill file ends at {at}: it was cut short")
        parts.append(part)
        at += len(part)
        nbytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Stored:
    """A list of values on disk. Keeps the file."""

    __slots__ = ("_at", "_file", "_length", "_packed")

    def __init__(self, file: SpillFile, at: int, length: int, packed: bool) -> None:
        self._file = file
        self._at = at
        self._length = length
        self._packed = packed

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._length

    def load(self) -> Any:
        """Read them back."""
        data = self._file.read(self._at, self._length)
        return pickle.loads(zlib.decompress(data) if self._packed else data)  # written by this process

    def elsewhere(self) -> OnDisk | None:
        """The list as a worker of this machine reads it by itself; None where it cannot."""
        file = self._file.elsewhere()
        return None if file is None else OnDisk(*file, self._at, self._length, self._packed)


class OnDisk(Elsewhere):
    """A list in the spill file of another process, which keeps the file while its run goes on."""

    __slots__ = ("_at", "_length", "_node", "_packed", "_path")

    def __init__(self, path: str, node: tuple[int, int], at: int, length: int, packed: bool) -> None:
        self._path = path
        self._node = node
        self._at = at
        self._length = length
        self._packed = packed

    def __reduce__(self) -> tuple[Any, ...]:
        return OnDisk, (self._path, self._node, self._at, self._length, self._packed)

    def load(self) -> Any:
        """Read the list. Raises OSError when the run is over and its file gone."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            seen = os.fstat(fd)
            if (seen.st_dev, seen.st_ino) != self._node or seen.st_uid != os.getuid():
                raise OSError("the spill file is gone: the run that wrote it is over")
            data = _read(fd, self._at, self._length)
        finally:
            os.close(fd)
        return pickle.loads(zlib.decompress(data) if self._packed else data)  # written by the engine of this run


def spill(file: SpillFile, values: Values) -> None:
    """Move a list to disk. Runs in any thread while nobody else changes `values`."""
    values.to_disk(file.put(values.load()))
