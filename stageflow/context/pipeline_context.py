"""What belongs to one run beside its snapshot: bags, identity, cancellation and the way to emit events."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, runtime_checkable

from stageflow.context.bags import ContextBag, OutputBag
from stageflow.context.cancellation import CancellationToken
from stageflow.context.identity import RunIdentity, new_run_id
from stageflow.context.snapshot import ContextSnapshot

_log = logging.getLogger("stageflow.context")

PRODUCTION: Final = "production"

#: takes an event's type and its data; what it raises never reaches the caller of `try_emit_event`
Emitter = Callable[[str, Any], Any]


def _absent(value: Any) -> bool:
    # No `==`: an array in an enrichment answers it with an array.
    return value is None or (isinstance(value, tuple | dict) and not value)


@runtime_checkable
class ExecutionContext(Protocol):
    """What helpers and tools need to know of the run they serve."""

    def pipeline_run_id(self) -> str | None:
        """Id of the run."""
        ...

    def request_id(self) -> str | None:
        """Id of the request the run answers."""
        ...

    def execution_mode(self) -> str | None:
        """For example "production"."""
        ...

    def topology(self) -> str | None:
        """Name of the graph."""
        ...

    def try_emit_event(self, type: str, data: Any = None) -> None:
        """Emit an event. Never raises."""
        ...

    def is_cancelled(self) -> bool:
        """True once the run was asked to stop."""
        ...


class PipelineContext:
    """The mutable side of a run, in the process of the engine. Thread-safe.

    `emitter` is where events go (None: nowhere), `token` stops the run. Nothing here is process-wide.
    """

    __slots__ = (
        "_emitter",
        "_enrichments",
        "_execution_mode",
        "_lock",
        "_topology",
        "data",
        "outputs",
        "parent",
        "run_id",
        "service",
        "token",
    )

    def __init__(
        self,
        run_id: RunIdentity | None = None,
        *,
        topology: str | None = None,
        execution_mode: str = PRODUCTION,
        emitter: Emitter | None = None,
        service: str | None = None,
        token: CancellationToken | None = None,
        enrichments: Mapping[str, Any] | None = None,
        parent: PipelineContext | None = None,
    ) -> None:
        self.run_id = run_id if run_id is not None else RunIdentity.new()
        self.service = service
        self.parent = parent
        self.token = token if token is not None else CancellationToken()
        self.data = ContextBag()
        self.outputs = OutputBag()
        self._topology = topology
        self._execution_mode = execution_mode
        self._emitter = emitter
        self._enrichments: dict[str, Any] = copy.deepcopy(dict(enrichments or {}))
        self._lock = threading.Lock()

    @classmethod
    def new(cls, run_id: RunIdentity) -> PipelineContext:
        """The context of a run without further settings."""
        return cls(run_id)

    @classmethod
    def from_snapshot(cls, snapshot: ContextSnapshot, **settings: Any) -> PipelineContext:
        """A context with the identity and the enrichments of `snapshot`; `settings` as for the constructor."""
        enrichments = snapshot.enrichments
        values = {name: getattr(enrichments, name) for name in enrichments.__struct_fields__}
        given = {name: value for name, value in values.items() if not _absent(value)}
        return cls(snapshot.run_id, enrichments=given, **settings)

    def with_topology(self, topology: str) -> PipelineContext:
        """Set the graph's name; returns the context itself."""
        self._topology = topology
        return self

    def with_execution_mode(self, mode: str) -> PipelineContext:
        """Set the mode; returns the context itself."""
        self._execution_mode = mode
        return self

    def with_event_sink(self, emitter: Emitter) -> PipelineContext:
        """Set where events go; returns the context itself."""
        self._emitter = emitter
        return self

    def with_service(self, service: str) -> PipelineContext:
        """Set the service's name; returns the context itself."""
        self.service = service
        return self

    def pipeline_run_id(self) -> str | None:
        """Id of the run."""
        return self.run_id.pipeline_run_id

    def request_id(self) -> str | None:
        """Id of the request the run answers."""
        return self.run_id.request_id

    def execution_mode(self) -> str:
        """For example "production"."""
        return self._execution_mode

    def topology(self) -> str | None:
        """Name of the graph."""
        return self._topology

    @property
    def enrichments(self) -> dict[str, Any]:
        """A copy of the enrichments."""
        with self._lock:
            return dict(self._enrichments)

    def set_enrichment(self, key: str, value: Any) -> None:
        """Add or replace one enrichment."""
        with self._lock:
            self._enrichments[key] = value

    def mark_cancelled(self, reason: str = "cancelled") -> bool:
        """Ask the run, and every run forked from it, to stop. The first reason wins; True if this was the first."""
        return self.token.cancel(reason)

    def mark_cancelled_with_reason(self, reason: str) -> bool:
        """The same as `mark_cancelled(reason)`."""
        return self.token.cancel(reason)

    def is_cancelled(self) -> bool:
        """True once this run, or one above it, was asked to stop."""
        return self.token.cancelled

    def cancel_reason(self) -> str | None:
        """Why, or None."""
        return self.token.reason

    def fork_for_subpipeline(self, child_run_id: RunIdentity | str | None = None) -> PipelineContext:
        """The context of a child run: same topology, mode, emitter and service; bags of its own.

        Enrichments are copied. Cancelling this context cancels the child, never the reverse. A string (or nothing: a
        fresh id) replaces the run id and keeps the other ids.
        """
        if not isinstance(child_run_id, RunIdentity):
            ids = self.run_id.to_dict()
            ids["pipeline_run_id"] = child_run_id or new_run_id()
            child_run_id = RunIdentity(**ids)
        return PipelineContext(
            child_run_id,
            topology=self._topology,
            execution_mode=self._execution_mode,
            emitter=self._emitter,
            service=self.service,
            token=self.token.child(),
            enrichments=self.enrichments,
            parent=self,
        )

    @property
    def emits(self) -> bool:
        """Whether events go anywhere."""
        return self._emitter is not None

    def try_emit_event(self, type: str, data: Any = None) -> None:
        """Emit an event. Never raises.

        Mapping data gains `pipeline_run_id`, `execution_mode` and, where known, `request_id` and `topology`, which
        replace keys of the same name; other data passes as it is.
        """
        if self._emitter is None:
            return
        if data is None or isinstance(data, Mapping):
            data = {**(data or {}), "pipeline_run_id": self.pipeline_run_id(), "execution_mode": self._execution_mode}
            for name, value in (("request_id", self.request_id()), ("topology", self._topology)):
                if value is not None:
                    data[name] = value
        try:
            self._emitter(type, data)
        except Exception:
            _log.exception("the event %r could not be emitted", type)


class DictContextAdapter:
    """An `ExecutionContext` over a plain mapping, for code outside a pipeline. An id that is no string is None."""

    __slots__ = ("_data",)

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        self._data: Mapping[str, Any] = data if data is not None else {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        return self._data.get(key, default)

    def get_string(self, key: str) -> str | None:
        """The value if it is a string."""
        value = self._data.get(key)
        return value if isinstance(value, str) else None

    def pipeline_run_id(self) -> str | None:
        """Key `pipeline_run_id`."""
        return self.get_string("pipeline_run_id")

    def request_id(self) -> str | None:
        """Key `request_id`."""
        return self.get_string("request_id")

    def execution_mode(self) -> str:
        """Key `execution_mode`, else "production"."""
        return self.get_string("execution_mode") or PRODUCTION

    def topology(self) -> str | None:
        """Key `topology`."""
        return self.get_string("topology")

    def is_cancelled(self) -> bool:
        """Key `cancelled`, if it is True."""
        return self._data.get("cancelled") is True

    def try_emit_event(self, type: str, data: Any = None) -> None:
        """Write the event to the debug log."""
        _log.debug("event %s: %r", type, data)
