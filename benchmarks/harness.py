"""Measures us and the others in turn, and says what the numbers allow to say.

A `Scenario` opens its sides (ours, peers, limits), each a call that returns what it cost. The harness runs them round
after round, in alternating order, and forms each `Row`'s ratio within a round, so that whatever the machine did to one
side it did to the other. A row is judged by the 95 % interval of the median of its ratios: all of it on the right side
of the bar is "met", all of it on the wrong side "missed", anything else "too noisy to tell" (after more rounds were
tried). Rounds in which the machine was busy with something else are thrown away.

May not import: any peer; stageflow (the scenarios do).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from benchmarks.noise import LIMIT, stolen
from benchmarks.stats import Interval, interval

MIN_ROUNDS: Final = 5
#: rounds thrown away because of noise before a measure gives up
MAX_DISTURBED: Final = 12
#: times its seconds after which a measure ends, also with fewer rounds than asked for
OVERTIME: Final = 1.5

#: returns what it cost, or several named costs (they become sides called "<side> <name>")
Side = Callable[[], "float | dict[str, float]"]


class MissingPeerError(Exception):
    """A peer is not installed, or does not work here. Its text is shown in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: `over / under` of the values of two sides, or any formula over the sides of a round.

    `bar` with `at_most` says how the ratio is judged; None shows it only. `needs` names the sides without which the
    row is skipped. A number that is no ratio (bytes per stage) has a `unit`.
    """

    id: str
    what: str
    against: str
    over: str = ""
    under: str = ""
    formula: Callable[[Mapping[str, float]], float] | None = None
    bar: float | None = None
    at_most: bool = True
    unit: str = ""
    gate: bool = False  #: part of the committed baseline: both sides are ours or the standard library's

    @property
    def key(self) -> str:
        """Names the row in JSON and in the baseline."""
        return f"{self.id} {self.what} / {self.against}"

    def ratio(self, values: Mapping[str, float]) -> float:
        """The row's number in one round. KeyError when a side is missing."""
        if self.formula is not None:
            return self.formula(values)
        return values[self.over] / values[self.under]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Sides that are measured together. `open(scale)` is a context manager giving `Sides`.

    `scale` in (0, 1] shrinks the sizes where a quick answer will do. `seconds` is what the rounds may take at scale 1.
    """

    name: str
    room: str
    rows: tuple[Row, ...]
    open: Callable[[float], AbstractContextManager[Sides]]
    rounds: int = MIN_ROUNDS
    max_rounds: int = 11
    seconds: float = 60.0
    quick: bool = True  #: part of `quick`, which takes under three minutes


@dataclass(slots=True)
class Sides:
    """The sides that could be opened, and why the others could not."""

    calls: dict[str, Side] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    at_end: list[Callable[[], None]] = field(default_factory=list)

    def add(self, name: str, call: Side) -> None:
        """A side: returns its cost, in one unit for all sides of the scenario."""
        self.calls[name] = call

    def lacks(self, name: str, why: str) -> None:
        """A side that cannot be measured here."""
        self.missing[name] = why


class Outcome(msgspec.Struct, kw_only=True):
    """One row, measured or not. `verdict`: met, missed, too noisy to tell, skipped, or measured (no bar)."""

    id: str
    what: str
    against: str
    verdict: str
    ratio: Interval | None = None
    bar: float | None = None
    at_most: bool = True
    unit: str = ""
    note: str = ""
    sides: dict[str, float] = {}
    gate: bool = False

    @property
    def key(self) -> str:
        """The same as its Row's."""
        return f"{self.id} {self.what} / {self.against}"


class Report(msgspec.Struct, kw_only=True):
    """Everything one scenario gave."""

    scenario: str
    room: str
    rows: list[Outcome]
    rounds: int = 0
    disturbed: int = 0
    seconds: float = 0.0
    stolen: float = 1.0
    notes: dict[str, Any] = {}


def judge(row: Row, found: Interval) -> str:
    """What the interval allows to say about the bar."""
    if row.bar is None:
        return "measured"
    low_fits = found.low <= row.bar if row.at_most else found.low >= row.bar
    high_fits = found.high <= row.bar if row.at_most else found.high >= row.bar
    if low_fits and high_fits:
        return "met"
    if not low_fits and not high_fits:
        return "missed"
    return "too noisy to tell"


