"""What would run where, and why: a `Plan` as data, as text and as a mapping for JSON. Starts nothing."""

from __future__ import annotations

import enum
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from stageflow.core.kinds import FailureMode, StageKind
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.placement import BIG_SHIPMENT, place, shipped_bytes
from stageflow.pipeline.policies import SOURCE_AHEAD, Rate
from stageflow.pipeline.regions import find_regions
from stageflow.pipeline.signatures import annotations_of
from stageflow.pipeline.spaces import flows_early
from stageflow.pipeline.spec import Binding, Role, StageSpec
from stageflow.pipeline.types import describe

#: what EngineConfig takes when it is not told otherwise; only for the text of the bounds
_DEFAULTS: Final[dict[str, Any]] = {"memory_limit": 0.6, "threads": 32, "processes": None, "max_in_flight": None}


class PlannedBinding(msgspec.Struct, frozen=True):
    """One parameter: `origin` says where its value comes from, in words a reader of the pipeline knows."""

    param: str
    source: str
    origin: str
    by_name: bool = False  #: by its name alone: nothing in the builder call says so
    may_be_absent: str | None = None  #: what the stage gets, or does, when there is no value


class PlannedStage(msgspec.Struct, frozen=True):
    """One stage of a plan."""

    name: str
    role: str
    kind: str
    kind_declared: bool
    lane: str
    why: str
    over: str | None
    depends_on: tuple[str, ...]
    bindings: tuple[PlannedBinding, ...]
    joins: tuple[str, ...]
    waits_for_all_of: tuple[str, ...]
    policies: dict[str, str]
    gives: str | None  #: the contract on its outgoing edges
    contract: str | None
    notes: tuple[str, ...]

    @property
    def by_name(self) -> tuple[PlannedBinding, ...]:
        """Bindings to another stage made by name alone."""
        return tuple(b for b in self.bindings if b.by_name and b.source == "stage")


class Plan(msgspec.Struct, frozen=True):
    """A graph with its placement and everything in it that a reader could not guess."""

    pipeline: str
    stages: tuple[PlannedStage, ...]
    depth: int
    inputs: dict[str, str]
    optional_inputs: dict[str, str]
    shadowed: tuple[str, ...]  #: keys that are an input for one stage and a stage for the others
    unrouted: dict[str, tuple[str, ...]]  #: router -> routes it may name that no `when` waits for
    bounds: tuple[str, ...]

    def stage(self, name: str) -> PlannedStage:
        """The plan of one stage; KeyError if there is none."""
        for one in self.stages:
            if one.name == name:
                return one
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        made: dict[str, Any] = msgspec.to_builtins(self)
        return made

    def to_text(self) -> str:
        """For a terminal: a table of lanes, then what is worth knowing of each stage."""
        return "\n".join(_text(self))

    def __str__(self) -> str:
        return self.to_text()


def make_plan(graph: StageGraph, config: Any = None) -> Plan:
    """The plan of `graph` under an EngineConfig (or a mapping of its fields; None = the defaults)."""
    overrides = _setting(config, "placement") or {}
    forced = _setting(config, "lane")
    absent = _may_be_skipped(graph)
    unrouted = _unrouted(graph)
    stages = []
    chosen = [place(spec, overrides=overrides, lane=forced) for spec in graph.specs]
    fused = find_regions(graph, [str(placed.lane) for placed in chosen])
    for i, spec in enumerate(graph.specs):
        placed = chosen[i]
        stages.append(
            PlannedStage(
                name=spec.name,
                role=spec.role.name.lower(),
                kind=str(spec.kind),
                kind_declared=spec.kind_declared,
                lane=str(placed.lane),
                why=placed.why,
                over=graph.specs[spec.over].name if spec.over >= 0 else spec.over_input,
                depends_on=spec.declared_deps,
                bindings=tuple(_binding(graph, i, b, absent) for b in spec.bindings),
                joins=_names(graph, graph.joins.get(i, ())),
                waits_for_all_of=_names(graph, graph.barriers.get(i, ())),
                policies={key: _show(value) for key, value in spec.policies.changed().items()},
                gives=_gives(spec),
                contract=None if spec.policies.contract is None else describe(spec.policies.contract),
                notes=(*_notes(graph, i, spec, str(placed.lane), unrouted), *_fused(graph, fused, i)),
            )
        )
    return Plan(
        pipeline=graph.name,
        stages=tuple(stages),
        depth=max(graph.depth, default=0),
        inputs={key: _annotation(value) for key, value in graph.inputs.items()},
        optional_inputs={key: _annotation(value) for key, value in graph.optional_inputs.items()},
        shadowed=tuple(key for key in (*graph.inputs, *graph.optional_inputs) if key in graph.index),
        unrouted=unrouted,
        bounds=tuple(_bounds(graph, config)),
    )


