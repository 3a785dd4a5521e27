"""One stage as data: what the builder was told, resolved to integers."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, Literal

import msgspec

from stageflow.core.kinds import UNSET, StageKind
from stageflow.pipeline.policies import Policies

Form = Literal["function", "object", "class", "graph"]
Source = Literal["stage", "input", "ctx", "element", "acc", "default"]

#: elements per fold of a reduce; fixed, so that a result does not depend on workers, batches or timing
BLOCK: Final = 256


class Role(IntEnum):
    """How a stage is driven."""

    TASK = 0  #: once per run
    SOURCE = 1  #: a generator: once per run, giving elements
    MAP = 2  #: once per element of `over`
    REDUCE = 3  #: folds the elements of `over` into one value
    SINK = 4  #: a map whose results are not kept


class Binding(msgspec.Struct, frozen=True, gc=False):
    """Where one parameter gets its value.

    `ref` is a stage's number for "stage", a key of the inputs for "input", else None. What a "stage" binding of a map
    gives is said by the graph: one element where it is in `graph.joins`, else the whole value. `default` is set where a
    positional-only parameter must be passed its default because a later one is bound.
    """

    param: str
    source: Source
    ref: int | str | None = None
    positional: bool = False
    has_default: bool = False
    nullable: bool = False
    by_name: bool = False
    default: Any = UNSET


class ReduceSpec(msgspec.Struct, frozen=True):
    """What only a reduce has. Without `has_initial` the first element starts the fold."""

    initial: Any = None
    has_initial: bool = False
    combine: Callable[[Any, Any], Any] | None = None
    block: int = BLOCK


class StageSpec(msgspec.Struct, frozen=True, eq=False):
    """One stage of a compiled graph.

    `bindings` is empty for object stages; `declared_deps` are the names of every upstream stage.

    `over` is the number of the stage whose elements a map, reduce or sink takes, or -1; `over_input` is then the key of
    the input it takes them from, or None.
    """

    name: str
    runner: Any
    role: Role
    kind: StageKind
    form: Form
    is_async: bool
    is_generator: bool
    wants_ctx: bool
    kind_declared: bool
    over: int
    over_input: str | None
    bindings: tuple[Binding, ...]
    policies: Policies
    reduce: ReduceSpec | None
    declared_deps: tuple[str, ...]
