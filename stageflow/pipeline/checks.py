"""Which type the values of a stage are checked against as they leave it: `contract=`, else the return annotation."""

from __future__ import annotations

from typing import Any

from stageflow.core.kinds import SURE, Drop
from stageflow.pipeline.signatures import UNKNOWN, annotations_of
from stageflow.pipeline.spec import Role, StageSpec
from stageflow.pipeline.types import element_of, value_of


def checked_annotation(spec: StageSpec) -> Any:
    """The type that each value (of a map or source: each element) must be of by the stage's return annotation.

    None where there is nothing to check: a `contract=` says it instead, nothing is kept, nothing is annotated, or the
    annotation admits every value, is a StageOutput, or is beyond what can be checked.
    """
    if spec.policies.contract is not None or spec.form == "graph" or spec.role is Role.SINK:
        return None
    runner = spec.runner.execute if spec.form in ("object", "class") else spec.runner
    given = value_of(annotations_of(runner).get("return", UNKNOWN), is_generator=spec.is_generator)
    if spec.role is Role.MAP and spec.policies.batch is not None and not spec.is_generator:
        given = value_of(element_of(given))
    if given is UNKNOWN or given is Drop:
        return None
    if type(given) is type and given in SURE:
        return given
    from stageflow.contracts.checker import checker_for

    return None if checker_for(given) is None else given
