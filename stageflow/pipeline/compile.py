"""From what was declared to a `StageGraph`, or to every problem at once.

Loops only: a chain of a million stages is one chain.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from stageflow.core.kinds import StageKind
from stageflow.pipeline.binding import Asked, Scope, bind
from stageflow.pipeline.edges import check_edges
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.names import did_you_mean, name_problem
from stageflow.pipeline.policies import Policies
from stageflow.pipeline.problems import Problems
from stageflow.pipeline.rules import check_guards, resolve_routes
from stageflow.pipeline.signatures import UNKNOWN, Traits
from stageflow.pipeline.spaces import lay_spaces
from stageflow.pipeline.spec import Binding, ReduceSpec, Role, StageSpec


class Declared:
    """One builder call, not yet resolved."""

    __slots__ = ("after", "feeds", "inputs", "kind", "name", "over", "policies", "reduce", "role", "traits")

    def __init__(
        self,
        role: Role,
        name: str,
        traits: Traits,
        kind: StageKind | None,
        policies: Policies,
        after: tuple[str, ...],
        inputs: dict[str, str | None] | None,
        over: str | None,
        reduce: ReduceSpec | None,
        feeds: tuple[str, ...],
    ) -> None:
        self.role = role
        self.name = name
        self.traits = traits
        self.kind = kind
        self.policies = policies
        self.after = after
        self.inputs = inputs
        self.over = over
        self.reduce = reduce
        self.feeds = feeds

    def differences(self, other: Declared) -> list[str]:
        """What the two calls say differently."""
        pairs: dict[str, tuple[Any, Any]] = {
            "form": (self.role, other.role),
            "kind": (self.kind, other.kind),
            "dependencies": (set(self.after), set(other.after)),
            "over": (self.over, other.over),
            "inputs": (self.inputs or {}, other.inputs or {}),
            "policies": (self.policies, other.policies),
            "fold": (self.reduce, other.reduce),
        }
        found = [what for what, (ours, theirs) in pairs.items() if ours != theirs]
        return found if self.traits.runner is other.traits.runner else ["runners", *found]


def compile_graph(name: str, stages: Sequence[Declared], declared_inputs: Mapping[str, Any] | None) -> StageGraph:
    """Check and compile. Raises PipelineValidationError with every problem found."""
    problems = Problems()
    index = _index(name, stages, problems)
    _check_inputs(declared_inputs, index, problems)
    scope = Scope(index, declared_inputs, problems)
    numbers = list(range(len(stages)))  # one int object per stage, shared by everything that names it
    index = dict(zip(index, map(numbers.__getitem__, index.values()), strict=True))
    scope.index = index
    specs: list[StageSpec] = []
    deps: list[tuple[int, ...]] = []
    for i, stage in enumerate(stages):
        spec, upstream = _resolve(i, stage, stages, scope)
        specs.append(spec)
        deps.append(upstream)
    dependents = _dependents(deps, numbers)
    order = _order(deps, dependents)
    if len(order) < len(specs):
        _report_cycles(specs, deps, order, problems)
    routes = resolve_routes(specs, deps, index, problems)
    guard_paths = check_guards(specs, deps, dependents, index, problems)
    space, joins, barriers, streams = lay_spaces(specs, deps, order)
    check_edges(stages, specs, order, joins, declared_inputs, problems)
    problems.raise_if_any(name)
    required, optional = _inputs(scope)
    return StageGraph(
        name=name,
        specs=specs,
        index=index,
        deps=deps,
        dependents=dependents,
        depth=_depth(deps, order),
        order=order,
        inputs=required,
        optional_inputs=optional,
        inputs_declared=declared_inputs is not None,
        space=space,
        joins=joins,
        barriers=barriers,
        streams=streams,
        routes=routes,
        guard_paths=guard_paths,
    )


def _index(name: Any, stages: Sequence[Declared], problems: Problems) -> dict[str, int]:
    if not isinstance(name, str) or not name.strip():
        problems.add("BLANK", f"the pipeline's name {name!r} is blank", 'Write PipelineBuilder("name").')
    if not stages:
        problems.add("EMPTY", f"pipeline {name!r} has no stages", 'Add at least one: .stage("name", runner).')
    index: dict[str, int] = {}
    for i, stage in enumerate(stages):
        if (wrong := name_problem(stage.name)) is not None:
            problems.add("BLANK" if "blank" in wrong[0] else "NAME", wrong[0], wrong[1], stages=(str(stage.name),))
            if not _is_text(stage.name):
                continue
        if stage.name in index:
            problems.add(
                "CONFLICT",
                f"stage {stage.name!r} is declared twice (as number {index[stage.name] + 1} and {i + 1})",
                "Give one of them another name.",
                stages=(stage.name,),
            )
        else:
            index[stage.name] = i
    return index


def _is_text(name: object) -> bool:
    return isinstance(name, str)


def _check_inputs(declared: Mapping[str, Any] | None, index: Mapping[str, int], problems: Problems) -> None:
    for key in declared or ():
        if key in index:
            problems.add(
                "CONFLICT",
                f"{key!r} is both a stage and a declared input",
                "Rename one of them, so that a parameter of that name means one thing.",
                stages=(key,),
            )


def _resolve(i: int, stage: Declared, stages: Sequence[Declared], scope: Scope) -> tuple[StageSpec, tuple[int, ...]]:
    """One stage's spec and the numbers of its upstream stages."""
    traits, problems = stage.traits, scope.problems
    if traits.problem is not None:
        problems.add("RUNNER", f"stage {stage.name!r}: {traits.problem[0]}", traits.problem[1], stages=(stage.name,))
    role = Role.SOURCE if stage.role is Role.TASK and traits.is_generator else stage.role
    if role is Role.REDUCE and traits.is_generator:
        problems.add(
            "RUNNER",
            f"reduce {stage.name!r}: a generator function cannot fold",
            "Return the new accumulator instead of yielding.",
            stages=(stage.name,),
        )
    over, over_input = _over(stage, role, stages, scope)
    upstream: dict[int, None] = {} if over < 0 else {over: None}
    for name in stage.after:
        _after(name, stage.name, scope, upstream)
    bindings: tuple[Binding, ...] = ()
    lost = stage.over is not None and over < 0 and over_input is None  # reported; what follows from it is not
    if traits.problem is None and not lost:
        if traits.parameters or traits.parameters is None or stage.inputs or traits.form == "graph" or stage.over:
            asked = Asked(
                stage.name,
                role,
                after=stage.after,
                inputs=stage.inputs,
                over=stage.over,
                over_index=over,
                feeds=stage.feeds,
            )
            bindings = bind(traits, asked, scope)
            for binding in bindings:
                if binding.source == "stage" and isinstance(binding.ref, int):
                    upstream[binding.ref] = None
                    _check_readable(stage, stages[binding.ref], problems)
    if isinstance(stage.policies.when, tuple):
        _after(stage.policies.when[0], stage.name, scope, upstream)
    if isinstance(stage.policies.writable, tuple) and traits.problem is None and not lost:
        known = {binding.param for binding in bindings} | {stages[j].name for j in upstream} | {over_input or ""}
        for name in stage.policies.writable:
            if name not in known:
                problems.add(
                    "UNBOUND",
                    f"stage {stage.name!r}: writable names {name!r}, which is none of its inputs",
                    did_you_mean(name, sorted(known - {""}), what="Inputs"),
                    stages=(stage.name,),
                )
    kind, kind_declared = _kind(stage, role, problems)
    spec = StageSpec(
        stage.name,
        traits.runner,
        role,
        kind,
        traits.form,
        traits.is_async,
        traits.is_generator,
        traits.wants_ctx,
        kind_declared,
        over,
        over_input,
        bindings,
        stage.policies,
        stage.reduce,
        tuple([stages[j].name for j in upstream]) if upstream else (),
    )
    return spec, tuple(upstream)