def _fused(graph: StageGraph, regions: Mapping[int, tuple[int, ...]], i: int) -> list[str]:
    """What is said of a stage that runs back to back with others."""
    for members in regions.values():
        if i in members:
            names = " -> ".join(_names(graph, members))
            batch, last = graph.specs[members[0]].policies.batch, graph.specs[members[-1]].policies
            ways = [f"batches of {batch}"] if batch is not None else []
            if last.timeout is not None:
                ways.append("one element at a time, for the timeout of the last")
            ways.append("fuse=False forbids it")
            return [f"runs back to back in one worker: {names} ({'; '.join(ways)})"]
    return []


def _setting(config: Any, key: str) -> Any:
    if config is None:
        return _DEFAULTS.get(key)
    found = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return _DEFAULTS.get(key) if found is None else found


def _names(graph: StageGraph, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(graph.specs[j].name for j in numbers)


def _annotation(annotation: Any) -> str:
    return "any" if annotation is None else describe(annotation)


def _gives(spec: StageSpec) -> str | None:
    runner = spec.runner.execute if spec.form in ("object", "class") else spec.runner
    if spec.policies.contract is not None:
        return describe(spec.policies.contract)
    if spec.form == "graph" or spec.role is Role.SINK:
        return None
    returns = annotations_of(runner).get("return")
    return None if returns is None else describe(returns)


def _binding(graph: StageGraph, i: int, binding: Binding, absent: bytearray) -> PlannedBinding:
    gap = None
    origin = binding.source
    words: str = origin
    if origin == "stage" and isinstance(binding.ref, int):
        producer = graph.specs[binding.ref]
        words = f"stage {producer.name!r}"
        if binding.ref in graph.joins.get(i, ()):
            words += ", the element of the same index"
        elif graph.streams[binding.ref]:
            words += ", its whole sequence"
        if absent[binding.ref]:
            gap = _when_absent(binding, producer.name)
    elif origin == "input":
        words = f"input {binding.ref!r}"
    elif origin == "element":
        spec = graph.specs[i]
        words = f"an element of {graph.specs[spec.over].name if spec.over >= 0 else spec.over_input!r}"
    return PlannedBinding(binding.param, origin, words, binding.by_name, gap)


def _when_absent(binding: Binding, producer: str) -> str:
    if binding.has_default:
        return "its default"
    return "None" if binding.nullable else f"the stage is skipped (input_absent: {producer})"


def _may_be_skipped(graph: StageGraph) -> bytearray:
    """1 for each stage that may end without a value although the run goes on."""
    absent = bytearray(len(graph.specs))
    for i in graph.order:
        spec, deps = graph.specs[i], graph.deps[i]
        policies = spec.policies
        starved = any(
            b.source == "stage" and isinstance(b.ref, int) and absent[b.ref] and not b.has_default and not b.nullable
            for b in spec.bindings
        )
        absent[i] = (
            policies.when is not None
            or policies.on_failure not in (None, FailureMode.FAIL_FAST)
            or starved
            or (policies.conditional and any(absent[j] for j in deps))
            or (bool(deps) and all(absent[j] for j in deps))
        )
    return absent


def _unrouted(graph: StageGraph) -> dict[str, tuple[str, ...]]:
    waited: dict[int, set[str]] = {}
    for router, branch in graph.routes.values():
        waited.setdefault(router, set()).add(branch)
    found: dict[str, tuple[str, ...]] = {}
    for i, spec in enumerate(graph.specs):
        if spec.kind is StageKind.ROUTE and spec.form != "graph":
            missing = tuple(name for name in _route_names(spec) if name not in waited.get(i, ()))
            if missing:
                found[spec.name] = missing
    return found


def _route_names(spec: StageSpec) -> list[str]:
    """The names a router may give, as far as its annotation says: Literal, or a text enum."""
    runner = spec.runner.execute if spec.form in ("object", "class") else spec.runner
    waiting = [annotations_of(runner).get("return")]
    names: list[str] = []
    while waiting:
        annotation = waiting.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
            names.extend(one.value for one in annotation if isinstance(one.value, str))
        elif typing.get_origin(annotation) is typing.Literal:
            names.extend(one for one in typing.get_args(annotation) if isinstance(one, str))
        else:
            waiting.extend(typing.get_args(annotation))
    return list(dict.fromkeys(names))


def _notes(graph: StageGraph, i: int, spec: StageSpec, lane: str, unrouted: Mapping[str, tuple[str, ...]]) -> list[str]:
    notes = []
    if lane == "process" and (size := shipped_bytes(spec.runner)) > BIG_SHIPMENT:
        notes.append(
            f"its function is sent to each worker as {size / 1e6:.0f} MB: keep big data out of globals and closures"
        )
    if spec.role is Role.SOURCE and lane == "process":
        if spec.is_async:
            notes.append("a source: driven by a task of its own on the loop, in no worker")
        else:
            notes.append("a source: driven by a worker of its own, beside those of the lane")
    if i in graph.barriers:
        names = ", ".join(_names(graph, graph.barriers[i]))
        notes.append(f"waits until {names} has given every element")
        if not spec.policies.spill:
            notes.append(
                f"spill=False: the memory bound does not hold for {names} -> {spec.name}; an overflow fails it"
            )
    if i in graph.routes:
        router, branch = graph.routes[i]
        notes.append(f"runs when {graph.specs[router].name!r} names {branch!r}")
    if i in graph.guard_paths:
        notes.append(f"when it fails, runs again: {' -> '.join(_names(graph, graph.guard_paths[i]))}")
    if spec.name in unrouted:
        notes.append(f"may name routes that no stage waits for: {', '.join(unrouted[spec.name])}")
    if spec.role is Role.REDUCE and spec.reduce is not None:
        if spec.reduce.combine is None:
            notes.append("folds in one ordered chain; combine= would let blocks fold in parallel")
        else:
            notes.append(f"folds blocks of {spec.reduce.block} in parallel, merged by a fixed tree")
    return notes


def _bounds(graph: StageGraph, config: Any) -> list[str]:
    limit = _setting(config, "memory_limit")
    shown = f"{limit:.0%} of the machine or container" if isinstance(limit, float) else f"{limit}"
    processes = _setting(config, "processes")
    lines = [f"live values: at most the larger of {shown} and the largest chain of one element"]
    if any(spec.role is Role.SOURCE for spec in graph.specs):
        lines.append(
            f"sources: at most {SOURCE_AHEAD:,} elements ahead of the slowest reader, and none while live values and "
            "what running work will add take half of that"
        )
    flat = [spec for spec in graph.specs if spec.role is Role.MAP and spec.is_generator]
    if flows := [spec.name for spec in flat if flows_early(spec)]:
        lines.append(
            f"flat-maps: the generators of {', '.join(flows)} stand still while their readers have enough; up to 8 MiB "
            "or 1,000 values of an element are held for a retry"
        )
    if whole := [spec.name for spec in flat if not flows_early(spec)]:
        lines.append(
            f"not bounded: all that one element or batch of {', '.join(whole)} gives is held until its end, because "
            "idempotency= and interceptors in the parent take it as one"
        )
    unbounded = [
        f"{graph.specs[j].name} -> {graph.specs[i].name}"
        for i, whole in graph.barriers.items()
        if not graph.specs[i].policies.spill
        for j in whole
    ]
    if unbounded:
        lines.append(f"not bounded, because of spill=False: {', '.join(unbounded)}")
    workers = "one per usable core" if processes is None else f"{processes}"
    lines.append(
        f"attempts at once: process lane {workers}, thread lane {_setting(config, 'threads')}, async lane 1024 per run"
    )
    if (in_flight := _setting(config, "max_in_flight")) is not None:
        lines.append(f"in flight: at most {in_flight}")
    for spec in graph.specs:
        said = [
            f"{key} {_show(getattr(spec.policies, key))}"
            for key in ("concurrency", "rate", "batch")
            if getattr(spec.policies, key) is not None
        ]
        if said:
            lines.append(f"{spec.name}: {', '.join(said)}")
    return lines


def _required(value: msgspec.Struct) -> list[str]:
    """The fields that a struct has no default for."""
    return [f.name for f in msgspec.structs.fields(type(value)) if f.required]


def _show(value: Any) -> str:
    if isinstance(value, Rate):
        return str(value)
    if isinstance(value, msgspec.Struct):
        fresh = type(value)(**{n: getattr(value, n) for n in _required(value)})
        parts = [
            f"{name}={_show(getattr(value, name))}"
            for name in value.__struct_fields__
            if name in _required(value) or getattr(value, name) != getattr(fresh, name)
        ]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return f"({', '.join(_show(one) for one in value)})"
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else repr(value)


def _text(plan: Plan) -> list[str]:
    count = len(plan.stages)
    lines = [f"{plan.pipeline}: {count} stage{'' if count == 1 else 's'}, {plan.depth + 1} deep"]
    for label, keys in (("inputs", plan.inputs), ("optional", plan.optional_inputs)):
        if keys:
            lines.append(f"  {label + ':':<10}" + ", ".join(f"{key}: {text}" for key, text in keys.items()))
    widths = [max((len(cells[k]) for cells in map(_cells, plan.stages)), default=0) for k in range(4)]
    for one in plan.stages:
        cells = _cells(one)
        lines += ["", "  " + "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + f"  {one.why}"]
        lines += [f"      {line}" for line in _details(one)]
    lines += ["", "bounds"]
    lines += [f"  {line}" for line in plan.bounds]
    for key in plan.shadowed:
        lines.append(f"  {key!r} is an input for the stage of that name, and that stage for all others")
    return lines


def _cells(one: PlannedStage) -> tuple[str, str, str, str]:
    role = one.role if one.over is None else f"{one.role} over {one.over}"
    return one.name, role, one.kind + ("" if one.kind_declared else " (default)"), one.lane


def _details(one: PlannedStage) -> list[str]:
    lines = []
    for b in one.bindings:
        if b.source in ("acc", "ctx"):
            continue
        said = f"{b.param} <- {b.origin}"
        if b.by_name and b.source == "stage":
            said += " (by name alone)"
        if b.may_be_absent:
            said += f"; may be absent: then {b.may_be_absent}"
        lines.append(said)
    bound = {b.origin for b in one.bindings}
    only_after = [d for d in one.depends_on if d != one.over and not any(f"stage {d!r}" in origin for origin in bound)]
    if only_after:
        lines.append(f"after {', '.join(only_after)}")
    if one.gives is not None:
        lines.append(f"gives {one.gives}" + (" (contract, checked)" if one.contract is not None else ""))
    shown = {key: value for key, value in one.policies.items() if key != "contract"}
    if shown:
        lines.append(", ".join(f"{key}={value}" for key, value in shown.items()))
    return lines + list(one.notes)
