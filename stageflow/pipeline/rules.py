"""What `when=` and `guard_retry=` refer to: resolved to numbers, or reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stageflow.core.kinds import StageKind
from stageflow.pipeline.names import did_you_mean
from stageflow.pipeline.policies import DEFAULT_POLICIES
from stageflow.pipeline.problems import Problems
from stageflow.pipeline.spec import Role, StageSpec

Edges = Sequence[tuple[int, ...]]


def resolve_routes(
    specs: Sequence[StageSpec], deps: Edges, index: Mapping[str, int], problems: Problems
) -> dict[int, tuple[int, str]]:
    """Stage -> (its router, the branch it belongs to), for every `when` that names one."""
    routes: dict[int, tuple[int, str]] = {}
    for i, spec in enumerate(specs):
        when = spec.policies.when
        if when is None or spec.policies is DEFAULT_POLICIES or callable(when):
            continue
        router = _router(i, spec, specs, deps, index, problems)
        if router is not None:
            routes[i] = (router, when[1] if isinstance(when, tuple) else when)
    return routes


def _router(
    i: int, spec: StageSpec, specs: Sequence[StageSpec], deps: Edges, index: Mapping[str, int], problems: Problems
) -> int | None:
    when, where = spec.policies.when, f"stage {spec.name!r}: when={spec.policies.when!r}"
    if isinstance(when, tuple):
        found = index.get(when[0])
        if found is None:
            return None  # reported as a missing dependency
        if specs[found].kind is StageKind.ROUTE and specs[found].role is Role.TASK:
            return found
        problems.add(
            "ROUTE",
            f"{where} names {when[0]!r} as router, which is no ROUTE stage",
            f"Declare {when[0]!r} with .stage(..., kind=StageKind.ROUTE).",
            stages=(spec.name, when[0]),
        )
        return None
    routers = [j for j in deps[i] if specs[j].kind is StageKind.ROUTE and specs[j].role is Role.TASK]
    if len(routers) == 1:
        return routers[0]
    names = [specs[j].name for j in routers]
    if not routers:
        every = [one.name for one in specs if one.kind is StageKind.ROUTE][:3]
        hint = (
            f"Add after={every[0]!r}."
            if every
            else "Declare the stage that decides with kind=StageKind.ROUTE, and put it in after=."
        )
        problems.add("ROUTE", f"{where}, but no ROUTE stage is directly before it", hint, stages=(spec.name,))
    else:
        hint = f"Say which: when=({names[0]!r}, {when!r})."
        problems.add("ROUTE", f"{where} could mean any of {', '.join(names)}", hint, stages=(spec.name, *names))
    return None


def check_guards(
    specs: Sequence[StageSpec], deps: Edges, dependents: Edges, index: Mapping[str, int], problems: Problems
) -> dict[int, tuple[int, ...]]:
    """Guard -> the stages that run again when it fails: the retried one, those between, and the guard."""
    paths: dict[int, tuple[int, ...]] = {}
    for i, spec in enumerate(specs):
        policy = None if spec.policies is DEFAULT_POLICIES else spec.policies.guard_retry
        if policy is None:
            continue
        wrong = _guard_problem(spec, policy.retry_stage, index)
        if wrong is None:
            path = _path(index[policy.retry_stage], i, deps, dependents)
            if path is None:
                wrong = (
                    f"retry_stage {policy.retry_stage!r} is not upstream of the guard",
                    "Name a stage whose value reaches the guard.",
                )
            elif off := [specs[j].name for j in path if specs[j].role is not Role.TASK]:
                wrong = (
                    f"the path from {policy.retry_stage!r} to the guard holds {', '.join(off)}, which are no tasks",
                    "Only stages that run once per run can run again; retry one behind it.",
                )
            else:
                paths[i] = path
        if wrong is not None:
            problems.add("GUARD", f"guard_retry of stage {spec.name!r}: {wrong[0]}", wrong[1], stages=(spec.name,))
    return paths


def _guard_problem(spec: StageSpec, retry_stage: str, index: Mapping[str, int]) -> tuple[str, str] | None:
    if spec.kind is not StageKind.GUARD:
        return f"its kind is {spec.kind}, not guard", "Declare it with kind=StageKind.GUARD."
    if retry_stage == spec.name:
        return "a guard cannot retry itself", "Name the stage that makes what the guard checks; for itself use retry=."
    if retry_stage not in index:
        hint = did_you_mean(retry_stage, (name for name in index if name != spec.name), what="Stages")
        return f"there is no stage {retry_stage!r}", hint
    return None


def _path(start: int, end: int, deps: Edges, dependents: Edges) -> tuple[int, ...] | None:
    """Every stage on a way from `start` to `end`, start first and end last, each after its dependencies."""
    above = _reach(end, deps)
    if start not in above:
        return None
    between = above & _reach(start, dependents)
    ordered: list[int] = []
    missing = {j: sum(1 for k in deps[j] if k in between) for j in between}
    ready = [start]
    while ready:
        j = ready.pop()
        ordered.append(j)
        for k in dependents[j]:
            if k in between:
                missing[k] -= 1
                if not missing[k]:
                    ready.append(k)
    return tuple(ordered) if len(ordered) == len(between) else None  # None: a cycle, which is reported as such


def _reach(start: int, edges: Edges) -> set[int]:
    seen = {start}
    waiting = [start]
    while waiting:
        for j in edges[waiting.pop()]:
            if j not in seen:
                seen.add(j)
                waiting.append(j)
    return seen
