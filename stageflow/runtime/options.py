"""What applies to one run only: its keywords, and the snapshot it starts with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.cancellation import CancellationToken
from stageflow.context.identity import RunIdentity, new_run_id
from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import FailureMode
from stageflow.pipeline.names import did_you_mean
from stageflow.runtime.config import EngineConfig

if TYPE_CHECKING:
    from stageflow.context.pipeline_context import PipelineContext
    from stageflow.pipeline.graph import StageGraph

RUN_KEYS: Final = ("failure_mode", "token", "timeout", "max_in_flight", "event_sinks", "metadata", "seed")


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What applies to one run only."""

    failure_mode: FailureMode | None = None
    token: CancellationToken | None = None
    timeout: float | None = None
    max_in_flight: int | None = None
    event_sinks: tuple[Any, ...] = ()
    metadata: dict[str, Any] = {}
    seed: int | None = None
    about: dict[str, str] = {}  #: service, topology and execution mode of the context it was started with

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> RunOptions:
        """From keywords; DefinitionError for a value that cannot be."""
        made = dict(options)
        mode = made.get("failure_mode")
        if mode is not None:
            try:
                made["failure_mode"] = FailureMode(mode)
            except ValueError:
                raise DefinitionError(
                    f"failure_mode is {mode!r}", hint=f"give one of {', '.join(FailureMode)}", field="failure_mode"
                ) from None
        timeout = made.get("timeout")
        if timeout is not None and (not isinstance(timeout, int | float) or timeout <= 0):
            raise DefinitionError(f"timeout is {timeout!r}", hint="give seconds above 0", field="timeout")
        made["event_sinks"] = tuple(made.get("event_sinks") or ())
        made["metadata"] = dict(made.get("metadata") or {})
        return cls(**made)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of `run` apart: of the run, and of a private engine. Unknown ones are a DefinitionError."""
    of_run: dict[str, Any] = {}
    of_engine: dict[str, Any] = {}
    for name, value in options.items():
        if name in RUN_KEYS:
            of_run[name] = value
        elif name in EngineConfig.__struct_fields__:
            of_engine[name] = value
        else:
            known = (*RUN_KEYS, *EngineConfig.__struct_fields__)
            raise DefinitionError(
                f"run() has no option {name!r}", hint=did_you_mean(name, known, what="Options"), option=name
            )
    return of_run, of_engine


def only_run_keys(options: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in options:
        if name not in RUN_KEYS:
            if name in EngineConfig.__struct_fields__:
                raise DefinitionError(
                    f"{name!r} is a setting of an engine, and this engine is made already",
                    hint=f"give it to Engine({name}=...)",
                    option=name,
                )
            raise DefinitionError(
                f"a run has no option {name!r}", hint=did_you_mean(name, RUN_KEYS, what="Options"), option=name
            )
    return options


def snapshot_of(
    graph: StageGraph, inputs: Mapping[str, Any] | None, snapshot: ContextSnapshot | None, options: RunOptions
) -> ContextSnapshot:
    """The snapshot of a run: inputs merged in, an id given, required inputs checked."""
    made = snapshot if snapshot is not None else ContextSnapshot()
    if inputs:
        made = made.with_inputs(inputs)
    if options.metadata:
        made = msgspec.structs.replace(made, metadata={**made.metadata, **options.metadata})
    if made.run_id.pipeline_run_id is None:
        identity: RunIdentity = msgspec.structs.replace(made.run_id, pipeline_run_id=new_run_id())
        made = made.with_run_id(identity)
    if graph.inputs:
        _check_inputs(graph, made.inputs)
    return made


def _check_inputs(graph: StageGraph, given: Mapping[str, Any]) -> None:
    missing = [name for name in graph.inputs if name not in given]
    if not missing:
        return
    name = missing[0]
    users = []
    for spec in graph.specs:
        if spec.over_input == name:
            users.append(f"stage {spec.name!r} goes over it")
        users.extend(
            f"parameter {binding.param!r} of stage {spec.name!r}"
            for binding in spec.bindings
            if binding.source == "input" and binding.ref == name
        )
    near = did_you_mean(name, [*given, *graph.index], what="Given inputs and stages")
    others = f"; also missing: {', '.join(map(repr, missing[1:]))}" if len(missing) > 1 else ""
    raise DefinitionError(
        f"pipeline {graph.name!r} needs the input {name!r} ({'; '.join(users[:3]) or 'declared'}){others}",
        hint=f"give it as run({{{name!r}: ...}}), or name a stage {name!r}. {near}",
        input=name,
        missing=tuple(missing),
    )


def from_context(
    ctx: PipelineContext, snapshot: ContextSnapshot | None, options: RunOptions
) -> tuple[ContextSnapshot, RunOptions]:
    """A run started with a PipelineContext has its identity, is cancelled with it, and emits its events there."""
    made = snapshot if snapshot is not None else ContextSnapshot()
    if made.run_id.pipeline_run_id is None:
        made = made.with_run_id(ctx.run_id)
    token = getattr(ctx, "token", None)
    if options.token is None and isinstance(token, CancellationToken):
        options = msgspec.structs.replace(options, token=token)
    if ctx.emits:
        from stageflow.runtime.handles import ContextSink

        options = msgspec.structs.replace(options, event_sinks=(*options.event_sinks, ContextSink(ctx)))
    said = {"service": ctx.service, "topology": ctx.topology(), "execution_mode": ctx.execution_mode()}
    about = {name: str(value) for name, value in said.items() if value}
    return made, msgspec.structs.replace(options, about=about)
