"""The parent's own view of a stage's inputs, for predicates."""

from __future__ import annotations

from typing import Any

from stageflow.context.inputs import StageInputs
from stageflow.core.kinds import StageStatus
from stageflow.runtime.book import NOTHING
from stageflow.runtime.job import Job


def stage_inputs(job: Job, stage: int) -> StageInputs:
    """What stage `stage` would find in `ctx.inputs`."""
    graph, book = job.graph, job.book
    values: dict[str, Any] = {}
    failed: list[str] = []
    skipped: list[str] = []
    for dep in graph.deps[stage]:
        name = graph.specs[dep].name
        end = book.ends.get(dep)
        if end is not None and end.status is StageStatus.FAIL:
            failed.append(name)
        elif end is not None and end.status is StageStatus.SKIP:
            skipped.append(name)
        elif graph.streams[dep] or book.values[dep] is not NOTHING:
            values[name] = book.value(dep)
    spec = graph.specs[stage]
    return StageInputs(values, spec.declared_deps, spec.name, failed=tuple(failed), skipped=tuple(skipped))
