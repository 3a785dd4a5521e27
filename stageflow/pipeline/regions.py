"""Regions: neighbouring element-wise process stages that may run back to back in one worker.

Only what goes into a region and what comes out of it crosses between processes. The first stage may take its elements
in batches: the region then begins with one. The last may have a retry policy or a timeout: the value that it was given
comes back with a failure, so its next attempts are its own. Whatever else acts around an attempt (idempotency, guards,
limits) sees single stages, so a stage with any of it stays by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stageflow.core.kinds import StageKind
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import Role, StageSpec

#: policies that do not keep a stage from being fused
HARMLESS: Final = frozenset({"executor", "keep", "fuse", "spill"})
#: nor from being the first of a region
FIRST: Final = HARMLESS | {"batch", "batch_seconds"}
#: nor from being its last
LAST: Final = HARMLESS | {"retry", "timeout", "contract"}


def find_regions(graph: StageGraph, lanes: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """Head -> all members in order, for every region of two stages or more."""
    guarded = {stage for path in graph.guard_paths.values() for stage in path}
    inside: set[int] = set()
    found: dict[int, tuple[int, ...]] = {}
    for i in graph.order:
        if i in inside or lanes[i] != "process" or i in guarded or not _plain(graph, i, FIRST):
            continue
        members = [i]
        while (follower := _follower(graph, members[-1])) is not None:
            if lanes[follower] != "process" or follower in guarded or not _plain(graph, follower, LAST):
                break
            if graph.specs[follower].policies.timeout is not None and graph.specs[i].policies.batch is not None:
                break  # what has a timeout is called with one item
            members.append(follower)
            if not _plain(graph, follower, HARMLESS):
                break
        if len(members) > 1:
            inside.update(members)
            found[i] = tuple(members)
    return found


def _plain(graph: StageGraph, i: int, harmless: frozenset[str]) -> bool:
    """A one-to-one map with nothing but `harmless` policies."""
    spec = graph.specs[i]
    return (
        spec.role is Role.MAP
        and spec.kind is StageKind.TRANSFORM
        and spec.form != "graph"
        and not spec.is_generator
        and not spec.is_async
        and i not in graph.routes
        and not graph.joins.get(i)
        and spec.policies.fuse is not False
        and harmless.issuperset(spec.policies.changed())
    )


def _follower(graph: StageGraph, i: int) -> int | None:
    """The one stage that reads the stream `i`, if nobody else needs it and it needs nothing else."""
    if len(graph.dependents[i]) != 1 or graph.specs[i].policies.keep:
        return None
    follower = graph.dependents[i][0]
    spec = graph.specs[follower]
    if spec.over != i or tuple(graph.deps[follower]) != (i,) or i in graph.barriers.get(follower, ()):
        return None
    return follower if _only_element(spec, i) else None


def _only_element(spec: StageSpec, over: int) -> bool:
    """Whether its parameters are the element and the context, and no more."""
    return all(
        binding.source in ("element", "ctx")
        or (binding.source == "stage" and binding.ref == over)
        or binding.has_default
        for binding in spec.bindings
        if binding.source != "input"
    ) and not any(binding.source == "input" for binding in spec.bindings)
