"""Random pipelines whose right answer is known: hypothesis strategies, and a reference that runs without any engine.

A `GraphSketch` is a pipeline as data. `sketch.build()` is the graph, with runners that pickle and behave alike in every
lane; `sketch.reference()` says what must come out. hypothesis is imported when a strategy is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from stageflow.core.kinds import DROP, StageKind
from stageflow.core.output import StageOutput
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.policies import GuardRetryPolicy, RetryConfig

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Fate", "GraphSketch", "Reference", "StageSketch", "graphs", "random_sketch"]

_PRIME: Final = 1_000_003


class Dice(Protocol):
    """What `random_sketch` needs: a `random.Random`, or hypothesis' own."""

    def randint(self, a: int, b: int) -> int: ...
    def random(self) -> float: ...


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
        total = (total * 31 + (digest(value) if isinstance(value, list | tuple) else int(value))) % _PRIME
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
        self.__qualname__ = f"Runner({sketch.name})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.sketch,)

    def __call__(self, *args: Any, **named: Any) -> Any:
        bound = self.__signature__.bind(*args, **named).arguments
        ctx = bound.pop("ctx")
        return self.answer(bound, ctx)

    def answer(self, given: dict[str, Any], ctx: Any) -> Any:
        """What the stage gives for its arguments."""
        sketch = self.sketch
        role = sketch.role
        common = digest(_plain(given[name]) for name in sketch.reads)
        if role == "batch":
            gone = self.trouble(max(given["item"], key=lambda item: self.hits(item, ctx.attempt)), ctx)
            return gone if gone is not None else [(item * 3 + common) % _PRIME for item in given["item"]]
        if role in ("reduce", "fold"):
            self.trouble(given["item"], ctx)
            acc, item = given["acc"], given["item"]
            return [*acc, item] if role == "fold" else (acc * 31 + item + common) % _PRIME
        value = given.get("item", 0)
        gone = self.trouble(value, ctx)
        if gone is not None:
            return gone
        if role in ("map", "sink"):
            other = given[sketch.joined] if sketch.joined else 0
            return (value * 3 + other + common) % _PRIME
        if role == "guard":
            seen = (ctx.feedback or {}).get("attempt", 0)
            return StageOutput.fail(f"not yet ({seen})") if seen < sketch.passes_after else seen
        if role == "route":
            return list(sketch.routes)
        if sketch.length:
            return [(common + index) % _PRIME for index in range(sketch.length)]
        return (common * 5 + 1) % _PRIME

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
        bound = self.__signature__.bind(*args, **named).arguments
        common = digest(_plain(bound[name]) for name in self.sketch.reads)
        for index in range(self.sketch.length):
            if index == self.sketch.breaks_at:
                raise ValueError(f"{self.sketch.name} broke at {index}")
            yield (common + index) % _PRIME


class FlatRunner(Runner):
    """A flat-map: gives none, one or two for each."""

    def __call__(self, *args: Any, **named: Any) -> Iterator[int]:
        bound = self.__signature__.bind(*args, **named).arguments
        item, ctx = bound["item"], bound["ctx"]
        if self.trouble(item, ctx) is not None:
            return
        for copy in range(item % 3):
            yield (item + copy) % _PRIME


class HangError(BaseException):
    """Raised where a stage of the sketch would not end; a simulated driver stops it when its timeout is due."""


def _plain(value: Any) -> list[Any]:
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
        return _Interpreter(self).run()


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


class _Context:
    """As much of a StageContext as the runners read."""

    def __init__(self, attempt: int, feedback: Mapping[str, Any] | None = None) -> None:
        self.attempt = attempt
        self.feedback = feedback


