"""How a finished run is printed: numbers for people, one table, no colour where none is wanted."""

import io
import subprocess
import sys
from collections import UserList

import pytest
from rich.console import Console

from stageflow.observability.stats import StageStats
from stageflow.report.terminal import CpuMeter, console, jsonable, seconds, size, stage_table, waiting

ROWS = [
    StageStats(
        stage="read", lane="thread", status="ok", items_in=1790, items_out=1790, wall_seconds=4.25, cpu_seconds=0.2
    ),
    StageStats(
        stage="parse", lane="process", status="fail", items_in=9, failed=2, bytes_in=31_500_000, wait={"slot": 108.0}
    ),
    StageStats(stage="store", status="pending"),
]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "-"), (0.00042, "420 µs"), (0.012, "12 ms"), (0.9999, "1.0 s"), (59.94, "59.9 s"), (125, "2 min 05 s")],
)
def test_seconds(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "-"), (999, "999 B"), (1000, "1.0 kB"), (99_500, "100 kB"), (31_500_000, "31.5 MB"), (10**18, "1000 PB")],
)
def test_size(value, text):
    assert size(value) == text


def printed(**environment: str) -> str:
    stream = io.StringIO()
    console(stream).print(stage_table({row.stage: row for row in ROWS[:2]}, [row.stage for row in ROWS]))
    return stream.getvalue()


def test_the_table_has_a_row_per_stage_and_no_escapes_in_a_pipe(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    text = printed()
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0] == ["stage", "lane", "result", "items", "wall", "CPU", "in", "out", "waiting"]
    assert "1,790" in text
    assert "2 failed" in text
    assert "12.0 s slot" in text
    assert "not run" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("width", "gone"),
    [(120, set()), (76, {"in", "out"}), (60, {"in", "out", "waiting"})],
    ids=["wide", "narrow", "tiny"],
)
def test_a_narrow_terminal_gets_fewer_columns_and_none_is_cut(width, gone):
    stream = io.StringIO()
    out = Console(file=stream, width=width)
    out.print(stage_table({row.stage: row for row in ROWS[:2]}, [row.stage for row in ROWS], width))
    assert "…" not in stream.getvalue()
    headings = set(stream.getvalue().splitlines()[0].split())
    assert {"stage", "lane", "result", "items", "wall", "CPU", "in", "out", "waiting"} - headings == gone


def test_the_result_is_left_out_where_all_went_well():
    stream = io.StringIO()
    console(stream).print(stage_table({ROWS[0].stage: ROWS[0]}, [ROWS[0].stage]))
    assert "result" not in stream.getvalue()


def test_a_wait_is_the_longest_with_its_reason():
    assert waiting(StageStats(stage="s", wait={"slot": 0.5, "bytes": 2.0})) == "2.0 s bytes"
    assert waiting(StageStats(stage="s", items_in=10, queued_seconds=2.5)) == "250 ms"
    assert waiting(StageStats(stage="s", wait={"slot": 1e-9})) == "-"


class Odd:
    def __repr__(self) -> str:
        return "<odd>"


def test_what_json_has_no_word_for_becomes_text():
    assert jsonable({1: Odd(), "b": b"\xff", "s": {2}, "u": UserList([3]), "r": range(2)}) == {
        "1": "<odd>",
        "b": "/w==",
        "s": [2],
        "u": [3],
        "r": "range(0, 2)",
    }


def test_cpu_is_split_between_this_process_and_its_children():
    meter = CpuMeter()
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('spent', flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    split = meter.split()
    without = CpuMeter(without=[child.pid]).split()
    child.communicate("\n")
    assert split.workers >= 0.25
    assert split.parent < split.workers
    assert 0 <= split.parent_share < 0.5
    assert without.workers == 0
