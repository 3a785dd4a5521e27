"""Medians, spreads and intervals of a handful of noisy numbers, with nothing but the standard library.

May not import: stageflow, any peer.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

#: resamples of a bootstrap; the ends of the interval move by less than 1 % between seeds
RESAMPLES: Final = 2000


class Interval(msgspec.Struct, frozen=True):
    """A median with its 95 % interval. `spread` is the interquartile range over the median."""

    median: float
    low: float
    high: float
    spread: float
    count: int

    @property
    def width(self) -> float:
        """How far the ends are apart, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else float("inf")


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median; 0.0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    middle = statistics.median(values)
    return (quarters[2] - quarters[0]) / middle if middle else float("inf")


def interval(
    values: Sequence[float],
    *,
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 7,
) -> Interval:
    """Bootstrap interval of `statistic` over `values` (percentile method, fixed seed: equal values, equal interval).

    With fewer than eight values the percentiles of a bootstrap are too narrow, so their extremes are the interval: of
    five values it covers the median with 94 %, of six with 97 %.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    middle = statistic(values)
    if len(values) < 8:
        return Interval(middle, min(values), max(values), spread(values), len(values))
    dice = random.Random(seed)
    drawn = sorted(statistic(dice.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1.0 - confidence) / 2.0
    low = drawn[int(tail * (resamples - 1))]
    high = drawn[int((1.0 - tail) * (resamples - 1))]
    return Interval(middle, low, high, spread(values), len(values))
