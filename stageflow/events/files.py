"""`PieceWriter`: lines to a file in pieces, where a full disk or a closed pipe is told of once and hurts nobody."""

from __future__ import annotations

import gzip
import logging
import os
import threading
import time
from pathlib import Path
from typing import IO, Final, cast

_log = logging.getLogger("stageflow.events")

_PIECE: Final = 64 * 1024
_MAX_AGE: Final = 1.0


class PieceWriter:
    """Collects bytes and writes them in pieces of up to 64 KiB, at the latest with the first `write` after a second.

    `target` is a path (folders are made, the file is opened with the first piece, ".gz" compresses) or an open binary
    file, which is left open. After the first error nothing is written any more; `lost` counts what was offered since.
    `what` names the content in the one warning. Thread-safe.
    """

    def __init__(self, target: str | os.PathLike[str] | IO[bytes], *, what: str, append: bool) -> None:
        self._path = Path(target) if isinstance(target, str | os.PathLike) else None
        self._file: IO[bytes] | None = None if isinstance(target, str | os.PathLike) else target
        self._what = what
        self._mode = "ab" if append else "wb"
        self._pieces: list[bytes] = []
        self._size = 0
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self.written = 0
        self.lost = 0
        self.error: Exception | None = None

    def write(self, line: bytes, *, now: bool = False) -> None:
        """Take one line, complete with its newline; `now` writes at once."""
        with self._lock:
            if self.error is not None:
                self.lost += 1
                return
            self._pieces.append(line)
            self._size += len(line)
            if now or self._size >= _PIECE or time.monotonic() - self._since >= _MAX_AGE:
                self._flush()

    def _flush(self) -> None:
        count = len(self._pieces)
        self._since = time.monotonic()
        if not count:
            return
        piece = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        try:
            file = self._file or self._open()
            file.write(piece)
            file.flush()
        except (OSError, ValueError) as error:
            self.error = error
            self.lost += count
            where = str(self._path) if self._path else str(getattr(self._file, "name", "a stream"))
            _log.warning("%s can no longer be written to %s: %s", self._what, where, error)
            self._close()
        else:
            self.written += count

    def _open(self) -> IO[bytes]:
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.suffix == ".gz":
            self._file = cast("IO[bytes]", gzip.GzipFile(self._path, self._mode, compresslevel=3))
        else:
            self._file = open(self._path, self._mode)  # noqa: SIM115 - closed by close()
        self._mode = "ab"  # a writer that is used again goes on where it was
        return self._file

    def _close(self) -> None:
        if self._path is not None and self._file is not None:
            try:
                self._file.close()
            except (OSError, ValueError):
                pass  # reported already, or the last bytes were refused like those before them
            self._file = None

    def flush(self) -> None:
        """Write what was collected."""
        with self._lock:
            if self.error is None:
                self._flush()

    def close(self) -> None:
        """Write what was collected and close the file if it was opened here. A later `write` opens it again."""
        self.flush()
        with self._lock:
            self._close()
