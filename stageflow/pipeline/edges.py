"""Checks each edge whose two ends are annotated: what one stage returns against what the next one takes."""

from __future__ import annotations

import collections.abc as abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stageflow.core.kinds import Drop
from stageflow.pipeline.problems import Problems
from stageflow.pipeline.signatures import UNKNOWN
from stageflow.pipeline.spec import Binding, Role, StageSpec
from stageflow.pipeline.types import describe, element_of, mismatch, value_of

if TYPE_CHECKING:
    from stageflow.pipeline.compile import Declared

_ITERABLE = abc.Iterable[Any]


def given_by(stage: Declared, spec: StageSpec) -> Any:
    """What a stage gives: its value, or one element of it for a source or map. UNKNOWN where nothing says."""
    returns = stage.traits.returns
    if spec.policies.contract is not None:
        return spec.policies.contract  # checked at run time, so it holds whatever the annotation says
    value = value_of(returns, is_generator=stage.traits.is_generator)
    if spec.role is Role.MAP and spec.policies.batch is not None and not stage.traits.is_generator:
        return value_of(element_of(value))
    return UNKNOWN if value is Drop else value


def check_edges(
    stages: Sequence[Declared],
    specs: Sequence[StageSpec],
    order: Sequence[int],
    joins: Mapping[int, tuple[int, ...]],
    declared_inputs: Mapping[str, Any] | None,
    problems: Problems,
) -> None:
    """Note every certain mismatch. Equal pairs of runners are compared once."""
    seen: dict[tuple[Any, ...], str | None] = {}
    for i in order:  # a stage on a cycle has no place in it, and no joins to tell
        spec = specs[i]
        if not spec.bindings:
            continue
        parameters = stages[i].traits.parameters
        wanted_of = {p.name: p.annotation for p in parameters} if parameters else {}
        if spec.form == "graph":
            wanted_of = {**spec.runner.optional_inputs, **spec.runner.inputs}
        for binding in spec.bindings:
            wanted = wanted_of.get(binding.param, UNKNOWN)
            source = _source(i, binding, spec)
            if source is None:
                _check_input(spec, binding, wanted, declared_inputs, problems)
                continue
            whole = binding.source == "stage" and source not in joins.get(i, ())
            producer = specs[source]
            key = (
                id(stages[source].traits),
                id(producer.policies),
                producer.role,
                id(stages[i].traits),
                spec.policies.batch,
                binding.param,
                whole,
            )
            if key not in seen:
                seen[key] = _wrong(stages[source], producer, spec, wanted, whole, binding)
            if (wrong := seen[key]) is not None:
                problems.add(
                    "TYPE",
                    f"stage {spec.name!r}: parameter {binding.param!r} {wrong.replace('{}', repr(producer.name))}",
                    "Change one of the two annotations"
                    + (
                        f", or rename the parameter: it is bound to stage {producer.name!r} by its name."
                        if binding.by_name
                        else "."
                    ),
                    stages=(producer.name, spec.name),
                    parameter=binding.param,
                )


def _source(i: int, binding: Binding, spec: StageSpec) -> int | None:
    if binding.source == "stage" and isinstance(binding.ref, int):
        return binding.ref
    return spec.over if binding.source == "element" and spec.over >= 0 else None


def _wrong(
    stage: Declared, producer: StageSpec, consumer: StageSpec, wanted: Any, whole: bool, binding: Binding
) -> str | None:
    given = given_by(stage, producer)
    stream = producer.role in (Role.MAP, Role.SOURCE)
    if binding.source == "element":
        if not stream:
            if mismatch(given, _ITERABLE):
                return f"takes the elements of {{}}, which returns {describe(given)}: that has no elements"
            given = element_of(given)
        if consumer.policies.batch is not None and consumer.role in (Role.MAP, Role.SINK):
            if wanted is not UNKNOWN and mismatch(list[Any], wanted):
                return f"is annotated {describe(wanted)}, but batch= hands it a list of elements of {{}}"
            wanted = element_of(wanted)
    elif whole and stream:
        if wanted is not UNKNOWN and mismatch(abc.Sequence[Any], wanted):
            return f"is annotated {describe(wanted)}, but gets the whole sequence of the elements of {{}}"
        wanted = element_of(wanted)
    if given is UNKNOWN or wanted is UNKNOWN or wanted is None or not mismatch(given, wanted):
        return None
    what = "whose elements are" if stream or binding.source == "element" else "which returns"
    return f"is annotated {describe(wanted)}, but is bound to {{}}, {what} {describe(given)}"


def _check_input(
    spec: StageSpec, binding: Binding, wanted: Any, declared: Mapping[str, Any] | None, problems: Problems
) -> None:
    if declared is None or binding.source not in ("input", "element"):
        return
    key = binding.ref if binding.source == "input" else spec.over_input
    given = declared.get(key) if isinstance(key, str) else None
    if given is None or wanted is UNKNOWN or wanted is None:
        return
    if binding.source == "element":
        given = element_of(given)
        if spec.policies.batch is not None and spec.role in (Role.MAP, Role.SINK):
            wanted = element_of(wanted)
    if given is not UNKNOWN and wanted is not UNKNOWN and mismatch(given, wanted):
        problems.add(
            "TYPE",
            f"stage {spec.name!r}: parameter {binding.param!r} is annotated {describe(wanted)}, "
            f"but input {key!r} is declared {describe(given)}",
            "Change one of the two annotations.",
            stages=(spec.name,),
            parameter=binding.param,
        )