def _after(name: str, stage: str, scope: Scope, upstream: dict[int, None]) -> None:
    found = scope.index.get(name)
    if name == stage:
        scope.problems.add(
            "SELF_DEP", f"stage {stage!r} depends on itself", f"Take {stage!r} out of its own after=.", stages=(stage,)
        )
    elif found is None:
        hint = did_you_mean(name, (known for known in scope.index if known != stage), what="Stages")
        scope.problems.add(
            "MISSING_DEP",
            f"stage {stage!r} is declared after {name!r}, but there is no such stage",
            hint or f"Add a stage called {name!r}.",
            stages=(stage, name),
        )
    else:
        upstream[found] = None


def _over(stage: Declared, role: Role, stages: Sequence[Declared], scope: Scope) -> tuple[int, str | None]:
    name = stage.over
    if name is None:
        return -1, None
    word = role.name.lower()
    found = scope.index.get(name)
    if found is not None and name != stage.name:
        if stages[found].role is Role.SINK:
            _sink_read(f"{word} {stage.name!r} is declared over sink {name!r}", stage.name, name, scope.problems)
            return -1, None
        return found, None
    if name == stage.name and not (scope.declared is not None and name in scope.declared):
        scope.problems.add(
            "SELF_DEP",
            f"{word} {name!r} is declared over itself",
            "Name the stage whose elements it takes.",
            stages=(name,),
        )
        return -1, None
    if name and scope.is_input(name):
        scope.need(name, UNKNOWN, required=True)
        return -1, name
    hint = did_you_mean(name, (known for known in scope.known() if known != stage.name), what="Stages and inputs")
    scope.problems.add(
        "OVER",
        f"{word} {stage.name!r} is declared over {name!r}, which is neither a stage nor a declared input",
        hint or f"Add a stage called {name!r}.",
        stages=(stage.name, name),
    )
    return -1, None


