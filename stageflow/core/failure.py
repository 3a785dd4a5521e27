"""Exceptions as data: they travel as `ErrorInfo`, never as a bare pickle (unpicklable or hostile ones hang other
pools)."""

from __future__ import annotations

import pickle
import traceback
from typing import Final

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
    except Exception as broken:
        message = f"<str() of the exception raised {type(broken).__name__}>"
    frames = error.__traceback__
    for _ in range(skip_frames):
        if frames is None or frames.tb_next is None:
            break
        frames = frames.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, frames, chain=True))
    except Exception as broken:
        text = f"<the traceback could not be formatted: {type(broken).__name__}>"
    raw_notes = getattr(error, "__notes__", ())
    try:
        notes = tuple(str(note) for note in raw_notes)
    except Exception:
        notes = ()
    retry_after = getattr(error, "retry_after", None)
    cause = error.__cause__
    fields = getattr(error, "__dict__", {}) if isinstance(error, StageflowError) else {}
    return ErrorInfo(
        type=type_name(type(error)),
        message=message[:_MAX_MESSAGE],
        traceback=text
        if len(text) <= _MAX_TRACEBACK
        else text[: _MAX_TRACEBACK // 2] + "\n...\n" + text[-_MAX_TRACEBACK // 2 :],
        notes=notes,
        cause=_capture(cause, None, None, None, None, False, 0, depth + 1) if cause is not None and depth < 4 else None,
        retryable=bool(getattr(error, "retryable", False)),
        retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
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


def _pickle(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error, protocol=5)
        if len(data) > _MAX_PICKLE:
            return None
        pickle.loads(data)  # an exception whose __init__ or __reduce__ raises would only be found out by the reader
    except Exception:
        return None
    return data


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
