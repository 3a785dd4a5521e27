"""Pipelines as data: what each stage does, and what goes wrong in it.

The runners pickle and behave alike in every lane, so one sketch is a graph for the engine and a task for the reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from stageflow.core.kinds import DROP, StageKind
from stageflow.core.output import StageOutput
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.policies import RetryConfig

__all__ = ["Fate", "FlatRunner", "GraphSketch", "HangError", "Reference", "Runner", "SourceRunner", "StageSketch"]

PRIME: Final = 1_000_003


@dataclass(frozen=True, slots=True)
class Fate:
    """What goes wrong: with items whose value is `rest` modulo `every`, in their first `times` attempts.

    `how` is "error" (raises), "fail" or "retry" (returns that output), "hang" (never ends), "skip", "drop". A plain
    stage has one value, 0.
    """

    how: str
    every: int = 1
    rest: int = 0
    times: int = 1_000_000

    def strikes(self, value: int, attempt: int) -> bool:
        """Whether it goes wrong this time."""
        return attempt <= self.times and value % self.every == self.rest % self.every


@dataclass(frozen=True, slots=True)
class StageSketch:
    """One stage. `reads` are stages whose whole value it takes; `over` the stream it goes over, `joined` another one
    that it takes element by element."""

    name: str
    role: str  #: stage | source | map | flat | batch | reduce | fold | sink | guard | route
    lane: str = "inline"
    reads: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    over: str | None = None
    joined: str | None = None
    length: int = 0  #: of a source, or of the list that a stage gives
    breaks_at: int | None = None  #: the source raises instead of giving this element
    fate: Fate | None = None
    attempts: int = 1  #: of its retry policy; 1 = no policy
    routes: tuple[str, ...] = ()  #: what a router chooses
    passes_after: int = 0  #: a guard fails this often, then passes
    policies: Mapping[str, Any] = field(default_factory=dict)


def digest(values: Any) -> int:
    """A number that depends on the values and their order."""
    total = 7
    for value in values:
        total = (total * 31 + (digest(value) if isinstance(value, list | tuple) else int(value))) % PRIME
    return total


class Runner:
    """The function of a sketched stage. Its parameters are those the sketch binds."""

    def __init__(self, sketch: StageSketch) -> None:
        self.sketch = sketch
        names = [*(["acc", "item"] if sketch.role in ("reduce", "fold") else [])]
        if sketch.role in ("map", "flat", "batch", "sink"):
            names.append("item")
        if sketch.joined:
            names.append(sketch.joined)
        names += [*sketch.reads, "ctx"]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        self.__signature__ = inspect.Signature(parameters)
        self.names = names
        self.known = frozenset(names)
        self.__qualname__ = f"Runner({sketch.name})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.sketch,)

    def __call__(self, *args: Any, **named: Any) -> Any:
        bound = self.bound(args, named)
        return self.answer(bound, bound.pop("ctx"))

    def bound(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; TypeError where they do not fit. (`Signature.bind` costs as much as the rest.)"""
        named.update(zip(self.names, args, strict=False))
        if named.keys() != self.known or len(args) > len(self.names):
            raise TypeError(f"{self.__qualname__} takes {', '.join(self.names)}, not {', '.join(named)}")
        return named

    def answer(self, given: dict[str, Any], ctx: Any) -> Any:
        """What the stage gives for its arguments."""
        sketch = self.sketch
        role = sketch.role
        common = digest(plain(given[name]) for name in sketch.reads)
        if role == "batch":
            gone = self.trouble(max(given["item"], key=lambda item: self.hits(item, ctx.attempt)), ctx)
            return gone if gone is not None else [(item * 3 + common) % PRIME for item in given["item"]]
        if role in ("reduce", "fold"):
            self.trouble(given["item"], ctx)
            acc, item = given["acc"], given["item"]
            return [*acc, item] if role == "fold" else (acc * 31 + item + common) % PRIME
        value = given.get("item", 0)
        gone = self.trouble(value, ctx)
        if gone is not None:
            return gone
        if role in ("map", "sink"):
            other = given[sketch.joined] if sketch.joined else 0
            return (value * 3 + other + common) % PRIME
        if role == "guard":
            seen = (ctx.feedback or {}).get("attempt", 0)
            return StageOutput.fail(f"not yet ({seen})") if seen < sketch.passes_after else seen
        if role == "route":
            return list(sketch.routes)
        if sketch.length:
            return [(common + index) % PRIME for index in range(sketch.length)]
        return (common * 5 + 1) % PRIME

    def hits(self, value: int, attempt: int) -> bool:
        """Whether the sketch's fate strikes this value now."""
        return self.sketch.fate is not None and self.sketch.fate.strikes(value, attempt)

    def trouble(self, value: int, ctx: Any) -> Any:
        """The fate of this value in this attempt; None where nothing is wrong."""
        if not self.hits(value, ctx.attempt):
            return None
        assert self.sketch.fate is not None
        how = self.sketch.fate.how
        if how == "error":
            raise ValueError(f"{self.sketch.name} cannot take {value}")
        if how == "hang":
            raise HangError
        made = {
            "fail": StageOutput.fail("failed on purpose"),
            "retry": StageOutput.retry("again"),
            "skip": StageOutput.skip("skipped on purpose"),
        }
        return made.get(how, DROP)


