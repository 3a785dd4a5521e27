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

from stageflow.runtime.sequence import Values

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
        parts = []
        while nbytes > 0:
            part = os.pread(self._fd, nbytes, at)
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


def spill(file: SpillFile, values: Values) -> None:
    """Move a list to disk. Runs in any thread while nobody else changes `values`."""
    values.to_disk(file.put(values.load()))
