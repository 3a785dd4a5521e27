"""Random pipelines whose right answer is known: hypothesis strategies, and the same from a `random.Random`.

A `GraphSketch` is a pipeline as data (`sketches`). `sketch.build()` is the graph; `sketch.reference()` says what must
come out (`reference`). hypothesis is imported when a strategy is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stageflow.pipeline.policies import GuardRetryPolicy
from stageflow.testing.sketches import Fate, GraphSketch, Reference, StageSketch

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Fate", "GraphSketch", "Reference", "StageSketch", "graphs", "random_sketch"]


class Dice(Protocol):
    """What `random_sketch` needs: a `random.Random`, or hypothesis' own."""

    def randint(self, a: int, b: int) -> int: ...
    def random(self) -> float: ...


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

    def chain(self) -> None:
        """Neighbours in the process lane that run back to back where an engine fuses stages."""
        if not (self.streams or self.lists):
            self.add(StageSketch("chained", "source", self.pick(self.lanes), length=self.dice.randint(0, 40)))
            self.streams.append("chained")
        over = self.pick([*self.streams, *self.lists])
        length = self.dice.randint(2, 3)
        for place in range(length):
            name, role = f"c{place}", "map"
            policies: dict[str, Any] = {}
            kinds = ["error", "fail", "retry", "skip", "drop"]
            attempts = 1
            if place == 0 and self.maybe(0.5):
                role, policies["batch"], kinds = "batch", self.dice.randint(1, 6), ["error"]
            if place == length - 1:
                fate, attempts = self.fate([*kinds, "hang"], items=True)
                if fate is not None and fate.how == "hang":
                    policies["timeout"] = 5.0
            else:
                fate, _ = self.fate(kinds, items=True)
            self.add(StageSketch(name, role, "process", over=over, fate=fate, attempts=attempts, policies=policies))
            over = name
        self.streams.append(over)

    def folding(self, name: str, lane: str) -> None:
        over = self.pick([*self.streams, *self.lists])
        fate, attempts = self.fate(["error"], items=True)
        role = self.pick(["reduce", "fold"])
        policies = self.policies(fate)
        self.add(StageSketch(name, role, lane, over=over, fate=fate, attempts=attempts, policies=policies))
        self.values.append(name)


def random_sketch(
    dice: Dice,
    *,
    most: int = 10,
    lanes: Sequence[str] = ("process", "thread", "async", "inline"),
    faults: bool = True,
    chain: bool = False,
) -> GraphSketch:
    """A random pipeline of up to about `most` stages; without `faults` nothing in it fails or is skipped. `chain`: it
    ends with stages that may be fused."""
    maker = _Maker(dice, lanes, faults)
    wanted = dice.randint(1, most)
    while len(maker.stages) < wanted:
        maker.step()
    if chain:
        maker.chain()
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
