"""A run on the terminal while it goes on: live bars, plain lines where there is no terminal, or one line.

`ProgressSink` folds events; what it shows is drawn by a thread a few times a second, so that drawing never holds up
the run. rich is imported when a live view starts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import msgspec

from stageflow.events import names
from stageflow.events.encoding import as_text
from stageflow.events.event import Event
from stageflow.observability.stats import StageStats, StatsFold
from stageflow.report.text import duration, item, number, rate, size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

Mode = Literal["auto", "live", "lines", "line"]

#: Redraws per second of the live view and the one-liner.
REFRESH: Final = 5.0
#: Seconds between plain lines.
LINES_EVERY: Final = 10.0
#: Stages that get a row; what runs comes first.
MAX_ROWS: Final = 24
_BAR: Final = 24
#: Columns of numbers.
_RIGHT: Final = (2, 3, 4)
#: The live view rests this many times as long as it took to draw: at most 2 % of a core, however busy the machine is.
_REST: Final = 49.0


class Row(msgspec.Struct, frozen=True):
    """What a view shows of one stage. `total` and `eta` are None while nobody can know them."""

    stage: str
    lane: str
    status: str
    done: int
    total: int | None
    failed: int
    retried: int
    per_second: float
    eta: float | None
    queued: int
    waiting: str
    note: str


class ProgressFold:
    """The state of the runs of one engine as rows. Follows the newest run; thread-safe."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._begin(None)

    def _begin(self, event: Event | None) -> None:
        self.fold = StatsFold()
        self.run_id = event.run_id if event is not None else None
        self.parents: dict[str, list[str]] = {}
        self.shapes: dict[str, str] = {}
        self.sample: dict[str, Any] = {}
        self.memory_limit: int | None = None
        self.workers = 0
        if event is not None:
            data = event.data
            self.shapes = data.get("shapes") or {}
            self.memory_limit = data.get("memory_limit")
            self.workers = data.get("workers") or 0
            for edge in data.get("edges") or ():
                self.parents.setdefault(edge[1], []).append(edge[0])

    def add(self, event: Event) -> None:
        """Take one event."""
        with self._lock:
            if event.type == names.RUN_STARTED and (self.run_id is None or self.fold.status != "running"):
                self._begin(event)
            elif event.run_id is not None and event.run_id != self.run_id:
                return
            self.fold.add(event)
            if event.type == names.ENGINE_SAMPLE:
                self.sample = event.data

    @property
    def seconds(self) -> float:
        """How long the run has gone on, or took."""
        fold = self.fold
        if fold.wall_seconds or not fold.started_ns:
            return fold.wall_seconds
        return max(0.0, (self._clock() - fold.started_ns) / 1e9)

    def rows(self) -> list[Row]:
        """One row per stage, in the graph's order."""
        with self._lock:
            now = self._clock()
            stats = {name: self.fold.stats_of(name, now) for name in self.fold.names()}
            return [self._row(s, stats) for s in stats.values()]

    def _row(self, s: StageStats, stats: dict[str, StageStats]) -> Row:
        tally = self.fold.tallies.get(s.stage)
        done, total = s.items_in, self._total(s, stats)
        note = ""
        if tally is not None and tally.progress is not None and s.status == "running":
            inner, inner_total, words = tally.progress
            of = f"/{number(inner_total)}" if inner_total else ""
            note = f"{number(inner)}{of} {words}".strip()
            if done == 0 and total in (None, 1) and inner_total:
                done, total = int(inner), int(inner_total)
        per_second = s.rate if s.items_in > 1 else 0.0
        left = total - done if total is not None and s.status == "running" else 0
        eta = left / per_second if left > 0 and per_second > 0 else None
        queued = (self.sample.get("queued") or {}).get(s.stage, 0)
        waiting = (self.sample.get("waiting") or {}).get(s.stage, "") if s.status == "running" else ""
        return Row(
            s.stage, s.lane, s.status, done, total, s.failed, s.retried, per_second, eta, queued, str(waiting), note
        )

    def _total(self, s: StageStats, stats: dict[str, StageStats]) -> int | None:
        told = (self.sample.get("totals") or {}).get(s.stage)
        if told is not None:
            return int(told)
        if s.status not in ("running", "pending"):
            return s.items_in
        shape = self.shapes.get(s.stage, "")
        if shape in ("", "stage") and s.items_in <= 1:
            return 1
        parents = [stats[name] for name in self.parents.get(s.stage, ()) if name in stats]
        streams = [p for p in parents if self.shapes.get(p.stage, "") not in ("", "stage") or p.items_in > 1]
        if streams and all(p.status in ("ok", "fail") for p in streams):
            return max(p.emitted for p in streams)
        return None


