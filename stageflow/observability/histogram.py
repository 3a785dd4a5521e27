"""A small histogram of durations with logarithmic bins: bounded memory, a fixed relative error, mergeable."""

from __future__ import annotations

from math import frexp
from typing import Final

# Eight linear slices per power of two: a value is off by at most 1/16 of itself, and finding its bin costs one frexp.
_SLICES: Final = 8
_MICROSECOND: Final = 1e-6
#: 2**42 microseconds are 50 days; what is longer lands in the last bin, and `maximum` is exact anyway.
_MAX_BIN: Final = 42 * _SLICES


class Histogram:
    """Durations in seconds. At most 337 bins exist, made when first used; `maximum` and `total` are exact."""

    __slots__ = ("bins", "count", "maximum", "total")

    def __init__(self) -> None:
        self.bins: dict[int, int] = {}
        self.count = 0
        self.maximum = 0.0
        self.total = 0.0

    def add(self, seconds: float, weight: int = 1) -> None:
        """Count `seconds` `weight` times. Negative values (a clock that jumped) count as zero."""
        if seconds <= _MICROSECOND:
            index = 0
            if seconds < 0.0:
                seconds = 0.0
        else:
            mantissa, exponent = frexp(seconds * 1e6)
            index = (exponent - 1) * _SLICES + int((mantissa - 0.5) * (2 * _SLICES)) + 1
            if index > _MAX_BIN:
                index = _MAX_BIN
        bins = self.bins
        bins[index] = bins.get(index, 0) + weight
        self.count += weight
        self.total += seconds * weight
        if seconds > self.maximum:
            self.maximum = seconds

    def merge(self, other: Histogram) -> None:
        """Add everything `other` holds."""
        for index, count in other.bins.items():
            self.bins[index] = self.bins.get(index, 0) + count
        self.count += other.count
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)

    def quantile(self, q: float) -> float:
        """Seconds below which a share `q` of the values lies, within 6.25 %; 0.0 without values."""
        if not self.count:
            return 0.0
        rank = max(1.0, q * self.count)
        seen = 0
        for index in sorted(self.bins):
            seen += self.bins[index]
            if seen >= rank:
                return min(_middle(index), self.maximum)
        return self.maximum

    def cumulative(self, bounds: tuple[float, ...]) -> list[int]:
        """For each upper bound (seconds, ascending) how many values are at or below it, as far as the bins can tell."""
        counts = [0] * len(bounds)
        for index, count in self.bins.items():
            middle = min(_middle(index), self.maximum)
            for place, bound in enumerate(bounds):
                if middle <= bound:
                    counts[place] += count
        return counts


def _middle(index: int) -> float:
    """The value in the middle of a bin, in seconds."""
    if index <= 0:
        return _MICROSECOND
    exponent, slice_ = divmod(index - 1, _SLICES)
    return float(2.0**exponent * (1.0 + (slice_ + 0.5) / _SLICES)) * _MICROSECOND
