"""A finished run on a terminal, in a pipe, or in a file: one table of stages, the failures, and where the CPU went.

Everything returns rich renderables or text; nothing here prints. rich is imported when a table is made, not before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TextIO

import msgspec
import psutil

from stageflow.observability.stats import StageStats

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: a pipe has no width; this one fits the table and most editors
_PIPE_WIDTH: Final = 120
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def console(stream: TextIO) -> Console:
    """A console for `stream` that neither wraps nor colours what goes into a pipe, and honours NO_COLOR and COLUMNS."""
    from rich.console import Console

    width = None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False, emoji=False, markup=False)


def seconds(value: float) -> str:
    """A duration for people: 420 µs, 12 ms, 3.4 s, 2 min 05 s."""
    if value <= 0:
        return "-"
    if value < 0.001:
        return f"{value * 1e6:.0f} µs"
    if value < 0.9995:
        return f"{value * 1e3:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def size(value: float) -> str:
    """Bytes for people, in powers of 1000."""
    if value <= 0:
        return "-"
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1000
        unit += 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 99.5 else f"{value:.1f} {_UNITS[unit]}"


def stage_table(stats: Mapping[str, StageStats], stages: Iterable[str], width: int = _PIPE_WIDTH) -> Table:
    """One row for each of `stages`, in that order: lane, how it ended, items, wall, CPU, bytes, wait per item and why.

    How it ended is left out where every stage ended well; where `width` is narrow the bytes go, then the waits.
    """
    from rich import box
    from rich.table import Table

    rows = [stats[name] if name in stats else StageStats(stage=name) for name in stages]
    columns: dict[str, list[str]] = {
        "stage": [row.stage for row in rows],
        "lane": [row.lane or "-" for row in rows],
        "result": [_outcome(row) for row in rows],
        "items": [f"{row.items_in:,}" for row in rows],
        "wall": [seconds(row.wall_seconds) for row in rows],
        "CPU": [seconds(row.cpu_seconds) for row in rows],
        "in": [size(row.bytes_in) for row in rows],
        "out": [size(row.bytes_out) for row in rows],
        "waiting": [waiting(row) for row in rows],
    }
    if all(text == "ok" for text in columns["result"]):
        del columns["result"]
    for dispensable in (("in", "out"), ("waiting",)):
        if _table_width(columns) > width:
            for heading in dispensable:
                del columns[heading]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("stage", "lane", "result") else "right", no_wrap=True)
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(*cells, style="red" if row.failed else "")
    return table


def _table_width(columns: Mapping[str, Sequence[str]]) -> int:
    """What the columns take when nothing is cut, with two blanks and the table's own one between them."""
    return sum(max(len(heading), *map(len, cells), 0) + 3 for heading, cells in columns.items()) - 3


def _outcome(row: StageStats) -> str:
    """What became of the stage in a word, or of its items where some did not end well."""
    counts = {"failed": row.failed, "dropped": row.dropped, "cancelled": row.cancelled, "retried": row.retried}
    parts = [f"{count:,} {word}" for word, count in counts.items() if count]
    if row.status == "pending":
        parts.insert(0, "unfinished" if row.items_in else "not run")
    elif not parts or (row.status == "cancel" and not row.cancelled):
        parts.insert(0, {"skip": "skipped", "cancel": "cancelled", "fail": "failed"}.get(row.status, row.status))
    return ", ".join(parts)


def waiting(row: StageStats) -> str:
    """How long an item waited on average, and for what most."""
    items = max(row.items_in, 1)
    if not row.wait:
        return seconds(row.queued_seconds / items)
    reason, longest = max(row.wait.items(), key=lambda pair: pair[1])
    return f"{seconds(longest / items)} {reason}" if longest / items >= 0.00005 else "-"


class CpuSplit(msgspec.Struct, frozen=True):
    """CPU seconds of this process, and of every process it started."""

    parent: float
    workers: float

    @property
    def total(self) -> float:
        """Both."""
        return self.parent + self.workers

    @property
    def parent_share(self) -> float:
        """0..1; 0 when nothing was used."""
        return self.parent / self.total if self.total > 0 else 0.0


class CpuMeter:
    """Measures from its creation to `split`. Processes that ended in between count by what `stats` knows of them."""

    def __init__(self, *, without: Collection[int] = ()) -> None:
        self._without = frozenset(without)
        self._workers = self._read()
        self._parent = time.process_time()

    def split(self, stats: Mapping[str, StageStats] | None = None) -> CpuSplit:
        """CPU used since; call it before the engine closes, while its workers can be asked."""
        parent = time.process_time() - self._parent
        workers = sum(used - self._workers.get(pid, 0.0) for pid, used in self._read().items())
        told = sum(row.cpu_seconds for row in stats.values() if row.lane == "process") if stats else 0.0
        return CpuSplit(parent, max(workers, told, 0.0))

    def _read(self) -> dict[int, float]:
        found: dict[int, float] = {}
        for process in psutil.Process().children(recursive=True):
            if process.pid in self._without:
                continue
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found


def jsonable(value: Any) -> Any:
    """`value` for JSON: bytes as base64, any sequence or mapping as one, what JSON has no word for as its repr."""
    return msgspec.to_builtins(value, enc_hook=_as_text, str_keys=True, builtin_types=())


def _as_text(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, range):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else repr(value)
