"""How each stage of a graph is called: its program, and where the values of a call come from. Built once per stage,
on first use."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from stageflow.context.attempt import CallPlan, Program, Slot
from stageflow.core.executor import Shipped
from stageflow.core.kinds import StageKind
from stageflow.pipeline.checks import checked_annotation
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.placement import place
from stageflow.pipeline.policies import Policies, asks_for_worker
from stageflow.pipeline.regions import find_regions
from stageflow.pipeline.spaces import flows_early
from stageflow.pipeline.spec import Role, StageSpec
from stageflow.runtime.paths import nested_stages
from stageflow.scheduler.layout import Layout

# The programs of maps, folds and regions are imported by the first stage that is one.
if TYPE_CHECKING:
    from stageflow.context.owning import Owning

#: role -> the word for it in `run.started`
_SHAPES: Final = {Role.TASK: "stage", Role.SOURCE: "source", Role.MAP: "map", Role.REDUCE: "reduce", Role.SINK: "sink"}


class StageCode:
    """One stage, ready to be called.

    `sources[k]` says where the value of slot k comes from: a stage's number, or the key of an input.
    `passes_snapshot` is False where
    nobody could read the snapshot. `gathers`: a slot takes all elements of a stream.
    """

    __slots__ = (
        "_driven",
        "_gathered",
        "_modules",
        "_traced",
        "bare",
        "gathers",
        "passes_snapshot",
        "program",
        "shipped",
        "shipped_async",
        "sources",
        "writable",
    )

    def __init__(
        self,
        program: Program,
        sources: tuple[int | str, ...],
        modules: tuple[str, ...],
        gathers: bool = False,
        policies: Policies | None = None,
    ) -> None:
        self.program = program
        self.sources = sources
        self.passes_snapshot = program.plan.wants_ctx
        self.shipped = Shipped(program, label=program.name, modules=modules)
        self.shipped_async = Shipped(program.run_async, label=program.name)
        self._modules = modules
        self._driven: Shipped | None = None
        self._traced: tuple[Shipped, Shipped] | None = None
        self.gathers = gathers
        #: arguments of a call in the process lane that are given as private pages, as bits
        self.writable = self.writable_from(2)
        #: nothing of its values, its run or its policies needs a look when a call of it is made in a worker
        self.bare = not (self.passes_snapshot or gathers or policies is None or not policies.quiet())
        self._gathered: dict[int, Shipped] = {}

    def gathered(self, shipped: Shipped, width: int) -> Shipped:
        """`shipped`, to be called with values in pieces behind its `width` arguments."""
        found = self._gathered.get(shipped.key)
        if found is None:
            from stageflow.context.gathering import Gathered

            found = Shipped(Gathered(shipped.function, width), label=shipped.label, modules=shipped.modules)
            self._gathered[shipped.key] = found
        return found

    def writable_from(self, first: int) -> int:
        """The same of a call whose values stand from argument `first` on."""
        own = self.program.own
        if own is None:
            return 0
        return -1 if self.gathers else own.mask(first, len(self.sources))

    def driven(self) -> Shipped:
        """A source as a call of a worker."""
        if self._driven is None:
            from stageflow.context.driven import SourceProgram

            name = self.program.name
            self._driven = Shipped(SourceProgram(self.program), label=name, modules=self._modules)
        return self._driven

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that define it."""
        return self._modules

    def fused(self, rest: Sequence[StageCode], modules: tuple[str, ...], timed: bool) -> StageCode:
        """This stage and those that run back to back with it, as one that is called like this one. `timed`: the last
        has a timeout."""
        from stageflow.context.region import RegionProgram

        made: StageCode = object.__new__(StageCode)
        members: list[Any] = [one.program for one in (self, *rest)]
        program = RegionProgram(members, timed=timed)
        traced = Shipped(RegionProgram(members, traced=True, timed=timed), label=program.name, modules=modules)
        made.program = self.program
        made.sources = self.sources
        made.passes_snapshot = any(one.passes_snapshot for one in (self, *rest))
        made.shipped = made.shipped_async = Shipped(program, label=program.name, modules=modules)
        made._modules = modules
        made._driven = None
        made._traced = traced, traced
        made.gathers = self.gathers
        made.writable = self.writable
        made.bare = False
        made._gathered = {}
        return made

    def call(self, lane: str, trace: str | None) -> Shipped:
        """What to run in `lane`; inside the trace context of its attempt where `trace` is not None."""
        on_loop = lane in ("async", "inline")
        if trace is None:
            return self.shipped_async if on_loop else self.shipped
        if self._traced is None:
            from stageflow.context.tracing import Traced

            traced = Traced(self.program, streaming=type(self.program) is not Program)
            name = self.program.name
            self._traced = Shipped(traced, label=name, modules=self._modules), Shipped(traced.run_async, label=name)
        return self._traced[on_loop]


