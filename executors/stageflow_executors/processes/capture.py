"""What a call prints, logs and warns comes back as notes, in order, tagged with its call; what it did to the process
is undone.

Notes: kind "print" {stream, text}; kind "log" as `stageflow.events.catalogue.StageLog`; both with the `stage` and
`item` that were under way in a block. Bounded per call.
Loaded in workers only.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
import warnings
from typing import TYPE_CHECKING, Any, Final

from stageflow_executors.processes import channel as ch

if TYPE_CHECKING:
    from stageflow_executors.processes.worker_main import Worker

MAX_TEXT: Final = 256 * 1024  #: characters of prints and logs kept per call
MAX_LINE: Final = 16 * 1024
_MAX_FIELD: Final = 1024
#: what every record has, and what `ctx.log` adds: the parent knows it already
_STANDARD: Final = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | frozenset(
    ("message", "asctime", "taskName", "run_id", "stage", "item", "attempt", "lane")
)

_worker: Worker | None = None
_spent_by: int = 0
_spent: int = 0


def _send(kind: str, size: int, data: dict[str, Any]) -> None:
    global _spent_by, _spent
    worker = _worker
    if worker is None or not worker.own[0]:
        return
    call_id = worker.call_id
    if call_id != _spent_by:
        _spent_by, _spent = call_id, 0
    before, _spent = _spent, _spent + size
    if before > MAX_TEXT:
        return
    if _spent > MAX_TEXT:
        data = {
            "logger": "stageflow",
            "level": 30,
            "message": f"more than {MAX_TEXT} characters of output: the rest is dropped",
        }
        kind = "log"
    if worker.item is not None:
        data["stage"], data["item"] = worker.item()
    worker.post([ch.NOTE, call_id, kind, data], now=False)
    worker.flush_soon()


class Stream(io.TextIOBase):
    """Stands for sys.stdout or sys.stderr: whole lines become notes."""

    def __init__(self, name: str, fd: int) -> None:
        super().__init__()
        self._name = name
        self._fd = fd
        self._rest = ""
        self.buffer = _Bytes(self)

    encoding = "utf-8"
    errors = "replace"

    @property
    def name(self) -> str:
        """As the interpreter calls the stream."""
        return f"<{self._name}>"

    def writable(self) -> bool:
        """Yes."""
        return True

    def isatty(self) -> bool:
        """A worker has no terminal."""
        return False

    def fileno(self) -> int:
        """The raw descriptor, for programs started by a stage."""
        return self._fd

    def write(self, text: str) -> int:
        """Collect; send whole lines."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        rest = self._rest + text
        if "\n" in text or len(rest) > MAX_LINE:
            lines, newline, rest = rest.rpartition("\n")
            if not newline:
                lines, rest = rest, ""
            for at in range(0, len(lines) + 1, MAX_LINE):
                piece = lines[at : at + MAX_LINE]
                _send(
                    "print",
                    len(piece) + 1,
                    {"stream": self._name, "text": piece + ("\n" if at + MAX_LINE > len(lines) else "")},
                )
                if at > MAX_TEXT:
                    break
        self._rest = rest
        return len(text)

    def flush(self) -> None:
        """Nothing is held back but an unfinished line, which the end of the call sends."""

    def finish(self) -> None:
        """Send an unfinished line."""
        if self._rest:
            rest, self._rest = self._rest, ""
            _send("print", len(rest), {"stream": self._name, "text": rest})


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`: bytes, decoded leniently."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raw = bytes(data)
        self._stream.write(raw.decode("utf-8", "replace"))
        return len(raw)


class Handler(logging.Handler):
    """Log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises."""
        try:
            message = record.getMessage()[:MAX_LINE]
            shown = record.exc_info
            exc = "".join(traceback.format_exception(*shown))[-MAX_LINE:].rstrip("\n") if shown else record.exc_text
            own = {name: _plain(value) for name, value in vars(record).items() if name not in _STANDARD}
            _send(
                "log",
                len(message) + len(exc or "") + 1,
                {
                    "logger": record.name,
                    "level": record.levelno,
                    "message": message,
                    "created": record.created,
                    "pathname": record.pathname,
                    "lineno": record.lineno,
                    "func": record.funcName or "",
                    "thread": record.threadName or "",
                    "exc_text": exc,
                    "worker_pid": record.process or 0,
                    "extra": own,
                },
            )
        except Exception:
            self.handleError(record)


def _plain(value: Any) -> Any:
    """A field of a record as the parent can read it."""
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 1 << 63):
        return value
    return str(value)[:_MAX_FIELD]


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    _send(
        "log",
        len(text),
        {
            "logger": "py.warnings",
            "level": logging.WARNING,
            "message": text,
            "created": time.time(),
            "pathname": filename,
            "lineno": lineno,
        },
    )


_umask = 0
_cwd: bytes | None = None
_streams: tuple[Stream, Stream]


def install(worker: Worker, settings: dict[str, Any]) -> None:
    """Take over the streams, the root logger and warnings of this process."""
    global _worker, _umask, _cwd, _streams
    _worker = worker
    _streams = (Stream("stdout", 1), Stream("stderr", 2))
    _take_streams()
    root = logging.getLogger()
    root.handlers[:] = [Handler()]
    root.setLevel(settings.get("log_level", logging.WARNING))
    warnings.showwarning = _show_warning
    _umask = os.umask(0)
    os.umask(_umask)
    try:
        _cwd = os.getcwdb()
    except OSError:
        _cwd = None


def _take_streams() -> None:
    sys.stdout = sys.__stdout__ = _streams[0]  # type: ignore[assignment,misc]
    sys.stderr = sys.__stderr__ = _streams[1]  # type: ignore[assignment,misc]


def flush_streams() -> None:
    """The end of a call ends its last line."""
    out, err = _streams
    if out._rest or err._rest:
        out.finish()
        err.finish()


def restore_process() -> None:
    """Working directory, umask and streams as they were before the call."""
    os.umask(_umask)
    if _cwd is not None:
        try:
            moved = os.getcwdb() != _cwd  # a fifth of what looking at "." costs
        except OSError:
            moved = True
        if moved:
            try:
                os.chdir(_cwd)
            except OSError:
                pass
    if sys.stdout is not _streams[0] or sys.stderr is not _streams[1]:
        _take_streams()