def _check_readable(stage: Declared, producer: Declared, problems: Problems) -> None:
    if producer.role is Role.SINK:
        _sink_read(f"stage {stage.name!r} reads sink {producer.name!r}", stage.name, producer.name, problems)


def _sink_read(what: str, stage: str, sink: str, problems: Problems) -> None:
    problems.add(
        "OVER",
        f"{what}, but a sink keeps no results",
        f"Declare {sink!r} with .map(...), or use after= to wait for its end.",
        stages=(stage, sink),
    )


def _kind(stage: Declared, role: Role, problems: Problems) -> tuple[StageKind, bool]:
    if stage.kind is not None:
        return stage.kind, True
    own = getattr(stage.traits.runner, "kind", None) if stage.traits.form in ("object", "class") else None
    if isinstance(own, str):  # a StageKind is text too
        try:
            return StageKind(own), True
        except ValueError:
            problems.add(
                "RUNNER",
                f"stage {stage.name!r}: its runner's kind {own!r} is no stage kind",
                f"Kinds: {', '.join(StageKind)}.",
                stages=(stage.name,),
            )
    if role in (Role.MAP, Role.REDUCE) and not stage.traits.is_async and stage.traits.form != "graph":
        return StageKind.TRANSFORM, False  # else a newcomer's CPU loop would land on threads
    return StageKind.WORK, False


def _inputs(scope: Scope) -> tuple[dict[str, Any], dict[str, Any]]:
    """Required and optional inputs with their annotations.

    What is declared is required unless every reader has a default.
    """

    def known(annotation: Any) -> Any:
        return None if annotation is UNKNOWN else annotation

    optional = {key: known(a) for key, a in scope.optional.items() if key not in scope.required}
    if scope.declared is None:
        return {key: known(annotation) for key, annotation in scope.required.items()}, optional
    required = {key: annotation for key, annotation in scope.declared.items() if key not in optional}
    return required, {key: scope.declared[key] for key in optional}


def _dependents(deps: Sequence[tuple[int, ...]], numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Turn the edges round, in two passes over one flat list: a list per stage would cost more than the graph."""
    starts = array("q", bytes(8 * (len(deps) + 1)))
    for upstream in deps:
        for j in upstream:
            starts[j + 1] += 1
    total = 0
    for i in range(1, len(starts)):
        total += starts[i]
        starts[i] = total
    flat: list[int] = [0] * total
    places = starts[:]
    for i, upstream in zip(numbers, deps, strict=True):
        for j in upstream:
            flat[places[j]] = i
            places[j] += 1
    return [tuple(flat[starts[i] : starts[i + 1]]) for i in range(len(deps))]


def _order(deps: Sequence[tuple[int, ...]], dependents: Sequence[tuple[int, ...]]) -> array[int]:
    """Topological order, smallest number first where free. Shorter than the graph if there is a cycle."""
    count = len(deps)
    if all(not upstream or max(upstream) < i for i, upstream in enumerate(deps)):
        return array("i", range(count))
    missing = array("i", map(len, deps))
    ready = [i for i in range(count) if not missing[i]]
    heapify(ready)
    order = array("i")
    while ready:
        i = heappop(ready)
        order.append(i)
        for j in dependents[i]:
            missing[j] -= 1
            if not missing[j]:
                heappush(ready, j)
    return order


def _depth(deps: Sequence[tuple[int, ...]], order: array[int]) -> array[int]:
    depth = array("i", bytes(4 * len(deps)))
    for i in order:
        deepest = -1
        for j in deps[i]:
            if depth[j] > deepest:
                deepest = depth[j]
        depth[i] = deepest + 1
    return depth


def _report_cycles(
    specs: Sequence[StageSpec], deps: Sequence[tuple[int, ...]], order: array[int], problems: Problems
) -> None:
    """Name a path for every separate loop: what could not be ordered has a dependency that could not either."""
    stuck = set(range(len(specs))).difference(order)
    walk_of: dict[int, int] = {}
    for start in sorted(stuck):
        path: list[int] = []
        i = start
        while i not in walk_of:
            walk_of[i] = start
            path.append(i)
            i = next(j for j in deps[i] if j in stuck)
        if walk_of[i] != start:
            continue
        loop = path[path.index(i) :]
        loop.reverse()  # along the direction in which values flow
        first = loop.index(min(loop))
        names = [specs[j].name for j in loop[first:] + loop[:first]]
        names.append(names[0])
        shown = names if len(names) <= 12 else [*names[:6], "...", *names[-5:]]
        problems.add(
            "CYCLE",
            f"stages wait for each other: {' -> '.join(shown)}",
            "Remove one of these dependencies.",
            stages=names,
            path=names,
        )