class Rounds:
    """Runs the sides in turn and keeps what each cost."""

    def __init__(self, sides: Sides, *, noise_limit: float = LIMIT) -> None:
        self.sides = sides
        self.noise_limit = noise_limit
        self.kept: list[dict[str, float]] = []
        self.disturbed = 0
        self.probes: list[float] = []
        self._turn = 0

    def one(self) -> bool:
        """One round, its order the reverse of the one before; False when it was thrown away."""
        names = list(self.sides.calls)
        if self._turn % 2:
            names.reverse()
        self._turn += 1
        before = stolen()
        values: dict[str, float] = {}
        for name in names:
            gc.collect()
            cost = self.sides.calls[name]()
            if isinstance(cost, dict):
                values.update({f"{name} {part}": number for part, number in cost.items()})
            else:
                values[name] = cost
        noise = statistics.median((before, stolen()))
        self.probes.append(noise)
        if noise > self.noise_limit:
            self.disturbed += 1
            return False
        self.kept.append(values)
        return True

    def warm(self) -> None:
        """Every side once, unmeasured: imports, workers, caches."""
        for call in self.sides.calls.values():
            call()


def measure(
    scenario: Scenario,
    *,
    scale: float = 1.0,
    noise_limit: float = LIMIT,
    rounds: int | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Open a scenario, run its rounds, judge its rows.

    More rounds than asked for are run, within `seconds` (None: the scenario's own), while a row with a bar cannot be
    told; after half as much again it is over, whatever was asked for.
    """
    began = clock()
    budget = scenario.seconds if seconds is None else min(seconds, scenario.seconds)
    wanted = max(1, rounds if rounds is not None else scenario.rounds)
    most = max(wanted, scenario.max_rounds if rounds is None else rounds)
    with scenario.open(scale) as sides:
        run = Rounds(sides, noise_limit=noise_limit)
        if most > 1:
            run.warm()
        limit = began + budget
        while sides.calls:
            kept = len(run.kept)
            if kept >= most or run.disturbed >= MAX_DISTURBED:
                break
            if kept >= wanted and (clock() > limit or not _undecided(scenario.rows, run.kept, sides)):
                break
            if clock() > began + OVERTIME * budget:
                break
            run.one()
        for last in sides.at_end:
            last()
        rows = [_outcome(row, run.kept, sides, wanted) for row in scenario.rows]
        return Report(
            scenario=scenario.name,
            room=scenario.room,
            rows=rows,
            rounds=len(run.kept),
            disturbed=run.disturbed,
            seconds=clock() - began,
            stolen=statistics.median(run.probes) if run.probes else 1.0,
            notes=dict(sides.notes),
        )


def _ratios(row: Row, kept: Sequence[Mapping[str, float]]) -> list[float]:
    return [row.ratio(values) for values in kept]


def _undecided(rows: Sequence[Row], kept: Sequence[Mapping[str, float]], sides: Sides) -> bool:
    for row in rows:
        try:
            found = interval(_ratios(row, kept))
        except KeyError:
            continue
        if judge(row, found) == "too noisy to tell":
            return True
    return False


def _outcome(row: Row, kept: Sequence[Mapping[str, float]], sides: Sides, wanted: int) -> Outcome:
    made = Outcome(
        id=row.id,
        what=row.what,
        against=row.against,
        verdict="skipped",
        bar=row.bar,
        at_most=row.at_most,
        unit=row.unit,
        gate=row.gate,
    )
    try:
        ratios = _ratios(row, kept)
    except KeyError as missing:
        name = str(missing.args[0])
        made.note = sides.missing.get(name, f"{name} is not measured at this scale")
        return made
    if not sides.calls:
        made.note = "; ".join(sides.missing.values()) or "nothing to measure"
        return made
    if len(ratios) < wanted:
        made.verdict = "too noisy to tell"
        made.note = f"only {len(ratios)} of {wanted} rounds were undisturbed or in time"
        if not ratios:
            return made
    made.ratio = interval(ratios)
    made.sides = {name: statistics.median(values[name] for values in kept) for name in kept[0]}
    if not made.note:
        made.verdict = judge(row, made.ratio)
    return made
