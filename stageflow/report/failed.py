"""Failed items as small files: what failed, where, with which input, so that `stageflow replay` can run it again alone.

A file is one line of JSON (readable with any pager) and, where the input was saved, a pickle behind it. Files are
private to their owner; one that somebody else could have written is never unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.events import names
from stageflow.events.encoding import as_text, plain
from stageflow.events.event import Event
from stageflow.report.fold import environment

_log = logging.getLogger("stageflow.report")

SUFFIX: Final = ".sfail"
#: Files per run; failures beyond it are counted.
LIMIT: Final = 1000
_FORMAT: Final = 1


class FailedFileError(DefinitionError):
    """A file is no saved failure, or may not be trusted (field `path`)."""

    code = "SF-FAILED-FILE"


class FailedInput(msgspec.Struct, frozen=True, kw_only=True):
    """What the attempt was called with. `values` maps dependency or element names to values; `snapshot` is the
    run's."""

    values: dict[str, Any] = {}
    snapshot: Any = None
    target: str | None = None  #: "module:graph", as `stageflow run` takes it


class FailedItem(msgspec.Struct, frozen=True, kw_only=True):
    """One saved failure. `load_input()` reads the input from the file."""

    format: int = _FORMAT
    pipeline: str = ""
    target: str | None = None
    run_id: str | None = None
    stage: str = ""
    item: tuple[int, ...] | None = None
    attempt: int | None = None
    lane: str | None = None
    time_unix_ns: int = 0
    error: str = ""
    error_type: str = ""
    traceback: str = ""
    error_info: dict[str, Any] = {}
    environment: dict[str, str] = {}
    input_error: str | None = None  #: why there is no input, where one was asked for
    input_bytes: int = 0
    path: str | None = None

    @property
    def has_input(self) -> bool:
        """True when the file holds the input."""
        return self.input_bytes > 0

    def load_input(self) -> FailedInput:
        """The input of the attempt.

        Raises:
            FailedFileError: there is none, or the file could have been written by another user.
        """
        if self.path is None or not self.has_input:
            why = f": {self.input_error}" if self.input_error else ""
            raise FailedFileError(f"the input of this failure was not saved{why}", path=self.path)
        with open(self.path, "rb") as file:
            check_private(os.fstat(file.fileno()), self.path)
            file.readline()
            data = file.read(self.input_bytes)
        if len(data) != self.input_bytes:
            raise FailedFileError(f"{self.path} is cut off", path=self.path)
        values, snapshot, target = pickle.loads(data)
        return FailedInput(values=values, snapshot=snapshot, target=target)


def check_private(status: os.stat_result, path: str) -> None:
    """Raise FailedFileError unless the file is ours and nobody else can write it."""
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise FailedFileError(f"{path} belongs to another user and is not unpickled", path=path)
    if os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FailedFileError(
            f"{path} can be written by others and is not unpickled", hint=f"chmod go-w {path}", path=path
        )


def load_failed(path: str | os.PathLike[str]) -> FailedItem:
    """Read a saved failure; its input is left in the file until asked for.

    Raises:
        FailedFileError: the file is not one of ours, or of a newer format.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        line = file.readline()
    try:
        found = msgspec.json.decode(line, type=FailedItem)
    except msgspec.MsgspecError as error:
        raise FailedFileError(f"{name} is not a saved failure: {error}", path=name) from None
    if found.format > _FORMAT:
        raise FailedFileError(f"{name} has format {found.format}, newer than this Stageflow reads", path=name)
    return msgspec.structs.replace(found, path=name)


def find_failed(folder: str | os.PathLike[str]) -> list[Path]:
    """Every saved failure below `folder`, in order of path."""
    return sorted(Path(folder).rglob(f"*{SUFFIX}"))


def save_failed(path: Path, failed: FailedItem, given: FailedInput | None) -> None:
    """Write one file, complete or not at all. An input that cannot be pickled is left out and named."""
    payload = b""
    why = failed.input_error
    if given is not None:
        payload, why = _pickled(given)
    header = msgspec.structs.replace(
        failed,
        input_error=why,
        input_bytes=len(payload),
        path=None,
        target=given.target if given is not None else failed.target,
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(header) + b"\n" + payload)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _pickled(given: FailedInput) -> tuple[bytes, str | None]:
    content = (given.values, given.snapshot, given.target)
    try:
        return pickle.dumps(content, protocol=5), None
    except Exception as first:
        try:
            import cloudpickle

            data: bytes = cloudpickle.dumps(content, protocol=5)
        except Exception:
            return b"", f"{type(first).__name__}: {as_text(first)[:500]}"
        return data, None


def failed_path(folder: str | os.PathLike[str], event: Event) -> Path:
    """Where the failure `event` tells of is saved: folder/run/stage/item."""
    name = ".".join(map(str, event.item)) if event.item is not None else "stage"
    return Path(folder) / _slug(event.run_id or "run") / _slug(event.stage or "stage") / f"{name}{SUFFIX}"


def _slug(name: str) -> str:
    """`name` as one path component; a name that had to be changed gets a digest, so that two never meet."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80].strip(".") or "_"
    if safe == name:
        return safe
    return f"{safe}-{hashlib.blake2b(name.encode('utf-8', 'replace'), digest_size=4).hexdigest()}"


