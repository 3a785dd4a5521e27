"""The compiled pipeline: immutable, integer-indexed, re-entrant. Holds no state of any run.

A stage's number is its place in the order of declaration. Everything another room asks per stage is an index into a
list or an array; a graph of a million stages costs some hundred bytes per stage.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Literal

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.pipeline.names import did_you_mean, nearest
from stageflow.pipeline.spec import StageSpec

#: a layer above this room, so it is named and not imported
_RUNTIME = "stageflow.runtime.api"


class StageGraph(msgspec.Struct, frozen=True, eq=False, weakref=True):
    """A validated DAG. Any number of runs may use it at once: they share nothing in it.

    - `deps[i]` / `dependents[i]`: stages directly before / after stage i, in the order named, each once;
    - `depth[i]`: edges on the longest path from a root; `order`: topological, by declaration where free;
    - `inputs` / `optional_inputs`: key -> annotation (None when unknown);
    - `space[i]`: the index space of the elements that a source or map gives, -1 elsewhere; equal numbers mean that
      elements with the same index path belong together;
    - `joins[i]`: sources and maps that stage i reads element by element beside its `over`;
    - `barriers[i]`: sources and maps whose whole sequence stage i needs;
    - `streams[i]`: 1 where the value is a stream of elements (source, map);
    - `routes[i]`: (number of the ROUTE stage, branch) for stages declared `when="branch"`;
    - `guard_paths[i]`: for a guard with `guard_retry`, the stages to run again, the retried one first and the guard
      last;
    - `memo`: what the runtime has worked out from the graph. It goes with the graph, and is never pickled.
    """

    name: str
    specs: list[StageSpec]
    index: dict[str, int]
    deps: list[tuple[int, ...]]
    dependents: list[tuple[int, ...]]
    depth: array[int]
    order: array[int]
    inputs: dict[str, Any]
    optional_inputs: dict[str, Any]
    inputs_declared: bool
    space: array[int]
    joins: dict[int, tuple[int, ...]]
    barriers: dict[int, tuple[int, ...]]
    streams: bytes
    routes: dict[int, tuple[int, str]] = msgspec.field(default_factory=dict)
    guard_paths: dict[int, tuple[int, ...]] = msgspec.field(default_factory=dict)
    memo: dict[Any, Any] = msgspec.field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return StageGraph, tuple({} if name == "memo" else getattr(self, name) for name in self.__struct_fields__)

    def __repr__(self) -> str:
        return f"<StageGraph {self.name!r}: {len(self.specs)} stages>"

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.index

    # ------------------------------------------------------------ reading

    @property
    def stage_count(self) -> int:
        """How many stages it has."""
        return len(self.specs)

    @property
    def execution_order(self) -> list[str]:
        """Names in topological order: every stage after all of its dependencies."""
        specs = self.specs
        return [specs[i].name for i in self.order]

    def stage_spec(self, name: str) -> StageSpec:
        """The stage called `name`; DefinitionError with the nearest names if there is none."""
        return self.specs[self.number_of(name)]

    def stage_specs(self) -> list[StageSpec]:
        """Every stage, in the order of declaration."""
        return list(self.specs)

    def number_of(self, stage: Any) -> int:
        """The number of a stage given by name, or by its runner where that serves exactly one stage."""
        if isinstance(stage, str):
            found = self.index.get(stage)
            if found is not None:
                return found
            hint = did_you_mean(stage, self.index, what="Stages")
            raise DefinitionError(f"pipeline {self.name!r} has no stage {stage!r}", hint=hint, stage=stage)
        serving = [i for i, spec in enumerate(self.specs) if spec.runner is stage]
        if len(serving) == 1:
            return serving[0]
        label = getattr(stage, "__qualname__", repr(stage))
        if not serving:
            raise DefinitionError(
                f"{label} is the runner of no stage of pipeline {self.name!r}", hint="Give the stage's name."
            )
        names = ", ".join(self.specs[i].name for i in serving[:6])
        raise DefinitionError(
            f"{label} is the runner of several stages ({names})", hint="Give the name of one of them."
        )

    def reads(self, j: int, i: int) -> bool:
        """True when stage j reads what stage i gives.

        An object stage, or a function with `ctx`, may read all it declares.
        """
        spec = self.specs[j]
        if spec.over == i or i in self.barriers.get(j, ()) or i in self.joins.get(j, ()):
            return True
        if spec.form in ("object", "class"):
            return True
        if any(b.source == "stage" and b.ref == i for b in spec.bindings):
            return True
        return spec.wants_ctx and i in self.deps[j]

    @property
    def roots(self) -> tuple[int, ...]:
        """Stages without dependencies."""
        return tuple(i for i, deps in enumerate(self.deps) if not deps)

    def check_inputs(self, given: Iterable[str]) -> None:
        """Raise DefinitionError when a required input is not among `given`: stage, parameter, nearest names."""
        keys = set(given)
        missing = [key for key in self.inputs if key not in keys]
        if not missing:
            return
        lines = [self._missing_text(key) for key in missing]
        hints = []
        for key in missing:
            near = nearest(key, [*(keys - self.inputs.keys()), *self.index])
            kind = [f"{'stage' if one in self.index else 'given input'} {one!r}" for one in near]
            hints.append(f"Give inputs={{{key!r}: ...}}" + (f", or did you mean {' or '.join(kind)}?" if near else "."))
        raise DefinitionError(
            f"pipeline {self.name!r} cannot start: " + "; ".join(lines),
            hint=" ".join(hints),
            missing=missing,
            given=sorted(keys),
        )

    def _missing_text(self, key: str) -> str:
        for spec in self.specs:
            if spec.over_input == key:
                return f"input {key!r} is missing: stage {spec.name!r} takes its elements"
            for binding in spec.bindings:
                if binding.source == "input" and binding.ref == key:
                    return f"input {key!r} is missing: stage {spec.name!r} needs it for {binding.param!r}"
        return f"declared input {key!r} is missing"

    # ------------------------------------------------------------ running

    def run(
        self, inputs: Mapping[str, Any] | None = None, *, snapshot: Any = None, engine: Any = None, **config: Any
    ) -> Any:
        """Run once and return the RunResult; blocks.

        Not for use inside a running event loop: there, await `execute`.
        """
        return import_module(_RUNTIME).run(self, inputs, snapshot=snapshot, engine=engine, **config)

    async def execute(
        self,
        ctx: Any = None,
        snapshot: Any = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        engine: Any = None,
        **config: Any,
    ) -> Any:
        """Run once on the caller's event loop and return the RunResult. Cancelling the caller cancels the run."""
        return await import_module(_RUNTIME).execute(self, ctx, snapshot, inputs=inputs, engine=engine, **config)

    def stream(
        self,
        snapshots: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        max_in_flight: int | None = None,
        engine: Any = None,
        **config: Any,
    ) -> AsyncIterator[Any]:
        """Run once per snapshot (or input mapping), pulled lazily, and yield a RunResult for each.

        Closing the iterator early cancels what is in flight and returns when it has stopped.
        """
        stream: AsyncIterator[Any] = import_module(_RUNTIME).stream(
            self, snapshots, ordered=ordered, max_in_flight=max_in_flight, engine=engine, **config
        )
        return stream

    def run_many(
        self,
        snapshots: Iterable[Any],
        *,
        ordered: bool = True,
        max_in_flight: int | None = None,
        engine: Any = None,
        **config: Any,
    ) -> Iterator[Any]:
        """`stream` for code without an event loop."""
        results: Iterator[Any] = import_module(_RUNTIME).run_many(
            self, snapshots, ordered=ordered, max_in_flight=max_in_flight, engine=engine, **config
        )
        return results

    # ------------------------------------------------------------ looking

    def plan(self, config: Any = None) -> Any:
        """What would run where, and why; starts nothing. `config` is an EngineConfig or a mapping of its fields."""
        return import_module("stageflow.pipeline.plan").make_plan(self, config)

    def draw(self, format: Literal["text", "mermaid", "dot", "svg"] = "text") -> str:
        """The graph as text, as Mermaid or DOT source, or as an SVG picture."""
        text: str = import_module("stageflow.pipeline.draw").draw(self, format)
        return text
