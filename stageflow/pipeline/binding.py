"""Which parameter gets which value: the binding table.

Order for a parameter: `inputs={...}` of the builder call, `ctx`, a stage of that name, an input, the default. A stage
never binds to itself by name. The element of a map goes to the parameter named like `over`, else to the first
positional parameter that nothing else binds; a reduce takes (acc, item) by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from stageflow.pipeline.names import did_you_mean, nearest
from stageflow.pipeline.problems import Problems
from stageflow.pipeline.signatures import UNKNOWN, Parameter, Traits, admits_none
from stageflow.pipeline.spec import Binding, Role, Source


class Scope:
    """What names mean in one graph: its stages, its declared inputs, and the inputs that turn out to be needed."""

    __slots__ = ("_shared", "declared", "index", "optional", "problems", "required")

    def __init__(self, index: Mapping[str, int], declared: Mapping[str, Any] | None, problems: Problems) -> None:
        self.index = index
        self.declared = declared
        self.problems = problems
        #: name -> annotation of the first parameter that needs it
        self.required: dict[str, Any] = {}
        self.optional: dict[str, Any] = {}
        self._shared: dict[tuple[Binding, ...], tuple[Binding, ...]] = {}

    def is_input(self, name: str) -> bool:
        """True when `name` may be an input: it is declared, or nothing is."""
        return self.declared is None or name in self.declared

    def need(self, name: str, annotation: Any, *, required: bool) -> None:
        """Note that a parameter reads the input `name`."""
        (self.required if required else self.optional).setdefault(name, annotation)

    def share(self, bindings: list[Binding]) -> tuple[Binding, ...]:
        """One tuple for equal lists of bindings: a million stages with the same runner hold one."""
        made = tuple(bindings)
        try:
            return self._shared.setdefault(made, made)
        except TypeError:
            return made  # an unhashable default

    def known(self) -> list[str]:
        """Every name a parameter could have meant."""
        return [*self.index, *(self.declared or ())]


class Asked:
    """The parts of a builder call that decide bindings."""

    __slots__ = ("after", "feeds", "inputs", "name", "over", "over_index", "role")

    def __init__(
        self,
        name: str,
        role: Role,
        *,
        after: Iterable[str] = (),
        inputs: Mapping[str, str | None] | None = None,
        over: str | None = None,
        over_index: int = -1,
        feeds: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.role = role
        self.after = after
        self.inputs = inputs
        self.over = over
        self.over_index = over_index
        #: upstream stages of a shape helper: a single one fills the first free parameter
        self.feeds = feeds


def bind(traits: Traits, asked: Asked, scope: Scope) -> tuple[Binding, ...]:
    """The bindings of one stage, in the order of its parameters. Problems are noted in the scope, never raised."""
    if traits.form == "graph":
        return _bind_graph(traits, asked, scope)
    if traits.form != "function":
        if asked.inputs:
            scope.problems.add(
                "UNBOUND",
                f"stage {asked.name!r}: an object stage has no parameters that inputs= could rename",
                "List the upstream stages in after= and read them through ctx.inputs.",
                stages=(asked.name,),
            )
        return ()
    if traits.parameters is None:
        return _bind_blind(asked, scope)
    if not traits.parameters and not asked.inputs and not asked.over:
        return ()
    return _bind_function(traits.parameters, asked, scope)


def _bind_function(parameters: tuple[Parameter, ...], asked: Asked, scope: Scope) -> tuple[Binding, ...]:
    explicit = asked.inputs or {}
    _check_renames(parameters, asked, explicit, scope)
    taken = _elements(parameters, asked, explicit, scope)
    bindings: list[Binding] = []
    for position, parameter in enumerate(parameters):
        source = taken.get(position)
        if source is not None:
            by_position = asked.role is Role.REDUCE or parameter.positional_only
            ref = scope.index[asked.feeds[0]] if source == "stage" else None
            bindings.append(
                Binding(parameter.name, source, ref, by_position, parameter.has_default, parameter.nullable)
            )
            continue
        if parameter.name in explicit:
            found = _explicit(parameter, explicit[parameter.name], asked, scope)
        else:
            found = _by_name(parameter, asked, scope)
        if found is not None:
            bindings.append(found)
    return scope.share(_close_gaps(bindings, parameters))


def _check_renames(parameters: tuple[Parameter, ...], asked: Asked, explicit: Mapping[str, Any], scope: Scope) -> None:
    known = [p.name for p in parameters]
    for name in explicit:
        if name not in known:
            hint = did_you_mean(name, known, what="Its parameters") or "The function has no parameters."
            scope.problems.add(
                "UNBOUND",
                f"stage {asked.name!r}: inputs= names {name!r}, which is no parameter of the runner",
                hint,
                stages=(asked.name,),
            )


def _elements(
    parameters: tuple[Parameter, ...], asked: Asked, explicit: Mapping[str, Any], scope: Scope
) -> dict[int, Source]:
    """Which positions take the accumulator, the element, or what a shape helper feeds."""
    if asked.role is Role.REDUCE:
        places = [i for i, p in enumerate(parameters) if p.positional][:2]
        if len(places) < 2:
            scope.problems.add(
                "UNBOUND",
                f"reduce {asked.name!r}: the runner takes {len(places)} argument(s) by position, not (acc, item)",
                "Declare it as def fold(acc, item).",
                stages=(asked.name,),
            )
            return {}
        return {places[0]: "acc", places[1]: "element"}
    if asked.role not in (Role.MAP, Role.SINK):
        return _fed(parameters, asked, explicit, scope)
    names = {p.name: i for i, p in enumerate(parameters)}
    if asked.over in names and asked.over not in explicit:
        return {names[asked.over]: "element"}
    renamed: dict[int, Source] = {
        names[p]: "element" for p, target in explicit.items() if target == asked.over and p in names
    }
    if renamed:
        return renamed
    free = _first_free(parameters, asked, explicit, scope)
    if free is not None:
        return {free: "element"}
    if any(p.name == "ctx" for p in parameters):
        return {}  # reads ctx.inputs
    scope.problems.add(
        "UNBOUND",
        f"{asked.role.name.lower()} {asked.name!r}: no parameter is left for the element of {asked.over!r}",
        f"Name a parameter {asked.over!r}, or add a positional one that is named like no stage.",
        stages=(asked.name,),
    )
    return {}


def _fed(
    parameters: tuple[Parameter, ...], asked: Asked, explicit: Mapping[str, Any], scope: Scope
) -> dict[int, Source]:
    """The place for the value of the one stage that a shape helper put before this one."""
    if len(asked.feeds) != 1 or asked.feeds[0] not in scope.index:
        return {}
    fed = asked.feeds[0]
    if fed in explicit.values() or any(p.name == fed for p in parameters):
        return {}
    free = _first_free(parameters, asked, explicit, scope)
    return {} if free is None else {free: "stage"}


def _first_free(
    parameters: tuple[Parameter, ...], asked: Asked, explicit: Mapping[str, Any], scope: Scope
) -> int | None:
    for position, p in enumerate(parameters):
        if not p.positional or p.name in explicit or p.name == "ctx":
            continue
        if p.name != asked.name and p.name in scope.index:
            continue
        if scope.declared is not None and p.name in scope.declared:
            continue
        return position
    return None


def _make(parameter: Parameter, source: Any, ref: int | str | None, *, by_name: bool) -> Binding:
    return Binding(
        parameter.name, source, ref, parameter.positional_only, parameter.has_default, parameter.nullable, by_name
    )


def _explicit(parameter: Parameter, target: str | None, asked: Asked, scope: Scope) -> Binding | None:
    """A parameter named in `inputs=`: a stage, an input, or None for its default."""
    name, where = parameter.name, (asked.name,)
    if target is None:
        if not parameter.has_default:
            scope.problems.add(
                "UNBOUND",
                f"stage {asked.name!r}: inputs={{{name!r}: None}} keeps a default, but parameter {name!r} has none",
                "Name a stage or an input, or give the parameter a default.",
                stages=where,
            )
        return None
    if target == asked.name and not (scope.declared and target in scope.declared):
        scope.problems.add(
            "SELF_DEP",
            f"stage {target!r} takes its own value as {name!r}",
            "Name another stage in inputs=.",
            stages=where,
        )
        return None
    if target == "ctx":
        return _make(parameter, "ctx", None, by_name=False)
    index = scope.index.get(target)
    if index is not None and target != asked.name:
        return _make(parameter, "stage", index, by_name=False)
    if scope.is_input(target):
        scope.need(target, parameter.annotation, required=not parameter.has_default)
        return _make(parameter, "input", target, by_name=False)
    scope.problems.add(
        "MISSING_DEP",
        f"stage {asked.name!r}: inputs={{{name!r}: {target!r}}} names neither a stage nor a declared input",
        did_you_mean(target, scope.known()) or f"Add a stage called {target!r}.",
        stages=(asked.name, target),
    )
    return None


def _by_name(parameter: Parameter, asked: Asked, scope: Scope) -> Binding | None:
    name = parameter.name
    if name == "ctx":
        return _make(parameter, "ctx", None, by_name=False)
    index = scope.index.get(name)
    if index is not None and name != asked.name:
        return _make(parameter, "stage", index, by_name=True)
    if len(asked.feeds) > 1 and not parameter.has_default and not (scope.declared and name in scope.declared):
        _unfed(name, asked, scope)
        return None
    if scope.is_input(name):
        scope.need(name, parameter.annotation, required=not parameter.has_default)
        return _make(parameter, "input", name, by_name=True)
    if not parameter.has_default:
        _unbound(name, asked, scope)
    return None


def _unbound(name: str, asked: Asked, scope: Scope) -> None:
    hint = did_you_mean(name, scope.known(), what="Stages and inputs")
    scope.problems.add(
        "UNBOUND",
        f"stage {asked.name!r}: parameter {name!r} names no upstream stage and no declared input",
        f"{hint} Or declare it: PipelineBuilder(..., inputs={{{name!r}: type}}).".strip(),
        stages=(asked.name,),
        parameter=name,
        nearest=list(nearest(name, scope.known())),
    )


def _unfed(name: str, asked: Asked, scope: Scope) -> None:
    scope.problems.add(
        "UNBOUND",
        f"stage {asked.name!r}: parameter {name!r} is named like none of the stages it joins",
        f"Name parameters like these stages ({', '.join(asked.feeds[:6])}), or take ctx and read ctx.inputs.",
        stages=(asked.name,),
        parameter=name,
    )


def _close_gaps(bindings: list[Binding], parameters: tuple[Parameter, ...]) -> list[Binding]:
    """Where a positional-only parameter keeps its default before one that is bound, pass the default explicitly."""
    if not any(p.positional_only and p.has_default for p in parameters):
        return bindings
    bound = {one.param: one for one in bindings}
    closed: list[Binding] = []
    positional_only = [p for p in parameters if p.positional_only]
    last = max((i for i, p in enumerate(positional_only) if p.name in bound), default=-1)
    for i, p in enumerate(positional_only[: last + 1]):
        one = bound.get(p.name) or Binding(p.name, "default", None, True, True, p.nullable)
        # an absent value in the middle must be replaced by the default itself: it cannot be left out
        closed.append(msgspec.structs.replace(one, default=p.default) if p.has_default and i < last else one)
    return closed + [one for one in bindings if one.param not in {p.name for p in positional_only}]


def _bind_blind(asked: Asked, scope: Scope) -> tuple[Binding, ...]:
    """A callable without a readable signature: its single dependency, or its element, by position."""
    if asked.role is Role.REDUCE:
        return scope.share([Binding("acc", "acc", positional=True), Binding("item", "element", positional=True)])
    names = list(dict.fromkeys([*asked.after, *asked.feeds, *(t for t in (asked.inputs or {}).values() if t)]))
    if asked.over is not None:
        names = [asked.over, *(name for name in names if name != asked.over)]
    if len(names) > 1:
        scope.problems.add(
            "UNBOUND",
            f"stage {asked.name!r}: the signature of its runner cannot be read, so its dependencies "
            f"({', '.join(names)}) cannot be told apart",
            "Wrap it in a function whose parameters are named like them.",
            stages=(asked.name,),
        )
        return ()
    if not names:
        return ()
    if asked.over is not None:
        return scope.share([Binding(names[0], "element", positional=True)])
    index = scope.index.get(names[0])
    if index is not None and names[0] != asked.name:
        return (Binding(names[0], "stage", index, positional=True),)
    if names[0] in asked.after or names[0] in asked.feeds:
        return ()  # reported as a missing dependency
    scope.need(names[0], UNKNOWN, required=True)
    return (Binding(names[0], "input", names[0], positional=True),)


def _bind_graph(traits: Traits, asked: Asked, scope: Scope) -> tuple[Binding, ...]:
    """A subpipeline: the inputs of the child graph are its parameters."""
    child = traits.runner
    parameters = tuple(
        Parameter(
            name, False, False, optional, None, admits_none(annotation), UNKNOWN if annotation is None else annotation
        )
        for inputs, optional in ((child.inputs, False), (child.optional_inputs, True))
        for name, annotation in inputs.items()
    )
    explicit = asked.inputs or {}
    _check_renames(parameters, asked, explicit, scope)
    bindings: list[Binding] = []
    over_taken = asked.over is None
    for p in parameters:
        found = _explicit(p, explicit[p.name], asked, scope) if p.name in explicit else None
        if p.name not in explicit:
            if not over_taken and (
                p.name == asked.over or (p.name not in scope.index and asked.over not in {q.name for q in parameters})
            ):
                found, over_taken = Binding(p.name, "element"), True
            else:
                found = _by_name(p, asked, scope)
        if found is not None:
            bindings.append(found)
    return scope.share(bindings)