class SourceRunner(Runner):
    """A source: gives numbers, and may break."""

    def __call__(self, *args: Any, **named: Any) -> Iterator[int]:
        bound = self.bound(args, named)
        common = digest(plain(bound[name]) for name in self.sketch.reads)
        for index in range(self.sketch.length):
            if index == self.sketch.breaks_at:
                raise ValueError(f"{self.sketch.name} broke at {index}")
            yield (common + index) % PRIME


class FlatRunner(Runner):
    """A flat-map: gives none, one or two for each."""

    def __call__(self, *args: Any, **named: Any) -> Iterator[int]:
        bound = self.bound(args, named)
        item, ctx = bound["item"], bound["ctx"]
        if self.trouble(item, ctx) is not None:
            return
        for copy in range(item % 3):
            yield (item + copy) % PRIME


class HangError(BaseException):
    """Raised where a stage of the sketch would not end; a simulated driver stops it when its timeout is due."""


def plain(value: Any) -> list[Any]:
    """A value as `digest` takes it."""
    if value is None:
        return [0]
    if isinstance(value, int):
        return [value]
    return list(value)


def joined_lists(a: list[Any], b: list[Any]) -> list[Any]:
    """`combine` of the sketched folds."""
    return [*a, *b]


@dataclass(slots=True)
class Reference:
    """What must come out: the run's status, and (where it ran to its end) each stage's state and value."""

    status: str
    states: dict[str, str] = field(default_factory=dict)  #: ok | skip | fail
    values: dict[str, Any] = field(default_factory=dict)  #: of stages that are ok; lists for streams
    lost: dict[str, int] = field(default_factory=dict)  #: failed items per stage


@dataclass(frozen=True, slots=True)
class GraphSketch:
    """A pipeline as data."""

    stages: tuple[StageSketch, ...]
    mode: str = "fail_fast"

    def build(self) -> StageGraph:
        """The compiled graph."""
        builder = PipelineBuilder("sketch")
        for sketch in self.stages:
            _declare(builder, sketch)
        return builder.build()

    def reference(self) -> Reference:
        """The right answer, worked out stage by stage without any engine."""
        from stageflow.testing.reference import work_out

        return work_out(self)


def _declare(builder: PipelineBuilder, sketch: StageSketch) -> None:
    policies: dict[str, Any] = dict(sketch.policies)
    if sketch.attempts > 1:
        policies["retry"] = RetryConfig(max_attempts=sketch.attempts, base_delay_ms=1000)
    policies["executor"] = sketch.lane
    role = sketch.role
    if role == "source":
        builder.stage(sketch.name, SourceRunner(sketch), sketch.after, **policies)
    elif role in ("stage", "guard", "route"):
        kind = {"stage": None, "guard": StageKind.GUARD, "route": StageKind.ROUTE}[role]
        builder.stage(sketch.name, Runner(sketch), sketch.after, kind=kind, **policies)
    else:
        assert sketch.over is not None
        if role == "flat":
            builder.map(sketch.name, FlatRunner(sketch), sketch.over, sketch.after, **policies)
        elif role in ("map", "batch"):
            builder.map(sketch.name, Runner(sketch), sketch.over, sketch.after, **policies)
        elif role == "sink":
            builder.sink(sketch.name, Runner(sketch), sketch.over, sketch.after, **policies)
        elif role == "fold":
            builder.reduce(
                sketch.name, Runner(sketch), sketch.over, sketch.after,
                initial=[], combine=joined_lists, block=4, **policies,
            )  # fmt: skip
        else:
            builder.reduce(sketch.name, Runner(sketch), sketch.over, sketch.after, initial=7, **policies)