class ProgressSink:
    """Shows a run on `stream` (standard error) while it goes on.

    "live" draws bars with rich, "line" rewrites a single line, "lines" writes one every ten seconds; "auto" is live
    on a terminal and lines elsewhere. What stages print appears above, with the stage's name before each line. Call
    `close()` when the engine is done; a stream that breaks ends the view, not the run.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        mode: Mode = "auto",
        *,
        every: float = LINES_EVERY,
        prints: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream if stream is not None else sys.stderr
        terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self.mode: str = ("live" if terminal else "lines") if mode == "auto" else mode
        self.fold = ProgressFold()
        self._every = every
        self._prints = prints
        self.shows_prints = prints  # tells the engine that what workers print is shown already
        self._clock = clock
        self._last = -1e9
        self._live: Live | None = None
        self._console: Console | None = None
        self._drawer: threading.Thread | None = None
        self._stop = threading.Event()
        self._ascii = False
        self._broken = False
        self._width = 0

    def emit(self, event: Event) -> None:
        """Take one event."""
        self.fold.add(event)
        type_ = event.type
        if self._broken:
            return
        try:
            if type_ == names.STAGE_PRINT:
                if self._prints:
                    self._print(event)
            elif type_ == names.RUN_STARTED:
                self._start()
            elif type_ in names.RUN_ENDED and event.run_id == self.fold.run_id:
                self._end()
            elif self.mode == "lines" and self._due(self._every):
                self._write(summary_line(self.fold) + "\n")
            elif self.mode == "line" and self._due(1.0 / REFRESH):
                self._rewrite()
        except (OSError, ValueError):
            self._broken = True  # a closed terminal or pipe: nobody is looking

    def _due(self, gap: float) -> bool:
        now = self._clock()
        if now - self._last < gap:
            return False
        self._last = now
        return True

    # ------------------------------------------------------------ drawing

    def _start(self) -> None:
        self._last = self._clock()
        if self.mode != "live" or self._live is not None:
            return
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=self.stream, markup=False, highlight=False, emoji=False, stderr=False)
        self._live = Live(
            console=self._console,
            get_renderable=self.render,
            auto_refresh=False,
            redirect_stdout=self.stream.isatty(),
            redirect_stderr=self.stream.isatty(),
            vertical_overflow="crop",
        )
        self._ascii = self._console.options.ascii_only
        self._live.start()
        self._drawer = threading.Thread(
            target=self._draw, args=(self._live, self._stop), name="stageflow-progress", daemon=True
        )
        self._drawer.start()

    def _draw(self, live: Live, stop: threading.Event) -> None:
        """Draw a few times a second until told to stop."""
        pause = 1.0 / REFRESH
        while not stop.wait(pause):
            began = time.monotonic()
            try:
                live.refresh()
            except (OSError, ValueError):
                self._broken = True  # a closed terminal
                return
            pause = max(1.0 / REFRESH, _REST * (time.monotonic() - began))

    def _end(self) -> None:
        if self.mode == "live":
            self._stop_live()
        elif self.mode == "line":
            self._rewrite()
            self._write("\n")
            self._width = 0
        else:
            self._write(summary_line(self.fold) + "\n")

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is None:
            return
        drawer, self._drawer = self._drawer, None
        self._stop.set()
        if drawer is not None:
            drawer.join(5.0)
        self._stop = threading.Event()
        live.stop()

    def close(self) -> None:
        """Leave the terminal as it was."""
        try:
            self._stop_live()
            if self._width:
                self._write("\n")
                self._width = 0
        except (OSError, ValueError):
            self._broken = True

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def _rewrite(self) -> None:
        line = one_liner(self.fold)
        pad = " " * max(0, self._width - len(line))
        self._width = len(line)
        self._write(f"\r{line}{pad}")

    def _print(self, event: Event) -> None:
        """User output above the view, each line tagged with where it came from."""
        where = event.stage or "run"
        if event.item is not None:
            where += f" {item(event.item)}"
        text = as_text(event.data.get("text") or "")
        where = _printable(where)
        lines = [f"[{where}] {_printable(line)}" for line in text.splitlines()]
        if self._live is not None and self._console is not None:
            for line in lines:
                self._console.print(line, soft_wrap=True)
            return
        clear = f"\r{' ' * self._width}\r" if self._width else ""
        self._write(clear + "".join(f"{line}\n" for line in lines))

    def render(self) -> RenderableType:
        """The live view as a rich renderable: one text, laid out here, since rich's tables take five times as long."""
        from rich.cells import cell_len
        from rich.text import Text

        rows = self.fold.rows()
        shown, hidden = choose_rows(rows, MAX_ROWS)
        lines = [self._cells(row) for row in shown]
        widths = [max(map(cell_len, column), default=0) for column in zip(*map(_plain, lines), strict=True)]
        text = Text(no_wrap=True, overflow="ellipsis").append(headline(self.fold), "bold")
        for line in lines:
            text.append("\n")
            for place, (cell, width) in enumerate(zip(line, widths, strict=True)):
                gap = " " * (width - sum(cell_len(words) for words, _ in cell))
                if place in _RIGHT:
                    text.append(gap)
                for words, style in cell:
                    text.append(words, style)
                if place < len(line) - 1:
                    text.append(" " if place in _RIGHT else f"{gap} ")
        if hidden:
            text.append(f"\nand {hidden:,} more stages", "dim")
        return text

    def _cells(self, row: Row) -> list[list[tuple[str, str]]]:
        """The cells of one line of the view, each as words and their styles."""
        style = {"fail": "red", "skip": "dim", "pending": "dim", "cancel": "yellow"}.get(row.status, "")
        running = row.status == "running"
        done = f"{row.done:,}" + (f"/{row.total:,}" if row.total is not None and row.total != row.done else "")
        return [
            [(_printable(row.stage)[:32], style)],
            _bar(row, "-" if self._ascii else "━") if row.total or running else [],
            [(done, style)],
            [(rate(row.per_second) if running else "", "")],
            [(duration(row.eta) if row.eta is not None else "", "cyan")],
            [(row.lane, "dim")],
            [(" ".join(_troubles(row)), "red" if row.failed else "yellow")],
            [(_printable(" · ".join(_details(row)))[:60], "dim")],
        ]


