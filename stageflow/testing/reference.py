"""What must come out of a sketched pipeline, worked out stage by stage without any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stageflow.core.kinds import DROP
from stageflow.core.output import StageOutput
from stageflow.testing.sketches import (
    FlatRunner,
    GraphSketch,
    HangError,
    Reference,
    Runner,
    SourceRunner,
    StageSketch,
)


def work_out(sketch: GraphSketch) -> Reference:
    """The right answer."""
    return _Interpreter(sketch).run()


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
