"""What the scheduler needs to know of a graph, computed once per graph and placement, shared by all runs.

May not import: asyncio, threading, time, random, logging, `stageflow.runtime`, any executor.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import Final

from stageflow.core.kinds import StageKind
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.policies import DEFAULT_POLICIES, asks_for_worker
from stageflow.pipeline.spec import Role

#: how the items of a stage may be handed over: in blocks, or so only where each takes no longer than the hand-over
BLOCKS: Final = 1
BRIEF: Final = 2
#: items a block of a short stage may have
MAX_BLOCK: Final = 512

_keys = itertools.count(1)


class Layout:
    """Integer-indexed view of a graph with its lanes.

    - `waits[i]`: dependencies that must have ended before stage i may start (element-wise ones are not among them);
    - `elements[i]`: the streams that stage i reads element by element, its `over` first;
    - `readers[i]`: the stages that read stream i element by element;
    - `collectors[i]`: how many stages need stream i as a whole;
    - `keeps[i]`: the values of stream i stay until the run ends;
    - `plain`: no streams, no guards with a retry path: the end of a stage only counts down its dependents;
    - `special[i]`: 1 where readiness has rules beyond "all dependencies are done";
    - `limited[i]`: 1 where admission has to be asked (concurrency, rate, tokens, resources);
    - `simple[i]`: 1 for a task with quiet policies (`Policies.quiet`) in a plain graph: nothing is asked before it
      starts or when it ends well;
    - `required[i]`: dependencies without whose value stage i is skipped;
    - `regions[i]`: the stages that run back to back with stage i, itself first;
    - `gates[i]`: guards that must have passed for good before stage i may start.
    """

    __slots__ = (
        "__weakref__",
        "block",
        "branches",
        "collectors",
        "deepest",
        "dependents",
        "depth",
        "elements",
        "expands",
        "gated_by",
        "gates",
        "graph",
        "has_resources",
        "keeps",
        "key",
        "lanes",
        "limited",
        "names",
        "plain",
        "priorities",
        "readers",
        "regions",
        "required",
        "roles",
        "simple",
        "size",
        "special",
        "specs",
        "waits",
    )

    def __init__(
        self,
        graph: StageGraph,
        lanes: Sequence[str],
        *,
        regions: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        specs = graph.specs
        self.regions = dict(regions or {})
        size = len(specs)
        self.graph = graph
        self.specs = specs
        self.size = size
        self.key = next(_keys)  # never given again: rates and durations are kept under it
        self.lanes = lanes
        self.depth = graph.depth
        self.deepest = max(1, max(graph.depth, default=0))
        self.dependents = graph.dependents
        self.roles = bytes(int(spec.role) for spec in specs)
        self.waits = array("i", [len(deps) for deps in graph.deps])
        self.elements: dict[int, tuple[int, ...]] = {}
        self.readers: dict[int, list[int]] = {}
        self.collectors: dict[int, int] = {}
        self.keeps: set[int] = set()
        self.expands: set[int] = set()
        self.required: dict[int, frozenset[int]] = {}
        self.gates: dict[int, tuple[int, ...]] = {}
        self.gated_by: dict[int, list[int]] = {}
        self.branches: dict[int, set[str]] = {}
        self.block = bytearray(size)
        special = bytearray(size)
        limited = bytearray(size)
        self.has_resources = False
        for i, spec in enumerate(specs):
            if spec.role != Role.TASK:
                self._stream(i)
            policies = spec.policies
            if policies is not DEFAULT_POLICIES:
                if policies.when is not None or policies.conditional:
                    special[i] = 1
                if policies.concurrency is not None or policies.rate is not None or policies.resources is not None:
                    limited[i] = 1
                    self.has_resources = self.has_resources or policies.resources is not None
            if spec.bindings:
                needed = [
                    b.ref
                    for b in spec.bindings
                    if b.source == "stage" and not b.has_default and not b.nullable and isinstance(b.ref, int)
                ]
                if needed:
                    self.required[i] = frozenset(needed)
        for stage, (router, branch) in graph.routes.items():
            self.branches.setdefault(router, set()).add(branch)
            special[stage] = 1
        self._gate_guards()
        for head, members in self.regions.items():
            if specs[members[-1]].policies.timeout is not None:
                self.block[head] = 0
        self.special = bytes(special)
        self.plain = not (self.elements or self.gated_by or graph.barriers)
        wanted = {i: spec.policies.priority for i, spec in enumerate(specs) if spec.policies.priority}
        self.priorities: dict[int, int] | None = wanted or None
        self.limited = bytes(limited)
        simple = bytearray(size)
        if self.plain and not graph.guard_paths:
            quiet: dict[int, bool] = {id(DEFAULT_POLICIES): True}  # equal policies are one object
            for i, spec in enumerate(specs):
                if spec.role == Role.TASK and not special[i]:
                    policies = spec.policies
                    known = quiet.get(id(policies))
                    if known is None:
                        known = quiet[id(policies)] = policies.quiet()
                    simple[i] = known
        self.simple = bytes(simple)
        for i in range(size):
            if self.roles[i] in (Role.SOURCE, Role.MAP) and (
                specs[i].policies.keep or (specs[i].policies.keep is None and self._unread(i))
            ):
                self.keeps.add(i)

    def _stream(self, i: int) -> None:
        """Sort out the element-wise and the barrier dependencies of a stream stage."""
        graph, spec = self.graph, self.specs[i]
        elements: list[int] = []
        if spec.over >= 0 and graph.streams[spec.over]:
            elements = [spec.over, *graph.joins.get(i, ())]
        elif spec.over >= 0 or spec.over_input is not None:
            self.expands.add(i)
        self.elements[i] = tuple(elements)
        for producer in elements:
            self.readers.setdefault(producer, []).append(i)
        self.waits[i] -= len(set(elements))
        policies = spec.policies
        timed = policies.timeout is not None or policies.total_timeout is not None or policies.rate is not None
        # a retry in the middle of a block would come after its followers
        strict = spec.role == Role.SINK and policies.ordered and policies.retry is not None
        # what acts around an attempt sees one item at a time
        around = policies.idempotency is not None
        around = around or any(not asks_for_worker(one) for one in policies.interceptors)
        if not (timed or strict or around) and spec.role in (Role.MAP, Role.SINK):
            if spec.kind is StageKind.TRANSFORM:
                self.block[i] = BLOCKS
            elif self.lanes[i] == "thread" or (
                self.lanes[i] in ("async", "inline") and not (spec.is_async or spec.is_generator)
            ):
                self.block[i] = BRIEF  # coroutines wait side by side, and a worker that is lost loses one item

    def _unread(self, i: int) -> bool:
        return not self.readers.get(i) and i not in self.collectors

    def _gate_guards(self) -> None:
        """Stages outside a guard's retry path that read a stage on it start only after the guard has passed."""
        for barriers in self.graph.barriers.values():
            for producer in barriers:
                self.collectors[producer] = self.collectors.get(producer, 0) + 1
        for guard, path in self.graph.guard_paths.items():
            inside = set(path)
            for stage in path:
                if stage == guard:
                    continue
                for reader in self.dependents[stage]:
                    if reader not in inside and guard not in self.gates.get(reader, ()):
                        self.gates[reader] = (*self.gates.get(reader, ()), guard)
                        self.gated_by.setdefault(guard, []).append(reader)
                        self.waits[reader] += 1

    def priority(self, stage: int) -> int:
        """The stage's priority; higher goes first."""
        return 0 if self.priorities is None else self.priorities.get(stage, 0)

    def name(self, stage: int) -> str:
        """The stage's name."""
        return self.specs[stage].name

    def __reduce__(self) -> tuple[object, ...]:
        return Layout, (self.graph, list(self.lanes))