class _Interpreter:
    """Runs a sketch in order, one call after the other, by the letter of the rules."""

    def __init__(self, sketch: GraphSketch) -> None:
        self.sketch = sketch
        self.by_name = {stage.name: stage for stage in sketch.stages}
        self.made = Reference("completed")
        self.paths: dict[str, dict[int, int]] = {}  # stream -> its values by index
        self.blame: dict[str, str] = {}  # stage -> the failed stage behind it
        self.fatal = False

    def run(self) -> Reference:
        made = self.made
        for stage in self.sketch.stages:
            reason = self.why_not(stage)
            if reason is not None:
                made.states[stage.name] = "skip"
                continue
            self.one(stage)
            if made.states[stage.name] == "fail" and self.mode(stage.name) == "fail_fast":
                self.fatal = True
            lost = made.lost.get(stage.name, 0)
            if lost and stage.policies.get("max_failed_items") is None and self.mode(stage.name) == "fail_fast":
                self.fatal = True
        if self.fatal:
            return Reference("failed")
        if made.lost or "fail" in made.states.values():
            made.status = "failed"
        return made

    def mode(self, name: str) -> str:
        own = self.by_name[name].policies.get("on_failure")
        return str(own) if own is not None else self.sketch.mode

    def why_not(self, stage: StageSketch) -> str | None:
        """The reason for which the stage is skipped."""
        states = self.made.states
        elements = [name for name in (stage.over, stage.joined) if name is not None and self.is_stream(name)]
        whole = [*stage.reads, *stage.after]
        if stage.over is not None and not elements:
            whole.append(stage.over)
        when = stage.policies.get("when")
        if isinstance(when, tuple):
            whole.append(when[0])
        absent = []
        for name in [*whole, *elements]:
            culprit = name if states[name] == "fail" else self.blame.get(name)
            if culprit is not None and self.mode(culprit) == "best_effort":
                culprit = None
            if culprit is not None and (name in whole or stage.role in ("reduce", "fold") or not self.paths.get(name)):
                self.blame[stage.name] = culprit
                return "upstream_failed"
            if culprit is not None:
                self.blame[stage.name] = culprit
            elif states[name] == "skip" and name in elements:
                return "all dependencies were skipped"
            if states[name] in ("fail", "skip"):
                absent.append(name)
        if isinstance(when, tuple):
            router = self.by_name[when[0]]
            if states[router.name] != "ok" or when[1] not in router.routes:
                return "route"
        every = [*dict.fromkeys([*whole, *elements])]
        if every and all(states[name] == "skip" and name not in self.blame for name in every):
            return "all dependencies were skipped"
        if stage.policies.get("conditional") and any(states[name] == "skip" for name in every):
            return "conditional"
        if any(name in absent and name not in elements for name in (*stage.reads, stage.over)):
            return "input_absent"
        return None

    def is_stream(self, name: str) -> bool:
        return self.by_name[name].role in ("source", "map", "flat", "batch")

    def elements(self, stage: StageSketch) -> dict[int, dict[str, int]]:
        """The arguments of every item, by index."""
        assert stage.over is not None
        if not self.is_stream(stage.over):
            return {i: {"item": item} for i, item in enumerate(self.made.values[stage.over])}
        found = {i: {"item": item} for i, item in self.paths[stage.over].items()}
        if stage.joined is not None:
            other = self.paths[stage.joined]
            found = {i: {**given, stage.joined: other[i]} for i, given in found.items() if i in other}
        return found

    def one(self, stage: StageSketch) -> None:
        made = self.made
        common = {name: self.whole(name) for name in stage.reads}
        if stage.role == "source":
            given = []
            made.states[stage.name] = "ok"
            try:
                for item in SourceRunner(stage)(**common, ctx=None):
                    given.append(item)
            except ValueError:
                made.states[stage.name] = "fail"
            self.paths[stage.name] = dict(enumerate(given))
            made.values[stage.name] = given
        elif stage.role in ("map", "flat", "batch", "sink"):
            self.stream(stage, common)
        elif stage.role in ("reduce", "fold"):
            self.reduce(stage, common)
        else:
            self.task(stage, common)

    def task(self, stage: StageSketch, common: dict[str, Any]) -> None:
        """A plain stage; a guard may have its path run again, which gives the same values again."""
        guard = stage.policies.get("guard_retry")
        rounds = guard.max_attempts if guard is not None else 1
        state, value = "fail", None
        for round_ in range(rounds):
            feedback = {"attempt": round_} if round_ else None
            state, value = self.tries(stage, Runner(stage), {**common}, feedback)
            if state == "ok" or state == "skip":
                break
        self.made.states[stage.name] = state
        if state == "ok":
            self.made.values[stage.name] = value

    def stream(self, stage: StageSketch, common: dict[str, Any]) -> None:
        made = self.made
        runner = FlatRunner(stage) if stage.role == "flat" else Runner(stage)
        kept: dict[int, Any] = {}
        elements = self.elements(stage)
        failed = 0
        for index, given in sorted(elements.items()):
            named: dict[str, Any] = {**given, **common}
            if stage.role == "batch":
                named["item"] = [given["item"]]
            state, result = self.tries(stage, runner, named, None)
            if state == "ok":
                kept[index] = result[0] if stage.role == "batch" else result
            elif state == "fail":
                failed += 1
        if failed:
            made.lost[stage.name] = failed
        if stage.role == "flat":
            kept = dict(enumerate(item for index in sorted(kept) for item in kept[index]))
        self.paths[stage.name] = kept
        made.values[stage.name] = [kept[index] for index in sorted(kept)]
        made.states[stage.name] = "ok"
        budget = stage.policies.get("max_failed_items")
        if failed and budget is not None:
            most = budget if isinstance(budget, int) else budget * self.width(stage)
            if failed > most:
                made.states[stage.name] = "fail"

    def width(self, stage: StageSketch) -> int:
        """Indices of the space that the stage's items come from."""
        assert stage.over is not None
        over = self.by_name[stage.over]
        if over.role in ("map", "batch"):
            return self.width(over)
        return len(self.made.values[stage.over])

    def reduce(self, stage: StageSketch, common: dict[str, Any]) -> None:
        made = self.made
        items = [given["item"] for _, given in sorted(self.elements(stage).items())]
        fate = stage.fate
        made.states[stage.name] = "ok"
        if fate is not None and fate.times >= stage.attempts and any(fate.strikes(item, 1) for item in items):
            made.states[stage.name] = "fail"
            return
        clean = Runner(StageSketch(stage.name, stage.role, reads=stage.reads))
        acc: Any = [] if stage.role == "fold" else 7
        for item in items:
            acc = clean(acc, item, **common, ctx=_Context(1))
        made.values[stage.name] = acc

    def whole(self, name: str) -> Any:
        return self.made.values.get(name)

    def tries(self, stage: StageSketch, runner: Runner, given: dict[str, Any], feedback: Any) -> tuple[str, Any]:
        """All attempts of one call: (ok | skip | drop | fail, value)."""
        for attempt in range(1, stage.attempts + 1):
            try:
                result = runner(**given, ctx=_Context(attempt, feedback))
                if stage.role == "flat":
                    result = list(result)
            except (ValueError, HangError):
                continue
            if result is DROP:
                return "drop", None
            if isinstance(result, StageOutput):
                status = str(result.status)
                if status == "skip":
                    return ("skip" if stage.role in ("stage", "guard", "route") else "drop"), None
                if status == "fail":
                    return "fail", None
                continue  # retry
            return "ok", result
        return "fail", None


