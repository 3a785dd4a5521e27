"""One tree of errors, sorted by whose fault it is.

`DefinitionError` (yours, at build or call) · `StageFailedError` (the stage's) · `ResourceError` (outside) ·
`InvariantError` (ours).
Every error has a stable `code`, a `hint` that says what to do, and fields as attributes; every error pickles with all
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import msgspec


def _rebuild(cls: type[StageflowError], args: tuple[Any, ...], state: dict[str, Any]) -> StageflowError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class StageflowError(Exception):
    """Base of every error of Stageflow.

    `message` is one sentence of what happened and where; `hint` is what to do about it; further keywords become
    attributes.
    """

    code: ClassVar[str] = "SF-ERROR"

    def __init__(self, message: str = "", *, hint: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only constructors do not unpickle by themselves; __cause__ is not pickled and is re-attached by the
        # lanes.
        return _rebuild, (type(self), self.args, dict(self.__dict__))

    def to_dict(self) -> dict[str, Any]:
        """Code, type, message, hint and fields, for JSON."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            **self.fields,
        }


# ---------------------------------------------------------------- yours: a mistake in the definition or the call


class DefinitionError(StageflowError):
    """The pipeline, a configuration or a call is wrong. Nothing has run."""

    code = "SF-DEFINITION"


class ContractErrorInfo(msgspec.Struct, frozen=True, omit_defaults=False):
    """One problem as data: a stable code, what is wrong, and how to mend it."""

    code: str
    summary: str
    fix_hint: str | None = None
    doc_url: str | None = None
    context: dict[str, Any] = {}

    def with_fix_hint(self, fix_hint: str) -> ContractErrorInfo:
        """A copy with another hint."""
        return msgspec.structs.replace(self, fix_hint=fix_hint)

    def with_doc_url(self, doc_url: str) -> ContractErrorInfo:
        """A copy with another link."""
        return msgspec.structs.replace(self, doc_url=doc_url)

    def with_context(self, key: str, value: Any) -> ContractErrorInfo:
        """A copy with one more context entry."""
        return self.merge_context({key: value})

    def merge_context(self, extra: Mapping[str, Any]) -> ContractErrorInfo:
        """A copy with more context; `extra` wins."""
        return msgspec.structs.replace(self, context={**self.context, **extra})

    def to_dict(self) -> dict[str, Any]:
        """All five keys, null where absent."""
        return msgspec.structs.asdict(self)


class PipelineValidationError(DefinitionError):
    """A pipeline that cannot be built; `problems` has every problem found, not only the first."""

    code = "CONTRACT-001-VALIDATION"

    def __init__(
        self,
        message: str = "",
        *,
        problems: Iterable[ContractErrorInfo] = (),
        stages: Iterable[str] = (),
        hint: str | None = None,
        pipeline: str | None = None,
    ) -> None:
        listed = tuple(problems)
        if not message:
            where = f" of pipeline {pipeline!r}" if pipeline else ""
            count = f"{len(listed)} problem{'s' if len(listed) != 1 else ''} in the definition{where}"
            lines = [f"{count}:"]
            for problem in listed:
                lines.append(f"  [{problem.code}] {problem.summary}")
                if problem.fix_hint:
                    lines.append(f"      -> {problem.fix_hint}")
            message = "\n".join(lines)
        super().__init__(message, hint=hint)
        self.problems = listed
        self.pipeline = pipeline
        self.stages = tuple(stages) or tuple(
            dict.fromkeys(name for problem in listed for name in problem.context.get("stages", ()))
        )

    @property
    def error_info(self) -> ContractErrorInfo | None:
        """The first problem."""
        return self.problems[0] if self.problems else None

    @property
    def codes(self) -> tuple[str, ...]:
        """The code of every problem, in order."""
        return tuple(problem.code for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Message, stages, and the problems."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "stages": list(self.stages),
            "error_info": self.error_info.to_dict() if self.error_info else None,
            "problems": [problem.to_dict() for problem in self.problems],
        }


class UndeclaredDependencyError(DefinitionError):
    """A stage read the output of a stage it does not declare (fields `stage`, `key`)."""

    code = "SF-UNDECLARED-DEPENDENCY"


class DataConflictError(DefinitionError):
    """A context bag already holds `key`."""

    code = "SF-DATA-CONFLICT"


class OutputConflictError(DefinitionError):
    """A final output of `stage` was written twice."""

    code = "SF-OUTPUT-CONFLICT"


class NotShippableError(DefinitionError):
    """A callable or value cannot cross a process boundary; `path` says which part of it."""

    code = "SF-NOT-SHIPPABLE"


class IdempotencyMismatchError(DefinitionError):
    """An idempotency key was used before with other parameters (fields `key`, `expected`, `actual`)."""

    code = "SF-IDEMPOTENCY-MISMATCH"


class ContractViolationError(DefinitionError):
    """A value left a stage that does not fit its contract; `path` names the offending field."""

    code = "CONTRACT-002-SCHEMA"


# ---------------------------------------------------------------- the stage's


class StageFailedError(StageflowError):
    """A stage ended FAIL. `__cause__` is its own exception where that could travel (fields `stage`, `attempts`,
    `error_info`)."""

    code = "SF-STAGE-FAILED"


class StageCancelledError(StageflowError):
    """Raised by `ctx.raise_if_cancelled()`; an attempt that lets it pass ends CANCEL, not FAIL."""

    code = "SF-CANCELLED"


# ---------------------------------------------------------------- outside


class ResourceError(StageflowError):
    """Something outside the pipeline failed: a process, memory, time."""

    code = "SF-RESOURCE"


class WorkerDiedError(ResourceError):
    """A worker process was lost while it ran the attempt.

    Fields: `worker_pid`, `signal` (int or None), `exit_code` (int or None), `oom_killed` (True when the kernel's
    out-of-memory counter moved, or the engine ended it before memory ran out), `rss_bytes` (last seen), `stderr_tail`.
    """

    code = "SF-WORKER-DIED"


class WorkerStartError(ResourceError):
    """No worker process could be started; `reason` has what the fork server or the worker said."""

    code = "SF-WORKER-START"


class SharedMemoryFullError(ResourceError):
    """`needed` bytes of shared memory were not free. Nothing was written."""

    code = "SF-SHM-FULL"


class StageTimeoutError(ResourceError):
    """An attempt, a stage or a run took too long (fields `elapsed`, `limit` in seconds, `abandoned` for a thread that
    went on)."""

    code = "SF-TIMEOUT"


class CollectTooLargeError(ResourceError):
    """A stage behind a map would collect more than the memory budget, and spilling is off."""

    code = "SF-COLLECT-TOO-LARGE"


class LaneClosedError(ResourceError):
    """The executor or engine was closed before the call could finish."""

    code = "SF-LANE-CLOSED"


class CircuitOpenError(ResourceError):
    """A circuit breaker refused the attempt."""

    code = "SF-CIRCUIT-OPEN"


class NoProgressError(ResourceError):
    """Nothing runs, nothing can start, and the run is not finished; `waits` names who waits for whom."""

    code = "SF-NO-PROGRESS"


# ---------------------------------------------------------------- ours


class InvariantError(StageflowError):
    """The engine's books do not balance: a bug of Stageflow. Please report it with the text of this error."""

    code = "SF-INVARIANT"
