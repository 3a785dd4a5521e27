"""Progress on a terminal, in a pipe and on one line."""

import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from stageflow.events.event import Event
from stageflow.report.progress import (
    MAX_ROWS,
    ProgressFold,
    ProgressSink,
    Row,
    choose_rows,
    headline,
    one_liner,
    summary_line,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def halfway(events: list[Event]) -> list[Event]:
    """Up to the last block: the sources have not closed yet."""
    return events[: next(i for i, e in enumerate(events) if e.type == "stage.completed")]


def at(event: Event) -> Callable[[], int]:
    return lambda: event.time_unix_ns


def folded(events: list[Event]) -> ProgressFold:
    fold = ProgressFold(clock=at(max(events, key=lambda e: e.time_unix_ns)))
    for event in events:
        fold.add(event)
    return fold


def test_rows_tell_what_runs_and_what_it_waits_for(docs_run: list[Event]) -> None:
    rows = {row.stage: row for row in folded(halfway(docs_run)).rows()}
    parse = rows["parse"]
    assert (parse.done, parse.total, parse.failed, parse.lane) == (100, None, 2, "process")
    assert parse.queued > 0
    assert "tokens" in parse.note
    assert parse.per_second > 0
    assert rows["fetch"].retried == 1
    assert rows["fetch"].waiting == "downstream"
    assert (rows["summary"].status, rows["summary"].total) == ("pending", 1)


def test_totals_are_known_once_the_source_has_ended(docs_run: list[Event]) -> None:
    events = halfway(docs_run)
    closed = next(e for e in docs_run if e.type == "stage.completed" and e.stage == "urls")
    some = [e for e in events if not (e.type == "stage.items" and e.stage == "fetch" and e.data["lo"] >= 50)]
    fetch = next(row for row in folded([*some, closed]).rows() if row.stage == "fetch")
    assert (fetch.done, fetch.total) == (50, 100)
    assert fetch.eta == pytest.approx(50 / fetch.per_second)


def test_columns_of_the_live_view_are_in_line_and_end_within_the_terminal(docs_run: list[Event]) -> None:
    sink = ProgressSink(Terminal(), "line")
    for event in docs_run[:-2]:
        sink.fold.add(msgspec.structs.replace(event, stage="\u89e3\u6790") if event.stage == "parse" else event)
    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(sink.render())
    head, *lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert head.startswith("docs \u00b7 running")
    assert not any("\u2026" in line for line in lines)
    places = {cell_len(line[: line.index(" \u2501")]) for line in lines if " \u2501" in line}
    assert len(places) == 1
    assert any(line.startswith("\u89e3\u6790") and "2 failed" in line for line in lines)


def test_the_live_view_takes_no_more_than_its_share_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [0.0], []
    monkeypatch.setattr("stageflow.report.progress.time.monotonic", lambda: now[0])

    class Slow:
        def refresh(self) -> None:
            now[0] += 0.1

    class Stop:
        def wait(self, pause: float) -> bool:
            pauses.append(pause)
            return len(pauses) == 4

    ProgressSink(Terminal(), "live")._draw(Slow(), Stop())  # type: ignore[arg-type]
    assert pauses[0] == 0.2
    assert all(0.1 / (pause + 0.1) <= 0.021 for pause in pauses[1:])


def test_the_live_view_shows_bars_prints_above_and_leaves_the_terminal(docs_run: list[Event]) -> None:
    terminal = Terminal()
    sink = ProgressSink(terminal, "live")
    for event in docs_run:
        sink.emit(event)
    sink.close()
    shown = terminal.getvalue()
    assert "[parse 4] hello" in shown
    assert "parse" in shown
    assert "2 failed" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert sink._live is None


def test_the_live_view_is_a_plain_renderable(docs_run: list[Event]) -> None:
    sink = ProgressSink(io.StringIO(), "live")
    for event in halfway(docs_run):
        sink.fold.add(event)
    out = io.StringIO()
    Console(file=out, width=140).print(sink.render())
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("docs · running")
    assert "2 workers (1 lost)" in lines[0]
    parse = next(line for line in lines if line.startswith("parse"))
    assert "100" in parse
    assert "process" in parse
    assert "<script>" in out.getvalue()


def test_lines_come_seldom_and_at_the_end(docs_run: list[Event]) -> None:
    now = [0.0]
    out = io.StringIO()
    sink = ProgressSink(out, clock=lambda: now[0], prints=False)
    assert sink.mode == "lines"
    for event in docs_run:
        now[0] += 1.0
        sink.emit(event)
    lines = out.getvalue().splitlines()
    assert len(lines) == (len(docs_run) - 1) // 10 + (1 if (len(docs_run) - 1) % 10 else 0)
    assert lines[-1].startswith("docs · completed")
    assert "parse 100 2 failed" in lines[-1]
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


def test_one_line_is_rewritten_at_most_five_times_a_second(docs_run: list[Event]) -> None:
    now = [0.0]
    out = Terminal()
    sink = ProgressSink(out, "line", clock=lambda: now[0])
    for event in docs_run:
        now[0] += 0.02
        sink.emit(event)
    sink.close()
    text = out.getvalue()
    assert text.count("\rdocs: ") <= len(docs_run) * 0.02 * 5 + 2
    assert text.endswith("\n")
    assert "[parse 4] hello\n" in text


def test_one_liner_in_the_manner_of_tqdm(docs_run: list[Event]) -> None:
    events = halfway(docs_run)
    fold = folded([e for e in events if not (e.type == "stage.items" and e.stage == "parse" and e.data["lo"] >= 50)])
    fold.add(
        Event("engine.sample", 1, 1, "run-1", data={"totals": {"parse": 100, "fetch": 100, "urls": 100, "store": 100}})
    )
    line = one_liner(fold)
    assert line.startswith("docs:  50%|█████     | 50/100 [00:02<00:0")
    assert line.endswith("parse")
    assert one_liner(ProgressFold()).startswith("run: [00:00]")


def test_user_text_cannot_move_the_cursor() -> None:
    out = io.StringIO()
    sink = ProgressSink(out)
    sink.emit(Event("stage.print", 1, 1, "r", "bad\x1b[2J", (1, 2), 1, "process", {"text": "a\x1b[2Jb\nc"}))
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("\n") == 2
    assert "1.2]" in out.getvalue()


def test_a_closed_stream_ends_the_view_not_the_run(docs_run: list[Event]) -> None:
    out = io.StringIO()
    sink = ProgressSink(out, every=0.0)
    out.close()
    for event in docs_run:
        sink.emit(event)
    sink.close()
    assert sink._broken


def test_many_stages_show_what_runs() -> None:
    rows = [Row(f"s{n}", "", "running" if n == 90 else "pending", 0, 1, 0, 0, 0.0, None, 0, "", "") for n in range(100)]
    shown, hidden = choose_rows(rows, MAX_ROWS)
    assert len(shown) == MAX_ROWS
    assert hidden == 100 - MAX_ROWS
    assert any(row.stage == "s90" for row in shown)


def test_the_newest_run_is_followed(make_events: Callable[..., list[Event]]) -> None:
    fold = folded(make_events("run-1") + make_events("run-2", items=20))
    assert fold.run_id == "run-2"
    assert next(row for row in fold.rows() if row.stage == "parse").done == 20
    assert "completed" in headline(fold)
    assert "fetch 20" in summary_line(fold)


def test_it_costs_microseconds_per_event(endless_events: Callable[[int], Iterator[Event]]) -> None:
    events = list(endless_events(20_000))
    sink = ProgressSink(io.StringIO())
    started = time.thread_time()
    for event in events:
        sink.emit(event)
    assert (time.thread_time() - started) / len(events) < 50e-6


def test_rich_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, stageflow.report.progress as p; p.ProgressSink(); assert 'rich' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