# ---------------------------------------------------------------- making them up


class _Maker:
    """Adds one random stage after the other."""

    def __init__(self, dice: Dice, lanes: Sequence[str], faults: bool) -> None:
        self.dice = dice
        self.lanes = lanes
        self.faults = faults
        self.stages: list[StageSketch] = []
        self.streams: list[str] = []
        self.values: list[str] = []
        self.lists: list[str] = []
        self.space: dict[str, str] = {}  # stream -> the stream whose indices it has

    def maybe(self, share: float) -> bool:
        return self.dice.randint(0, 99) < share * 100

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.dice.randint(0, len(options) - 1)]

    def some(self, options: Sequence[str], most: int) -> tuple[str, ...]:
        found: list[str] = []
        for _ in range(self.dice.randint(0, min(most, len(options)))):
            one = self.pick(options)
            if one not in found:
                found.append(one)
        return tuple(found)

    def fate(self, kinds: Sequence[str], *, items: bool) -> tuple[Fate | None, int]:
        attempts = self.dice.randint(1, 3) if self.maybe(0.5) else 1
        if not self.faults or not self.maybe(0.4):
            return None, attempts
        every = self.dice.randint(2, 7) if items else 1
        times = self.dice.randint(1, 4)
        how = self.pick(kinds)
        if how in ("drop", "skip"):
            times = 1_000_000
        return Fate(how, every, self.dice.randint(0, every - 1), times), attempts

    def policies(self, fate: Fate | None) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if self.maybe(0.15):
            made["concurrency"] = self.dice.randint(1, 3)
        if self.maybe(0.15):
            made["priority"] = self.dice.randint(-2, 2)
        if self.maybe(0.1):
            made["rate"] = f"{self.dice.randint(1, 50)}/s"
        if self.maybe(0.15):
            from stageflow.pipeline.policies import Resources

            tokens = {"gpu": self.dice.randint(1, 2)} if self.maybe(0.7) else {}
            memory, cpu = self.pick([None, None, 100, 3000, 10**9]), self.pick([None, None, 0.5, 2, 9])
            made["resources"] = Resources(tokens=tokens, memory=memory, cpu=cpu)
        if self.faults and self.maybe(0.2):
            made["on_failure"] = self.pick(["continue_on_failure", "best_effort", "fail_fast"])
        if fate is not None and fate.how == "hang":
            made["timeout"] = 5.0
        return made

    def add(self, stage: StageSketch) -> None:
        self.stages.append(stage)

    def step(self) -> None:
        number = len(self.stages)
        name = f"s{number}"
        lane = self.pick(self.lanes)
        choice = self.dice.randint(0, 11)
        everything = [stage.name for stage in self.stages if stage.role != "sink"]
        if choice <= 1 or not self.stages:
            reads = self.some(self.values, 2)
            length = self.dice.randint(0, 40)
            breaks = self.dice.randint(0, length) if self.faults and self.maybe(0.1) else None
            self.add(StageSketch(name, "source", lane, reads, length=length, breaks_at=breaks))
            self.streams.append(name)
            self.space[name] = name
        elif choice <= 4 or not (self.streams or self.lists):
            self.plain(name, lane, everything)
        elif choice == 5 and self.faults:
            self.branching(name, lane)
        elif choice == 6 and self.faults:
            self.guarded(name, lane)
        elif choice <= 9:
            self.mapping(name, lane)
        else:
            self.folding(name, lane)

    def plain(self, name: str, lane: str, everything: list[str]) -> None:
        fate, attempts = self.fate(["error", "fail", "retry", "skip", "hang"], items=False)
        policies = self.policies(fate)
        if self.faults and self.maybe(0.2):
            policies["conditional"] = True
        length = self.dice.randint(1, 12) if self.maybe(0.3) else 0
        reads = self.some(everything, 2)
        after = tuple(one for one in self.some(everything, 1) if one not in reads)
        self.add(
            StageSketch(
                name, "stage", lane, reads, after, length=length, fate=fate, attempts=attempts, policies=policies
            )
        )
        self.values.append(name)
        if length:
            self.lists.append(name)

    def branching(self, name: str, lane: str) -> None:
        branches = [f"{name}b{i}" for i in range(self.dice.randint(1, 3))]
        chosen = tuple(one for one in branches if self.maybe(0.6))
        self.add(StageSketch(name, "route", lane, self.some(self.values, 1), routes=chosen))
        for branch in branches:
            policies = {"when": (name, branch)}
            self.add(StageSketch(branch, "stage", lane, after=(name,), policies=policies))
            self.values.append(branch)
        self.add(StageSketch(f"{name}m", "stage", lane, after=tuple(branches)))
        self.values.append(f"{name}m")

    def guarded(self, name: str, lane: str) -> None:
        policy = GuardRetryPolicy(name, max_attempts=self.dice.randint(1, 4), stagnation_limit=50)
        self.add(StageSketch(name, "stage", lane, self.some(self.values, 2)))
        path: tuple[str, ...] = (name,)
        if self.maybe(0.5):
            self.add(StageSketch(f"{name}p", "stage", lane, (name,)))
            path = (name, f"{name}p")
        self.add(
            StageSketch(
                f"{name}g", "guard", lane, path,
                passes_after=self.dice.randint(0, 3), policies={"guard_retry": policy},
            )
        )  # fmt: skip
        if self.maybe(0.5):
            self.add(StageSketch(f"{name}o", "stage", lane, (name,)))
            self.values.append(f"{name}o")
        self.values.extend((name, f"{name}g"))

    def mapping(self, name: str, lane: str) -> None:
        over = self.pick([*self.streams, *self.lists])
        role = self.pick(["map", "map", "map", "flat", "batch", "sink"])
        kinds = ["error", "fail", "retry", "skip", "drop"] if role != "batch" else ["error"]
        if role in ("map", "sink"):
            kinds.append("hang")
        if role == "flat":
            kinds = ["error"]
        fate, attempts = self.fate(kinds, items=True)
        policies = self.policies(fate)
        joined = None
        if role == "map" and over in self.space and self.maybe(0.3):
            others = [one for one in self.streams if one != over and self.space.get(one) == self.space[over]]
            joined = self.pick(others) if others else None
        if role == "batch":
            policies["batch"] = self.dice.randint(1, 6)
            if self.maybe(0.3):
                policies["batch_seconds"] = 2.0
        if role == "sink" and self.maybe(0.4):
            policies["ordered"] = True
        if self.faults and self.maybe(0.2):
            policies["max_failed_items"] = self.pick([0, 2, 0.1, 0.5])
        if self.maybe(0.5):
            policies["kind"] = self.pick(["work", "transform"])
        if role != "sink" and self.maybe(0.2):
            policies["keep"] = self.maybe(0.7)
        reads = tuple(one for one in self.some(self.values, 1) if one != over)
        self.add(
            StageSketch(
                name, role, lane, reads, over=over, joined=joined, fate=fate, attempts=attempts, policies=policies
            )
        )
        if role != "sink":
            self.streams.append(name)
            # a flat-map's elements, and those laid out of a value, have indices of their own
            self.space[name] = name if role == "flat" or over not in self.space else self.space[over]

    def folding(self, name: str, lane: str) -> None:
        over = self.pick([*self.streams, *self.lists])
        fate, attempts = self.fate(["error"], items=True)
        role = self.pick(["reduce", "fold"])
        policies = self.policies(fate)
        self.add(StageSketch(name, role, lane, over=over, fate=fate, attempts=attempts, policies=policies))
        self.values.append(name)


def random_sketch(
    dice: Dice, *, most: int = 10, lanes: Sequence[str] = ("process", "thread", "async", "inline"), faults: bool = True
) -> GraphSketch:
    """A random pipeline of up to about `most` stages; without `faults` nothing in it fails or is skipped."""
    maker = _Maker(dice, lanes, faults)
    wanted = dice.randint(1, most)
    while len(maker.stages) < wanted:
        maker.step()
    mode = ("fail_fast", "continue_on_failure", "best_effort")[dice.randint(0, 2)] if faults else "fail_fast"
    return GraphSketch(tuple(maker.stages), mode)


def graphs(
    *, most: int = 10, lanes: Sequence[str] = ("process", "thread", "async", "inline"), faults: bool = True
) -> SearchStrategy[GraphSketch]:
    """Random `GraphSketch`es that shrink to small ones. Needs hypothesis (extra `test`)."""
    from hypothesis import strategies as st

    return st.randoms(use_true_random=False).map(
        lambda dice: random_sketch(dice, most=most, lanes=lanes, faults=faults)
    )