class GraphCode:
    """A graph with its lanes decided, and its stages' code as far as it was needed."""

    __slots__ = (
        "__weakref__",
        "_annotations",
        "_codes",
        "_grace",
        "_isolate",
        "_outline",
        "_readers",
        "_regions",
        "_resources",
        "_scope",
        "_shared",
        "directs",
        "empty",
        "graph",
        "hinted",
        "lanes",
        "layout",
        "movable",
        "needed",
        "nested",
        "routes",
    )

    def __init__(
        self,
        graph: StageGraph,
        *,
        placement: Mapping[str, str],
        lane: str | None,
        resources: Mapping[str, Callable[[], Any]],
        scope: int,
        nested: bool = False,
        annotations: bool = True,
        isolate: bool = False,
        grace: float = 5.0,
    ) -> None:
        self.graph = graph
        self._annotations = annotations
        self._isolate = isolate
        self._grace = grace
        self.lanes: list[str] = []
        cache: dict[Any, str] = {}
        for spec in graph.specs:
            key = (id(spec.runner), spec.kind, spec.policies.executor, spec.is_async, spec.form)
            found = cache.get(key)
            if found is None:
                chosen = str(place(spec, overrides=placement, lane=lane).lane)
                found = cache[key] = _able(spec, chosen, nested)
            self.lanes.append(found)
        self.layout = Layout(graph, self.lanes, regions=find_regions(graph, self.lanes))
        self._regions: dict[int, StageCode] = {}
        #: stages whose items have paths of more than one number
        self.nested = nested_stages(graph, self.layout.elements)
        #: stages whose lane nobody but the table has chosen: an attempt may be placed elsewhere
        self.movable = frozenset(
            i
            for i, (spec, chosen) in enumerate(zip(graph.specs, self.lanes, strict=True))
            if chosen == "process" and lane is None and spec.policies.executor is None and spec.kind not in placement
        )
        #: lanes that have to be open before a run
        self.needed = tuple(dict.fromkeys((*self.lanes, "thread") if self.movable else self.lanes))
        self._codes: dict[int, StageCode] = {}
        #: what `direct` found for each stage; self: not looked at yet
        self.directs: list[Any] = [self] * len(graph.specs)
        self._outline: dict[str, Any] | None = None
        self._readers: dict[Any, int] | None = None
        self._shared: dict[int, tuple[Shipped | None, bool]] = {}
        self.empty = bytearray(len(graph.specs))  # 1: run by `direct`, and said to return None
        self.routes = any(spec.kind is StageKind.ROUTE for spec in graph.specs)
        #: stages whose value may say that the stages behind are to be skipped
        self.hinted = frozenset(
            dep for i, spec in enumerate(graph.specs) if spec.policies.conditional for dep in graph.deps[i]
        )
        self._resources = resources
        self._scope = scope

    def stage(self, i: int) -> StageCode:
        """The code of stage `i`."""
        code = self._codes.get(i)
        if code is None:
            code = self._codes[i] = self._make(i)
        return code

    def region(self, i: int) -> StageCode:
        """The code of the region that begins with stage `i`."""
        code = self._regions.get(i)
        if code is None:
            head, *rest = [self.stage(member) for member in self.layout.regions[i]]
            modules = dict.fromkeys(name for one in (head, *rest) for name in one.modules)
            timed = self.graph.specs[self.layout.regions[i][-1]].policies.timeout is not None
            code = self._regions[i] = head.fused(rest, tuple(modules), timed)
        return code

    def direct(self, i: int) -> Shipped | None:
        """What to run on the loop for a stage that needs neither values nor context nor anything around it: shared by
        all stages with the same function. None for every other stage. Kept in `directs`."""
        spec = self.graph.specs[i]
        shipped = None
        if (
            self.layout.simple[i]
            and self.lanes[i] == "async"
            and spec.form == "function"
            and not (spec.wants_ctx or spec.bindings or spec.policies.contract)
        ):
            known = self._shared.get(id(spec.runner))
            if known is None:
                returns = checked_annotation(spec) if self._annotations else None
                able = returns is None or returns is type(None)
                made = _direct_of(spec.runner) if able else None
                known = self._shared[id(spec.runner)] = (made, able and returns is not None)
            shipped, self.empty[i] = known
        self.directs[i] = shipped
        return shipped

    def outline(self) -> dict[str, Any]:
        """What `run.started` says of the graph; made once, so nobody may change it."""
        made = self._outline
        if made is None:
            graph, specs = self.graph, self.graph.specs
            made = self._outline = {
                "stages": [spec.name for spec in specs],
                "lanes": {spec.name: lane for spec, lane in zip(specs, self.lanes, strict=True)},
                "kinds": {spec.name: str(spec.kind) for spec in specs},
                "shapes": {spec.name: _SHAPES[spec.role] for spec in specs},
                "edges": [[specs[dep].name, spec.name] for i, spec in enumerate(specs) for dep in graph.deps[i]],
            }
        return made

    def readers(self, key: str) -> int:
        """How many process stages take the input `key` as a parameter."""
        readers = self._readers
        if readers is None:
            readers = self._readers = {}
            for spec, lane in zip(self.graph.specs, self.lanes, strict=True):
                if lane == "process":
                    for name in {binding.ref for binding in spec.bindings if binding.source == "input"}:
                        readers[name] = readers.get(name, 0) + 1
        return readers.get(key, 0)

    def modules(self) -> tuple[str, ...]:
        """The modules that define the process stages, for preloading."""
        found: dict[str, None] = {}
        for spec, lane in zip(self.graph.specs, self.lanes, strict=True):
            if lane == "process":
                for name in _modules(spec):
                    found[name] = None
        return tuple(found)

    def _make(self, i: int) -> StageCode:
        graph = self.graph
        spec = graph.specs[i]
        columns = (
            {producer: k for k, producer in enumerate(self.layout.elements[i])} if i in self.layout.elements else {}
        )
        slots: list[Slot] = []
        sources: list[int | str] = []
        positional: list[tuple[str, Any]] = []
        keywords: list[tuple[str, str, Any]] = []
        taken: dict[int | str, int] = {}
        placed: dict[str, tuple[str, Any]] = {}

        def slot(source: int | str, param: str | None) -> int:
            if source in taken:
                return taken[source]
            is_stage = isinstance(source, int)
            name = graph.specs[source].name if isinstance(source, int) else source
            taken[source] = len(slots)
            slots.append(Slot(name, param, is_stage))
            sources.append(source)
            return taken[source]

        for binding in spec.bindings:
            kind: str
            where: Any
            if binding.source == "ctx":
                kind, where = "ctx", 0
            elif binding.source == "element":
                kind, where = "element", 0
            elif binding.source == "acc":
                continue
            elif binding.source == "stage" and binding.ref in columns:
                kind, where = "element", columns[binding.ref]
            elif binding.source in ("stage", "input"):
                kind = "nullable" if binding.nullable and not binding.has_default else "value"
                where = slot(binding.ref, binding.param)  # type: ignore[arg-type]
            elif binding.positional:
                kind, where = "const", binding.default
            else:
                continue
            placed[binding.param] = kind, where
            if spec.role == Role.REDUCE and kind == "element":
                continue
            if binding.positional:
                positional.append(("value" if kind == "nullable" else kind, where))
            else:
                keywords.append((binding.param, kind, where))
        if (
            not positional
            and len(keywords) == 1
            and keywords[0][1] == "element"
            and _is_first(spec.runner, keywords[0][0])
        ):
            # a plain function of the element alone: called by position, its loop runs in C
            positional, keywords = [("element", keywords[0][2])], []
        if spec.form != "function":
            positional = [("ctx", 0)]
            keywords = []
        asked = [one for one in spec.policies.interceptors if asks_for_worker(one)]
        inside = None
        if asked:
            from stageflow.context.inside import Inside
            from stageflow.pipeline.interceptors import InterceptorChain

            inside = Inside(InterceptorChain(asked).interceptors)
        wants_ctx = spec.wants_ctx or spec.form != "function" or inside is not None
        if wants_ctx:
            for dep in graph.deps[i]:
                if dep not in columns and dep != spec.over:
                    slot(dep, None)
        plan = CallPlan(tuple(slots), tuple(positional), tuple(keywords), wants_ctx)
        common: dict[str, Any] = {
            "name": spec.name,
            "kind": str(spec.kind),
            "runner": spec.runner,
            "form": "function" if spec.form == "function" else "object",
            "is_async": spec.is_async,
            "plan": plan,
            "declared": spec.declared_deps if wants_ctx else (),
            "contract": spec.policies.contract,
            "returns": checked_annotation(spec) if self._annotations else None,
            "grace": self._grace,
            "resources": self._resources,
            "resource_scope": self._scope,
            "inside": inside,
            "own": self._own(spec, slots, placed),
        }
        program: Program
        if spec.role in (Role.MAP, Role.SINK):
            from stageflow.context.items import ItemProgram

            program = ItemProgram(
                batch=spec.policies.batch is not None,
                flat=spec.is_generator,
                flows=flows_early(spec),
                keeps_values=spec.role == Role.MAP,
                brief=spec.kind is not StageKind.TRANSFORM,
                **common,
            )
        elif spec.role == Role.REDUCE and spec.reduce is not None:
            from stageflow.context.folds import ReduceProgram

            reduce = spec.reduce
            program = ReduceProgram(
                combine=reduce.combine,
                initial=reduce.initial,
                has_initial=reduce.has_initial,
                repeats=spec.policies.retry is not None,
                **common,
            )
        else:
            program = Program(**common)
        gathers = any(isinstance(source, int) and graph.streams[source] for source in sources)
        policies = spec.policies if spec.form != "graph" else None
        return StageCode(program, tuple(sources), _modules(spec), gathers, policies)

    def _own(self, spec: StageSpec, slots: Sequence[Slot], placed: Mapping[str, tuple[str, Any]]) -> Owning | None:
        """The inputs that the stage may change; `placed` says where each of its parameters gets its value."""
        policies = spec.policies
        isolate = policies.isolate or self._isolate
        if not isolate and not policies.writable:
            return None
        from stageflow.context.owning import Owning

        if isolate or isinstance(policies.writable, bool):
            return Owning(tuple(range(len(slots))), True, isolate)
        names = policies.writable
        own = {k for k, slot in enumerate(slots) if slot.name in names}
        over = self.graph.specs[spec.over].name if spec.over >= 0 else spec.over_input
        elements = over in names
        for param in names:
            kind, where = placed.get(param, ("", 0))
            if kind == "element":
                elements = True
            elif kind in ("value", "nullable"):
                own.add(where)
        return Owning(tuple(sorted(own)), elements, False)


