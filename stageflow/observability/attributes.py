"""The attribute names of runs and stages in traces and metrics, and small helpers to time and report a span by hand.

Numbers stay numbers. Only what is set is given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

AttributeValue = str | bool | int | float | tuple[str, ...]

_log = logging.getLogger("stageflow.trace")


class PipelineSpanAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """What identifies a run in a trace."""

    pipeline_name: str | None = None
    pipeline_run_id: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    user_id: str | None = None
    org_id: str | None = None
    execution_mode: str | None = None
    service: str | None = None
    topology: str | None = None

    @classmethod
    def of(cls, run_id: str | None, data: Mapping[str, Any]) -> PipelineSpanAttributes:
        """From the data of a `run.started` event."""
        known = {name: data.get(name) for name in cls.__struct_fields__ if data.get(name)}
        return cls(**{**known, "pipeline_name": data.get("pipeline") or None, "pipeline_run_id": run_id})

    def to_otel_attributes(self) -> dict[str, AttributeValue]:
        """`pipeline.*` keys, and `service.name`; only those that are set."""
        return {key: value for field, key in _PIPELINE_KEYS.items() if (value := getattr(self, field)) is not None}


_PIPELINE_KEYS: Final = {
    "pipeline_name": "pipeline.name",
    "pipeline_run_id": "pipeline.run_id",
    "request_id": "pipeline.request_id",
    "session_id": "pipeline.session_id",
    "user_id": "pipeline.user_id",
    "org_id": "pipeline.org_id",
    "execution_mode": "pipeline.execution_mode",
    "service": "service.name",
    "topology": "pipeline.topology",
}


class StageSpanAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """What identifies a stage in a trace and how it ended."""

    stage_name: str
    stage_kind: str | None = None
    status: str | None = None
    lane: str | None = None
    duration_ms: float | None = None
    error: str | None = None
    data_keys: tuple[str, ...] | None = None

    def to_otel_attributes(self) -> dict[str, AttributeValue]:
        """`stage.name` always, the other `stage.*` keys where set; the duration is a number of milliseconds."""
        keys: dict[str, AttributeValue] = {"stage.name": self.stage_name}
        for field in ("kind", "status", "lane", "duration_ms", "error", "data_keys"):
            value = getattr(self, "stage_kind" if field == "kind" else field)
            if value is not None and value != ():
                keys[f"stage.{field}"] = value
        return keys


class SpanTimer:
    """Measures one span with the monotonic clock: `timer = SpanTimer.start("load")`, later `timer.finish()`."""

    __slots__ = ("_clock", "_ended", "_started", "name")

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._started = clock()
        self._ended: float | None = None

    @classmethod
    def start(cls, name: str) -> SpanTimer:
        """A timer that runs from now."""
        return cls(name)

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the start, or until `finish` was called."""
        return ((self._clock() if self._ended is None else self._ended) - self._started) * 1000.0

    def finish(self) -> float:
        """Stop, once; the milliseconds it took."""
        if self._ended is None:
            self._ended = self._clock()
        return self.elapsed_ms


class TracingEmitter(Protocol):
    """Somewhere to report spans by hand."""

    def span_start(self, name: str, attributes: Mapping[str, AttributeValue]) -> None:
        """A span begins."""
        ...

    def span_end(self, name: str, duration_ms: float, attributes: Mapping[str, AttributeValue]) -> None:
        """A span ended well."""
        ...

    def span_error(self, name: str, error: str, attributes: Mapping[str, AttributeValue]) -> None:
        """A span ended badly."""
        ...


class NoOpTracingEmitter:
    """Reports nothing."""

    def span_start(self, name: str, attributes: Mapping[str, AttributeValue]) -> None:
        """Do nothing."""

    def span_end(self, name: str, duration_ms: float, attributes: Mapping[str, AttributeValue]) -> None:
        """Do nothing."""

    def span_error(self, name: str, error: str, attributes: Mapping[str, AttributeValue]) -> None:
        """Do nothing."""


class LoggingTracingEmitter:
    """Logs spans to `stageflow.trace`: start at DEBUG, end at INFO, error at ERROR."""

    def span_start(self, name: str, attributes: Mapping[str, AttributeValue]) -> None:
        """Log the start."""
        _log.debug("span %s started %s", name, dict(attributes))

    def span_end(self, name: str, duration_ms: float, attributes: Mapping[str, AttributeValue]) -> None:
        """Log the end."""
        _log.info("span %s took %.3f ms %s", name, duration_ms, dict(attributes))

    def span_error(self, name: str, error: str, attributes: Mapping[str, AttributeValue]) -> None:
        """Log the error."""
        _log.error("span %s failed: %s %s", name, error, dict(attributes))