def _plain(line: list[list[tuple[str, str]]]) -> list[str]:
    return ["".join(words for words, _ in cell) for cell in line]


def _bar(row: Row, stroke: str) -> list[tuple[str, str]]:
    """How much is done, as a bar; dim where nobody knows of how much."""
    if row.total is None:
        return [(stroke * _BAR, "dim")]
    filled = min(_BAR, _BAR * row.done // row.total) if row.total else 0
    full = "bar.finished" if filled == _BAR else "bar.complete"
    return [(stroke * filled, full), (stroke * (_BAR - filled), "bar.back")]


def choose_rows(rows: list[Row], limit: int) -> tuple[list[Row], int]:
    """At most `limit` rows in their order, running and failed ones first to stay; and how many are hidden."""
    if len(rows) <= limit:
        return rows, 0
    weight = {"running": 0, "fail": 1, "ok": 2, "cancel": 2, "pending": 3, "skip": 4}
    ranked = sorted(range(len(rows)), key=lambda i: (weight.get(rows[i].status, 3), i))[:limit]
    return [rows[i] for i in sorted(ranked)], len(rows) - limit


def _troubles(row: Row) -> list[str]:
    made = []
    if row.failed:
        made.append(f"{row.failed:,} failed")
    if row.retried:
        made.append(f"{row.retried:,} retried")
    return made


def _details(row: Row) -> list[str]:
    made = []
    if row.queued:
        made.append(f"{row.queued:,} queued")
    if row.waiting:
        made.append(f"waits for {row.waiting}")
    if row.note:
        made.append(row.note)
    return made


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def headline(fold: ProgressFold) -> str:
    """Pipeline, state, time, workers, memory, bytes: one line."""
    totals = fold.fold.totals()
    words = [_printable(totals.pipeline) or "run", totals.status if totals.status != "pending" else "starting"]
    words.append(_clock_text(fold.seconds))
    sample = fold.sample
    if fold.workers or sample.get("workers"):
        count = len(sample.get("workers") or ()) or fold.workers
        lost = f" ({totals.workers_lost} lost)" if totals.workers_lost else ""
        words.append(f"{count} worker{'' if count == 1 else 's'}{lost}")
    if sample.get("rss_bytes"):
        words.append(f"{size(sample['rss_bytes'])} resident")
    if sample.get("live_bytes") and fold.memory_limit:
        words.append(f"{size(sample['live_bytes'])} of {size(fold.memory_limit)} live")
    if totals.bytes_out:
        words.append(f"{size(totals.bytes_out)} moved")
    return " · ".join(words)


def summary_line(fold: ProgressFold, limit: int = 6) -> str:
    """Everything on one plain line, for logs and pipes."""
    shown, hidden = choose_rows([row for row in fold.rows() if row.status not in ("pending", "skip")], limit)
    parts = [headline(fold)]
    for row in shown:
        of = f"/{row.total:,}" if row.total is not None and row.total != row.done else ""
        words = [f"{_printable(row.stage)} {row.done:,}{of}", *_troubles(row)]
        if row.status == "running":
            words += [rate(row.per_second)] if row.per_second else []
            words += [f"ETA {duration(row.eta)}"] if row.eta is not None else []
        parts.append(" ".join(words))
    if hidden:
        parts.append(f"{hidden:,} more")
    return " | ".join(parts)


def one_liner(fold: ProgressFold, width: int = 10) -> str:
    """The stage that decides when the run ends, as one line in tqdm's manner."""
    row = _slowest(fold.rows())
    name = _printable(fold.fold.pipeline) or "run"
    passed = _clock_text(fold.seconds)
    if row is None:
        return f"{name}: [{passed}] {fold.fold.status}"
    pace = rate(row.per_second) or "?/s"
    if not row.total:
        return f"{name}: {row.done:,} [{passed}, {pace}] {_printable(row.stage)}"
    share = min(1.0, row.done / row.total)
    filled = int(share * width)
    left = _clock_text(row.eta) if row.eta is not None else "?" if share < 1 else "00:00"
    bar = "█" * filled + " " * (width - filled)
    counts = f"{row.done:,}/{row.total:,} [{passed}<{left}, {pace}]"
    return f"{name}: {share * 100:3.0f}%|{bar}| {counts} {_printable(row.stage)}"


def _slowest(rows: Iterable[Row]) -> Row | None:
    """Of the stages that run the one with the longest way to go; else the last that had items."""
    running = [row for row in rows if row.status == "running"]
    if running:
        return max(running, key=lambda row: (row.eta or 0.0, row.total is not None, -(row.done or 0)))
    ended = [row for row in rows if row.done]
    return ended[-1] if ended else None


def _printable(text: str) -> str:
    """Without control characters: what a stage prints or is called may not move the cursor."""
    return "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in text)
