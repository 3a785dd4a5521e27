"""Holds the present code against a committed baseline, so that a real regression fails and noise does not.

Three kinds of numbers: ratios against the standard library with their intervals, byte codes of the engine's whole
path, and machine instructions of the scheduler alone. A ratio has regressed when its interval lies wholly on the worse
side of the baseline's and its median is worse by more than `TOLERANCE`; a row that looks so is measured again before it
is called that. Counts have no noise worth the name: more than `COUNTS` is a regression.

May not import: any peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.harness import Outcome
from benchmarks.peers import HERE
from benchmarks.stats import Interval

BASELINE: Final = HERE / "baseline.json"
TOLERANCE: Final = 0.10
#: on another machine or Python, ratios move on their own
TOLERANCE_ELSEWHERE: Final = 0.50
COUNTS: Final = 0.03
#: sizes of the gate's scenarios
SCALE: Final = 0.5


class Kept(msgspec.Struct, frozen=True):
    """A ratio of the baseline; `at_most` says which way is better."""

    ratio: Interval
    at_most: bool


class Baseline(msgspec.Struct, kw_only=True):
    """What is committed. `instructions` and `bytecodes` are by Python version ("3.11"), then by shape."""

    machine: dict[str, Any] = {}
    ratios: dict[str, Kept] = {}
    instructions: dict[str, dict[str, float]] = {}
    bytecodes: dict[str, dict[str, float]] = {}


class Verdict(msgspec.Struct, frozen=True):
    """One compared number. `verdict`: same, better, worse, too noisy to tell, new, or not measured."""

    key: str
    verdict: str
    before: float
    now: float
    note: str = ""


def load(path: Path = BASELINE) -> Baseline:
    """The committed baseline; an empty one where there is none."""
    if not path.exists():
        return Baseline()
    return msgspec.json.decode(path.read_bytes(), type=Baseline)


def save(baseline: Baseline, path: Path = BASELINE) -> None:
    """Write it, indented, so that a review sees what moved."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(baseline), indent=1) + b"\n")


def compare_ratio(key: str, kept: Kept, now: Interval, *, tolerance: float = TOLERANCE) -> Verdict:
    """Worse only when the intervals do not touch and the medians are further apart than the tolerance."""
    before = kept.ratio
    factor = now.median / before.median if kept.at_most else before.median / now.median
    apart = now.low > before.high if kept.at_most else now.high < before.low
    beyond = now.high < before.low if kept.at_most else now.low > before.high
    if apart and factor > 1.0 + tolerance:
        return Verdict(key, "worse", before.median, now.median, f"{factor - 1.0:+.0%}")
    if beyond and factor < 1.0 - tolerance:
        return Verdict(key, "better", before.median, now.median, f"{factor - 1.0:+.0%}")
    if now.width > 2.0:
        return Verdict(key, "too noisy to tell", before.median, now.median, f"{now.low:.3g} to {now.high:.3g}")
    return Verdict(key, "same", before.median, now.median)


def compare_counts(what: str, kept: Mapping[str, float], now: Mapping[str, float]) -> list[Verdict]:
    """Every shape that was counted now; `what` is counted."""
    found = []
    for shape, count in now.items():
        key = f"{what} per completion, {shape}"
        if shape not in kept:
            found.append(Verdict(key, "new", 0.0, count))
            continue
        factor = count / kept[shape]
        word = "worse" if factor > 1.0 + COUNTS else "better" if factor < 1.0 - COUNTS else "same"
        found.append(Verdict(key, word, kept[shape], count, f"{factor - 1.0:+.1%}"))
    return found


def compare(baseline: Baseline, rows: Iterable[Outcome], *, tolerance: float = TOLERANCE) -> list[Verdict]:
    """Every row that is part of the gate."""
    found = []
    for row in rows:
        if not row.gate:
            continue
        kept = baseline.ratios.get(row.key)
        if row.ratio is None:
            found.append(Verdict(row.key, "not measured", kept.ratio.median if kept else 0.0, 0.0, row.note))
        elif kept is None:
            found.append(Verdict(row.key, "new", 0.0, row.ratio.median))
        else:
            found.append(compare_ratio(row.key, kept, row.ratio, tolerance=tolerance))
    return found


def check(
    baseline: Baseline,
    measure: Callable[[Sequence[str] | None], list[Outcome]],
    *,
    tolerance: float = TOLERANCE,
    confirmations: int = 2,
) -> list[Verdict]:
    """Measure and compare. What looks worse is measured again, up to `confirmations` times, and must look so each time.

    `measure(keys)` measures the rows with these keys, or all.
    """
    verdicts = {verdict.key: verdict for verdict in compare(baseline, measure(None), tolerance=tolerance)}
    for _ in range(confirmations):
        worse = [key for key, verdict in verdicts.items() if verdict.verdict == "worse"]
        if not worse:
            break
        for verdict in compare(baseline, measure(worse), tolerance=tolerance):
            if verdict.key in worse:
                verdicts[verdict.key] = verdict
    return list(verdicts.values())


def elsewhere(baseline: Baseline, here: Mapping[str, Any]) -> str:
    """Why ratios may have moved on their own; "" on the machine and Python of the baseline."""
    there = baseline.machine
    parts = []
    for name in ("cpu", "cores"):
        if there.get(name) != here.get(name):
            parts.append(f"{name} {there.get(name)} -> {here.get(name)}")
    before, now = str(there.get("python", "")), str(here.get("python", ""))
    if before.rsplit(".", 1)[0] != now.rsplit(".", 1)[0]:
        parts.append(f"Python {before} -> {now}")
    return ", ".join(parts)
