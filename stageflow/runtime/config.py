"""The configuration of an engine: one frozen struct, defaults with units and reasons."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import FailureMode, Lane
from stageflow.pipeline.names import did_you_mean
from stageflow.pipeline.policies import parse_size

#: environment variable -> field
ENVIRONMENT: Final[Mapping[str, str]] = {
    "STAGEFLOW_PROCESSES": "processes",
    "STAGEFLOW_THREADS": "threads",
    "STAGEFLOW_MEMORY_LIMIT": "memory_limit",
    "STAGEFLOW_LANE": "lane",
    "STAGEFLOW_START_METHOD": "start_method",
}
_START_METHODS: Final = ("forkserver", "spawn")
#: attempts at once on the loop, per run
ASYNC_SLOTS: Final = 1024


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine works. Everything has a default; the STAGEFLOW_* variables override what the code says."""

    #: worker processes; None = the cores this process may use (affinity and cgroup quota)
    processes: int | None = None
    #: threads of the thread lane
    threads: int = 32
    #: "forkserver" (our own fork server; POSIX) or "spawn"; None = the best of the platform
    start_method: str | None = None
    #: live values: bytes, "4GiB", or a fraction of the memory this process may use
    memory_limit: int | float | str = 0.6
    #: shares of the machine's or container's memory at which less and less is started
    #: (`stageflow.scheduler.backpressure.Ladder`; None = its defaults)
    ladder: Any = None
    #: further policies: each is asked before a task starts or a source is pulled, and answers None or why to wait
    backpressure: tuple[Callable[[Any], str | None], ...] = ()
    #: lower the threads and async attempts at once where it is measured that fewer do as well (loop lag, one busy
    #: interpreter, CPU quota, descriptors), raise them again where more do more
    adaptive: bool = True
    #: seconds between thread switches (`sys.setswitchinterval`) while runs with thread stages are active, so that one
    #: that computes in Python does not hold up hand-offs to workers; None = leave it alone
    switch_interval: float | None = 0.0005
    #: runs at once in `stream`; None = twice the worker processes, at least 8
    max_in_flight: int | None = None
    #: bytes up to which a value travels in the frame: below, shared memory costs more than the copy
    inline_threshold: int = 65536
    #: kind -> lane, where the operator knows better than the table
    placement: dict[str, str] = {}
    #: what a failure does to its run, where the stage does not say
    failure_mode: FailureMode = FailureMode.FAIL_FAST
    #: seconds between asking an attempt to stop and stopping it by force
    grace: float = 5.0
    #: anonymous memory (RssAnon) at which a worker is replaced; None = by growth only
    worker_memory_limit: int | str | None = None
    #: where idempotent results live: a store, a path of a SQLite file, or None = in memory
    store: Any = None
    #: receive the events of every run
    event_sinks: tuple[Any, ...] = ()
    #: name -> factory of a worker-scoped resource (`ctx.resource`)
    resources: dict[str, Callable[[], Any]] = {}
    #: name -> how many there are (`Resources(tokens={...})` takes them)
    tokens: dict[str, int] = {}
    #: one lane for every stage, e.g. "inline" for debugging
    lane: str | None = None
    #: worker deaths on one task after which it is given up
    poison_limit: int = 3
    #: calls after which a worker is replaced; None = never by count
    max_tasks_per_child: int | None = None
    #: seconds after which an idle worker retires; None = never
    idle_timeout: float | None = 60.0
    #: check what a stage returns against its return annotation (`contract=` is checked in any case)
    check_annotations: bool = True
    #: give every stage copies of its own of its inputs, which else are borrowed (`isolate=` of a stage)
    isolate: bool = False
    #: sees each event before any sink; returns it, another, or None to drop it
    redact: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        _check_count("processes", self.processes)
        _check_count("threads", self.threads)
        _check_count("max_in_flight", self.max_in_flight)
        _check_count("max_tasks_per_child", self.max_tasks_per_child)
        _check_count("poison_limit", self.poison_limit)
        if self.start_method is not None and self.start_method not in _START_METHODS:
            raise _wrong("start_method", self.start_method, "'forkserver' or 'spawn'")
        grace: Any = self.grace  # a frozen Struct checks no types: anything may be in it
        if not isinstance(grace, int | float) or isinstance(grace, bool) or grace < 0:
            raise _wrong("grace", grace, "seconds, 0 or more")
        interval: Any = self.switch_interval
        if interval is not None and (
            not isinstance(interval, int | float) or isinstance(interval, bool) or interval <= 0
        ):
            raise _wrong("switch_interval", interval, "seconds above 0, or None")
        if self.lane is not None:
            _check_lane("lane", self.lane)
        for kind, lane in self.placement.items():
            _check_lane(f"placement[{kind!r}]", lane)
        try:
            msgspec.structs.force_setattr(self, "failure_mode", FailureMode(self.failure_mode))
        except ValueError:
            raise _wrong("failure_mode", self.failure_mode, f"one of {', '.join(FailureMode)}") from None
        limit = self.memory_limit
        if isinstance(limit, float):
            if not 0 < limit <= 1:
                raise _wrong("memory_limit", limit, "bytes, a size such as '4GiB', or a fraction above 0 up to 1.0")
        else:
            parse_size(limit)
        if self.worker_memory_limit is not None:
            parse_size(self.worker_memory_limit)
        msgspec.structs.force_setattr(self, "event_sinks", tuple(self.event_sinks))

    @classmethod
    def make(cls, **fields: Any) -> EngineConfig:
        """A configuration from keywords; an unknown one is a DefinitionError with the nearest name."""
        for name in fields:
            if name not in cls.__struct_fields__:
                raise DefinitionError(
                    f"there is no engine setting {name!r}",
                    hint=did_you_mean(name, cls.__struct_fields__, what="Settings"),
                    setting=name,
                )
        return cls.from_environment(os.environ, **fields)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **fields: Any) -> EngineConfig:
        """The defaults, overridden by `fields` (the author's), overridden by STAGEFLOW_* variables (the operator's)."""
        return cls(**{**fields, **_given(environment)})

    def overridden(self, environment: Mapping[str, str]) -> EngineConfig:
        """This configuration with the STAGEFLOW_* variables applied."""
        given = _given(environment)
        return msgspec.structs.replace(self, **given) if given else self

    def memory_bytes(self, usable: int) -> int:
        """`memory_limit` in bytes, of `usable` bytes of memory."""
        limit = self.memory_limit
        return int(limit * usable) if isinstance(limit, float) else parse_size(limit)