def _direct_of(runner: Callable[..., Any]) -> Shipped:
    def call(port: Any) -> Any:
        return runner()

    return Shipped(call, label=getattr(runner, "__qualname__", repr(runner)))


def _is_first(runner: Any, name: str) -> bool:
    """Whether `name` is the first parameter of a plain function, which then can be given by position."""
    if not isinstance(runner, types.FunctionType):
        return False
    code = runner.__code__
    return code.co_argcount > 0 and code.co_varnames[0] == name


def _able(spec: StageSpec, lane: str, nested: bool) -> str:
    """A lane that can run the stage: subpipelines run on the loop, and an engine inside a worker has no process
    lane."""
    if nested and lane == "process":
        return "inline"
    if spec.form == "graph":
        return "async" if lane != "inline" else "inline"
    return lane


def _modules(spec: StageSpec) -> tuple[str, ...]:
    runner = spec.runner
    if not inspect.isroutine(runner) and not isinstance(runner, type):
        runner = type(runner)
    name = getattr(runner, "__module__", None)
    return (name,) if name and name not in ("builtins", "__main__") else ()


def code_of(
    graph: StageGraph,
    *,
    placement: Mapping[str, str],
    lane: str | None,
    resources: Mapping[str, Callable[[], Any]],
    scope: int,
    nested: bool = False,
    annotations: bool = True,
    isolate: bool = False,
    grace: float = 5.0,
) -> GraphCode:
    """The code of a graph under these settings, shared by all runs that have them."""
    key = (scope, tuple(sorted(placement.items())), lane, nested, annotations, isolate)
    found: GraphCode | None = graph.memo.get(key)
    if found is None:
        found = graph.memo[key] = GraphCode(
            graph,
            placement=placement,
            lane=lane,
            resources=resources,
            scope=scope,
            nested=nested,
            annotations=annotations,
            isolate=isolate,
            grace=grace,
        )
    return found


def forget_code(graph: StageGraph, scope: int) -> None:
    """An engine has closed: drop what was worked out for it."""
    for key in [key for key in graph.memo if key[0] == scope]:
        graph.memo.pop(key, None)
