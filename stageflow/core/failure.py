"""Exceptions as data: they travel as `ErrorInfo`, never as a bare pickle (unpicklable or hostile ones hang other
pools)."""

from __future__ import annotations

import math
import pickle
import traceback
from typing import Any, Final

from stageflow.core.errors import StageflowError
from stageflow.core.output import ErrorInfo

_MAX_TRACEBACK: Final = 64 * 1024  # characters; a recursion error must not fill a frame
_MAX_MESSAGE: Final = 16 * 1024
_MAX_PICKLE: Final = 64 * 1024


def type_name(cls: type) -> str:
    """ "package.Class", bare for builtins."""
    module = cls.__module__
    return cls.__qualname__ if module == "builtins" else f"{module}.{cls.__qualname__}"


def capture(
    error: BaseException,
    *,
    lane: str | None = None,
    worker_pid: int | None = None,
    attempt: int | None = None,
    item: tuple[int, ...] | None = None,
    keep_pickle: bool = True,
    skip_frames: int = 0,
) -> ErrorInfo:
    """Describe `error` without ever raising, whatever its methods do. `skip_frames` drops that many of our own outer
    frames."""
    return _capture(error, lane, worker_pid, attempt, item, keep_pickle, skip_frames, depth=0)


def _capture(
    error: BaseException,
    lane: str | None,
    worker_pid: int | None,
    attempt: int | None,
    item: tuple[int, ...] | None,
    keep_pickle: bool,
    skip_frames: int,
    depth: int,
) -> ErrorInfo:
    try:
        message = str(error.message) if isinstance(error, StageflowError) else str(error)
    except BaseException as broken:
        message = f"<str() of the exception raised {type(broken).__name__}>"
    frames = error.__traceback__
    for _ in range(skip_frames):
        if frames is None or frames.tb_next is None:
            break
        frames = frames.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, frames, chain=True))
    except BaseException as broken:
        text = f"<the traceback could not be formatted: {type(broken).__name__}>"
    try:
        notes = tuple(_sendable(str(note)) for note in getattr(error, "__notes__", ()))
    except BaseException:
        notes = ()
    cause = error.__cause__
    fields = getattr(error, "__dict__", {}) if isinstance(error, StageflowError) else {}
    if len(text) > _MAX_TRACEBACK:
        text = text[: _MAX_TRACEBACK // 2] + "\n...\n" + text[-_MAX_TRACEBACK // 2 :]
    return ErrorInfo(
        type=type_name(type(error)),
        message=_sendable(message[:_MAX_MESSAGE]),
        traceback=_sendable(text),
        notes=notes,
        cause=_capture(cause, None, None, None, None, False, 0, depth + 1) if cause is not None and depth < 4 else None,
        retryable=_retryable(error),
        retry_after=_retry_after(error),
        code=error.code if isinstance(error, StageflowError) else None,
        lane=lane,
        worker_pid=worker_pid,
        attempt=attempt,
        item=item,
        signal=fields.get("signal"),
        exit_code=fields.get("exit_code"),
        oom_killed=fields.get("oom_killed"),
        rss_bytes=fields.get("rss_bytes"),
        stderr_tail=fields.get("stderr_tail"),
        elapsed=fields.get("elapsed"),
        limit=fields.get("limit"),
        pickled=_pickle(error) if keep_pickle else None,
    )


def _sendable(text: str) -> str:
    """The text, with what UTF-8 has no bytes for (half of a surrogate pair, as in some file names) spelled out."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def _retryable(error: BaseException) -> bool:
    try:
        return bool(getattr(error, "retryable", False))
    except Exception:
        return False


def _retry_after(error: BaseException) -> float | None:
    """Seconds the exception asks to be waited; None where it names no such number."""
    try:
        seconds = getattr(error, "retry_after", None)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            return None
        return float(seconds) if 0 <= seconds < math.inf else None
    except Exception:
        return None


def _pickle(error: BaseException) -> bytes | None:
    """The exception, or by its parts where its class cannot be called with `args`, as pickle does: what an __init__
    with arguments of its own makes of its own result is another exception or none. None where neither comes back."""
    for made in (error, _Parts(error)):
        try:
            data = pickle.dumps(made, protocol=5)
            if len(data) > _MAX_PICKLE:
                return None
            if _says_the_same(pickle.loads(data), error):
                return data
        except Exception:  # an exception whose __init__ or __reduce__ raises would only be found out by the reader
            continue
    return None


def _says_the_same(loaded: Any, error: BaseException) -> bool:
    """False where `loaded` is `error` made anew with its own text as argument. One that pickles as something else
    knows what it does."""
    if type(loaded) is not type(error):
        return isinstance(loaded, BaseException)
    return str(loaded) == str(error)


class _Parts:
    """Pickles as the exception that it holds, made without calling its __init__."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_parts, (type(self.error), self.error.args, self.error.__dict__)


def _from_parts(cls: type[BaseException], args: tuple[Any, ...], fields: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class RemoteTraceback(Exception):
    """Carries the traceback text of another process as the cause of a revived exception."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class RemoteError(StageflowError):
    """Stands for an exception that could not be pickled; `error_info` describes it."""

    code = "SF-REMOTE"


def revive(info: ErrorInfo) -> BaseException:
    """The exception again: the original where it could travel (with the remote traceback as cause), else a
    `RemoteError`."""
    error: BaseException | None = None
    if info.pickled is not None:
        try:
            loaded = pickle.loads(info.pickled)  # from our own child over its private socket
            if isinstance(loaded, BaseException):
                error = loaded
        except Exception:
            error = None
    if error is None:
        error = RemoteError(f"{info.type}: {info.message}", error_info=info)
        for note in info.notes:
            error.add_note(note)
    if info.traceback and error.__cause__ is None:
        error.__cause__ = RemoteTraceback(info.traceback)
    return error
