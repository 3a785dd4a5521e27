"""Two contenders in turns, in one run: only their ratio counts on a noisy machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any


def interleave(ours: Callable[[], float], peer: Callable[[], float], rounds: int = 5) -> dict[str, Any]:
    """Medians of `rounds` each, order alternated, and the median, least and greatest of the ratios ours / peer."""
    mine: list[float] = []
    theirs: list[float] = []
    for number in range(rounds):
        for which, kept in ((ours, mine), (peer, theirs)) if number % 2 else ((peer, theirs), (ours, mine)):
            kept.append(which())
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return {
        "ours": statistics.median(mine),
        "peer": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "rounds": rounds,
    }


def show(name: str, bar: str, found: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{name:28} ours {found['ours']:12.6g}  peer {found['peer']:12.6g}  ours/peer {found['ratio']:.3f}"
        f" ({found['ratio_low']:.3f}-{found['ratio_high']:.3f})  bar {bar}",
        flush=True,
    )