def _given(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the STAGEFLOW_* variables say; DefinitionError for one that cannot be."""
    return {
        name: _from_text(variable, name, text)
        for variable, name in ENVIRONMENT.items()
        if (text := environment.get(variable))
    }


def _from_text(variable: str, name: str, text: str) -> Any:
    try:
        if name in ("processes", "threads"):
            number = int(text)
            if number < 1:
                raise ValueError
            return number
        if name == "memory_limit":
            try:
                as_number = float(text)
            except ValueError:
                parse_size(text)
                return text
            if 0 < as_number <= 1 and ("." in text):
                return as_number
            if as_number < 1 or as_number != int(as_number):
                raise ValueError
            return int(as_number)
        if name == "lane":
            return str(Lane(text))
        if text not in _START_METHODS:
            raise ValueError
        return text
    except (ValueError, DefinitionError):
        wants = {
            "processes": "a whole number from 1",
            "threads": "a whole number from 1",
            "memory_limit": "bytes, a size such as 4GiB, or a fraction such as 0.5",
            "lane": f"one of {', '.join(Lane)}",
            "start_method": "forkserver or spawn",
        }[name]
        raise DefinitionError(
            f"the environment variable {variable} is {text!r}, which is not {wants}",
            hint=f"set {variable} to {wants}, or unset it",
            variable=variable,
        ) from None


def _wrong(field: str, got: object, want: str) -> DefinitionError:
    return DefinitionError(f"engine setting {field} is {got!r}", hint=f"give {want}", field=field)


def _check_count(field: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise _wrong(field, value, "a whole number from 1")


def _check_lane(field: str, lane: object) -> None:
    if lane not in tuple(Lane):
        near = did_you_mean(str(lane), [str(one) for one in Lane], what="Lanes")
        raise DefinitionError(f"engine setting {field}: there is no lane {lane!r}", hint=near, field=field)
