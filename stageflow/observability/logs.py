"""Log records of runs: every record says run, stage, item and attempt; as text or as JSON; records of workers
re-logged.

`install()` gives a logger a handler with these formatters; `LogSink` turns `stage.log` events, which carry the
records of worker processes, back into records of the same logger name and level in this process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

from stageflow.context.tracing import parse_traceparent, span_id_of, trace_id_of
from stageflow.events import names
from stageflow.events.encoding import as_text, plain
from stageflow.events.event import Event
from stageflow.observability.wide import iso_time

FIELDS: Final = ("run_id", "stage", "item", "attempt", "lane")
_STANDARD: Final = frozenset(
    [*vars(logging.LogRecord("", 0, "", 0, "", None, None)), "message", "asctime", "taskName", *FIELDS]
)
_MAX_RUNS: Final = 4096


def _item_text(item: Any) -> str:
    return ".".join(map(str, item)) if isinstance(item, tuple | list) else as_text(item)


def where(record: logging.LogRecord) -> str:
    """`run/stage[item]#attempt` of a record as far as it has them; empty for a record from outside a run."""
    run_id, stage = getattr(record, "run_id", None), getattr(record, "stage", None)
    item, attempt = getattr(record, "item", None), getattr(record, "attempt", None)
    text = as_text(run_id)[:8] if run_id else ""
    if stage:
        text += f"/{as_text(stage)}" if text else as_text(stage)
        if item is not None:
            text += f"[{_item_text(item)}]"
        if attempt is not None and attempt != 1:
            text += f"#{attempt}"
    return text


class TextFormatter(logging.Formatter):
    """`12:30:59.123 WARNING docs [3f2a91c0/parse[7]#2] message`, with the traceback below."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s %(where)s%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        text = where(record)
        record.where = f"[{text}] " if text else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, run_id, stage, item, attempt, lane, trace ids, own
    fields.

    `redact(mapping)`, if given, may return another mapping to write instead.
    """

    def __init__(self, redact: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """One record as a JSON object without newlines."""
        line: dict[str, Any] = {
            "time": iso_time(int(record.created * 1e9)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = list(value) if isinstance(value, tuple) else value
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        own = {k: v for k, v in vars(record).items() if k not in _STANDARD and not k.startswith("_") and k != "where"}
        line.update(own)
        shown = self._redact(line) if self._redact is not None else line
        return json.dumps(plain(dict(shown)), ensure_ascii=False)


class TraceFilter(logging.Filter):
    """Adds `trace_id` and `span_id` (hex) to records of a run, so that logs and traces meet.

    A span that is current in this process wins; else the ids are those of the run's, stage's or attempt's own span.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True; the record is only added to."""
        from stageflow.context.tracing import current_traceparent

        if hasattr(record, "trace_id"):
            return True
        here = parse_traceparent(current_traceparent())
        if here is not None:
            record.trace_id, record.span_id = here[0], here[1]
            return True
        run_id = getattr(record, "run_id", None)
        if run_id:
            stage, attempt = getattr(record, "stage", None), getattr(record, "attempt", None)
            parts = (
                () if not stage else (stage,) if attempt is None else (stage, getattr(record, "item", None), attempt)
            )
            record.trace_id, record.span_id = trace_id_of(run_id), span_id_of(run_id, *parts)
        return True


def install(
    level: int | str = logging.INFO,
    *,
    json_lines: bool = False,
    stream: TextIO | None = None,
    logger: str | None = None,
    trace_ids: bool = False,
    redact: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> logging.Handler:
    """Add a handler to `logger` (the root logger) that writes our format to `stream` (standard error); returns it.

    The logger's own level is lowered to `level` if it would hold records back, and never raised.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(redact) if json_lines else TextFormatter())
    handler.setLevel(level)
    if trace_ids:
        handler.addFilter(TraceFilter())
    target = logging.getLogger(logger)
    target.addHandler(handler)
    if target.level == logging.NOTSET or target.level > handler.level:
        target.setLevel(handler.level)
    return handler


class LogSink:
    """Logs what attempts logged in worker processes: same logger, level, text, source line and fields.

    Records keep the time they were made. `events=True` also logs failures (ERROR) and retries (WARNING) of stages,
    and ends of runs (INFO), to `stageflow.run`.
    """

    #: tells the engine that records of workers are logged already
    shows_logs = True

    def __init__(self, *, events: bool = False) -> None:
        self._events = events
        self._log = logging.getLogger("stageflow.run")
        self._traces: dict[str | None, str] = {}

    def emit(self, event: Event) -> None:
        """Log what `event` carries, if it carries anything to log."""
        type_ = event.type
        if type_ == names.STAGE_LOG:
            self._record(event)
        elif type_ == names.RUN_STARTED:
            outer = parse_traceparent(event.data.get("traceparent"))
            if outer is not None and len(self._traces) < _MAX_RUNS:
                self._traces[event.run_id] = outer[0]
        elif type_ in names.RUN_ENDED:
            self._traces.pop(event.run_id, None)
        if self._events and type_ in _LEVELS:
            level, text = _LEVELS[type_]
            data = event.data
            detail = as_text(data.get("error") or data.get("reason") or data.get("status") or "")
            extra = self._extra(event)
            stage = event.stage or ""
            self._log.log(
                level, "%s%s%s", f"{stage} " if stage else "", text, f": {detail}" if detail else "", extra=extra
            )

    def _extra(self, event: Event) -> dict[str, Any]:
        extra: dict[str, Any] = {name: getattr(event, name) for name in FIELDS}
        trace = self._traces.get(event.run_id)
        if trace is not None and event.run_id is not None:
            extra["trace_id"] = trace
            extra["span_id"] = span_id_of(event.run_id, *((event.stage,) if event.stage else ()))
        return extra

    def _record(self, event: Event) -> None:
        data = event.data
        logger = logging.getLogger(as_text(data.get("logger") or "stageflow.stage"))
        level = data.get("level")
        number = level if isinstance(level, int) else logging.INFO
        if not logger.isEnabledFor(number):
            return
        record = logging.LogRecord(
            logger.name,
            number,
            as_text(data.get("pathname") or ""),
            data.get("lineno") or 0,
            as_text(data.get("message") or ""),
            None,  # the worker has put the arguments in; a "%" in the text is only a sign
            None,
            data.get("func") or None,
        )
        created = data.get("created") or event.time_unix_ns / 1e9
        record.created = created
        record.msecs = int((created % 1) * 1000) + 0.0
        record.process = data.get("worker_pid") or record.process
        record.threadName = data.get("thread") or record.threadName
        record.exc_text = data.get("exc_text")
        for key, value in {**(data.get("extra") or {}), **self._extra(event)}.items():
            if key not in ("message", "asctime", "args", "msg", "exc_info", "name", "levelno"):
                setattr(record, key, value)
        logger.handle(record)


_LEVELS: Final = {
    names.STAGE_FAILED: (logging.ERROR, "failed"),
    names.STAGE_RETRYING: (logging.WARNING, "is tried again"),
    names.WORKER_LOST: (logging.ERROR, "worker lost"),
    names.RUN_COMPLETED: (logging.INFO, "run completed"),
    names.RUN_FAILED: (logging.ERROR, "run failed"),
    names.RUN_CANCELLED: (logging.WARNING, "run cancelled"),
}