class FailedItemSink:
    """Saves every final failure of an item or a plain stage below `folder`.

    `fetch(event)` gives the input of the attempt while the engine still has it (None: not saved, and then the file
    says so). It is called where the event is emitted. At most `limit` files per run are written; a disk that is full
    is reported once. `redact(item)` may return another `FailedItem`, or None to save nothing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fetch: Callable[[Event], FailedInput | None] | None = None,
        redact: Callable[[FailedItem], FailedItem | None] | None = None,
        limit: int = LIMIT,
    ) -> None:
        self.folder = Path(folder)
        self.saved = 0
        self.skipped = 0
        self.error: OSError | None = None
        self._fetch = fetch
        self._redact = redact
        self._limit = limit
        self._pipelines: dict[str | None, str] = {}
        self._counts: dict[str | None, int] = {}
        self._items: set[tuple[str | None, str | None]] = set()
        self._last: tuple[str | None, str | None, tuple[int, ...] | None] | None = None
        self._environment: Mapping[str, str] | None = None

    def emit(self, event: Event) -> None:
        """Save the failure, if `event` is one."""
        type_ = event.type
        if type_ == names.STAGE_FAILED:
            self._failed(event)
        elif type_ == names.RUN_STARTED:
            self._pipelines[event.run_id] = str(event.data.get("pipeline") or "")
        elif type_ in names.RUN_ENDED:
            self._pipelines.pop(event.run_id, None)
            self._counts.pop(event.run_id, None)
            self._items = {key for key in self._items if key[0] != event.run_id}

    def _failed(self, event: Event) -> None:
        where = (event.run_id, event.stage)
        if event.item is not None:
            self._items.add(where)
        elif where in self._items:
            return  # the stage failed because of items that are saved one by one
        count = self._counts.get(event.run_id, 0)
        if count >= self._limit or self.error is not None:
            self.skipped += 1
            return
        given, why = self._input(event)
        failed: FailedItem | None = self._describe(event, why)
        if self._redact is not None and failed is not None:
            failed = self._redact(failed)
        if failed is None:
            self.skipped += 1
            return
        try:
            save_failed(failed_path(self.folder, event), failed, given)
        except OSError as error:
            self.error = error
            self.skipped += 1
            _log.warning("failed items are no longer saved to %s: %s", self.folder, error)
            return
        self._counts[event.run_id] = count + 1
        self.saved += 1
        self._last = (event.run_id, event.stage, event.item)

    def path_of(self, event: Event) -> Path | None:
        """The file the failure `event` tells of was saved to; None if it was not. To be asked by sinks attached after
        this one, while they are told of it."""
        told = (event.run_id, event.stage, event.item)
        return failed_path(self.folder, event) if told == self._last else None

    def _input(self, event: Event) -> tuple[FailedInput | None, str | None]:
        if self._fetch is None:
            return None, "saving inputs was not asked for"
        try:
            given = self._fetch(event)
        except Exception as error:
            return None, f"{type(error).__name__}: {as_text(error)[:500]}"
        return given, None if given is not None else "the engine no longer had it"

    def _describe(self, event: Event, why: str | None) -> FailedItem:
        data = event.data
        info = data.get("error_info") or {}
        if self._environment is None:
            self._environment = environment()
        return FailedItem(
            pipeline=self._pipelines.get(event.run_id, ""),
            run_id=event.run_id,
            stage=event.stage or "",
            item=event.item,
            attempt=event.attempt,
            lane=event.lane,
            time_unix_ns=event.time_unix_ns or time.time_ns(),
            error=as_text(data.get("error") or info.get("message") or ""),
            error_type=as_text(data.get("error_type") or info.get("type") or ""),
            traceback=as_text(data.get("traceback") or info.get("traceback") or ""),
            error_info=plain(info),
            environment=dict(self._environment),
            input_error=why,
        )
