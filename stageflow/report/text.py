"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """0, 12 µs, 3.4 ms, 1.23 s, 2 min 5 s, 3 h 20 min."""
    if seconds <= 0:
        return "0"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else "1 s"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def size(count: float) -> str:
    """0 B, 512 B, 1.5 kB, 20 MB, 3.2 GB: powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def number(value: float) -> str:
    """1,234 for whole numbers; three significant digits otherwise."""
    if value == int(value) or abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:.3g}"


def rate(per_second: float) -> str:
    """12/s, 3.4/min; empty for nothing."""
    if per_second <= 0:
        return ""
    if per_second >= 1:
        return f"{number(per_second)}/s"
    if per_second * 60 >= 1:
        return f"{number(per_second * 60)}/min"
    return f"{number(per_second * 3600)}/h"


def percent(share: float) -> str:
    """71 %."""
    return f"{share * 100:.0f} %"


def item(path: Sequence[int] | None) -> str:
    """The index path of an item: 4, or 4.2 for the third child of item 4; empty for none."""
    return ".".join(map(str, path)) if path else ""


def plural(count: int, word: str) -> str:
    """1 item, 2 items, 1,000 items."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
