"""The Chrome trace: its form against the rules of the format, what it shows, and that it stays small."""

import gzip
import io
import itertools
import json
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from stageflow.events.event import Event
from stageflow.events.fanout import FanOut
from stageflow.observability.clock import ClockMap
from stageflow.observability.trace import MAX_TRACKS, TraceSink, _Tracks

# The trace event format, as Chrome's document and Perfetto's importer describe it.
NUMBER = {"type": "number"}
ID = {"type": ["string", "integer"]}
SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["ph", "name", "ts", "pid", "tid"],
        "properties": {
            "ph": {"enum": ["X", "b", "e", "i", "C", "M", "s", "f"]},
            "name": {"type": "string", "minLength": 1},
            "ts": NUMBER,
            "pid": {"type": "integer", "minimum": 1},
            "tid": {"type": "integer", "minimum": 0},
            "args": {"type": "object"},
            "cat": {"type": "string"},
        },
        "allOf": [
            {
                "if": {"properties": {"ph": {"const": "X"}}},
                "then": {"required": ["dur"], "properties": {"dur": {"type": "number", "minimum": 0}}},
            },
            {
                "if": {"properties": {"ph": {"enum": ["b", "e", "s", "f"]}}},
                "then": {"required": ["id", "cat"], "properties": {"id": ID}},
            },
            {
                "if": {"properties": {"ph": {"const": "f"}}},
                "then": {"properties": {"bp": {"const": "e"}}, "required": ["bp"]},
            },
            {
                "if": {"properties": {"ph": {"const": "i"}}},
                "then": {"required": ["s"], "properties": {"s": {"enum": ["g", "p", "t"]}}},
            },
            {
                "if": {"properties": {"ph": {"const": "C"}}},
                "then": {"properties": {"args": {"additionalProperties": NUMBER, "minProperties": 1}}},
            },
            {
                "if": {"properties": {"ph": {"const": "M"}}},
                "then": {
                    "properties": {
                        "name": {"enum": ["process_name", "thread_name", "process_sort_index", "thread_sort_index"]}
                    }
                },
            },
        ],
    },
}


def trace(events: list[Event]) -> list[dict[str, Any]]:
    stream = io.BytesIO()
    sink = TraceSink(stream)
    fan = FanOut([sink])
    for event in events:
        fan.emit(event)
    assert not fan.troubles()
    sink.close()
    records: list[dict[str, Any]] = json.loads(stream.getvalue())
    return records


def test_it_follows_the_format(docs_run: list[Event]) -> None:
    records = trace(docs_run)
    jsonschema.validate(records, SCHEMA)
    assert {"X", "b", "e", "i", "C", "M", "s", "f"} == {r["ph"] for r in records}


def test_slices_of_one_track_never_overlap(docs_run: list[Event]) -> None:
    by_track: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for r in trace(docs_run):
        if r["ph"] == "X":
            by_track[r["pid"], r["tid"]].append((r["ts"], r["ts"] + r["dur"]))
    assert len(by_track) >= 4
    for slices in by_track.values():
        slices.sort()
        for (_, end), (start, _) in itertools.pairwise(slices):
            assert start >= end - 1e-6


def test_every_track_has_a_name_and_workers_are_processes(docs_run: list[Event]) -> None:
    records = trace(docs_run)
    names = {(r["pid"], r["tid"]): r["args"]["name"] for r in records if r["name"] in ("process_name", "thread_name")}
    assert {(r["pid"], r["tid"]) for r in records if r["ph"] == "X"} <= set(names)
    assert names[101, 0] == "worker 101"
    assert names[1, 0] == "engine"
    assert {r["pid"] for r in records if r["ph"] == "X" and r["cat"] == "parse"} == {101, 102}


def test_blocks_and_items_agree_with_the_run(docs_run: list[Event]) -> None:
    slices = [r for r in trace(docs_run) if r["ph"] == "X" and r["cat"] == "parse"]
    assert sum(r["args"]["ok"] for r in slices) == 88
    assert sum(r["args"]["dropped"] for r in slices) == 10
    assert sum(r["args"]["failed"] for r in slices) == 2


def test_beyond_the_limit_of_detail_blocks_are_merged_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stageflow.observability.trace.DETAILED", 10)
    began = 1_700_000_000_000_000_000
    events = [Event("run.started", began, 0, "r", data={"stages": ["a"], "monotonic": 5.0})]
    for n in range(1000):
        data = {"lo": n, "hi": n + 1, "ok": 1, "seconds": 0.001, "worker_pid": 7, "started": 5.0 + n / 1000}
        events.append(Event("stage.items", began + (n + 1) * 1_000_000, n + 1, "r", "a", None, 1, "process", data))
    events.append(Event("stage.completed", began + 1_002_000_000, 1002, "r", "a", data={"items_in": 1000}))
    events.append(Event("run.completed", began + 1_003_000_000, 1003, "r", data={"status": "completed"}))
    slices = [r for r in trace(events) if r["ph"] == "X"]
    assert 15 < len(slices) < 30
    assert sum(r["args"]["ok"] for r in slices) == 1000


def test_arrows_start_and_end_inside_slices_and_point_forward(docs_run: list[Event]) -> None:
    records = trace(docs_run)
    slices = [r for r in records if r["ph"] == "X"]
    flows: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in records:
        if r["ph"] in "sf":
            flows[r["id"]][r["ph"]] = r
    assert len(flows) >= 30
    for flow in flows.values():
        assert flow["s"]["ts"] <= flow["f"]["ts"]
        for end in flow.values():
            assert any(
                s["pid"] == end["pid"] and s["tid"] == end["tid"] and s["ts"] - 1 <= end["ts"] <= s["ts"] + s["dur"] + 1
                for s in slices
            ), end


def test_async_slices_are_paired(docs_run: list[Event]) -> None:
    open_ids: dict[tuple[str, str], int] = defaultdict(int)
    for r in trace(docs_run):
        if r["ph"] in "be":
            open_ids[r["cat"], r["id"]] += 1 if r["ph"] == "b" else -1
    assert open_ids
    assert set(open_ids.values()) == {0}


def test_counters_and_marks(docs_run: list[Event]) -> None:
    records = trace(docs_run)
    counters = {r["name"] for r in records if r["ph"] == "C"}
    assert {"memory", "queued items", "running", "rss", "progress parse"} <= counters
    marks = [r["name"] for r in records if r["ph"] == "i"]
    assert "stage.failed: parse 7" in marks
    assert "worker.lost" in marks


def test_user_spans_are_drawn_under_their_worker() -> None:
    span = {"span_id": "ab", "name": "tokenise", "start_ns": 10_000, "end_ns": 20_000, "pid": 7, "attributes": {"n": 1}}
    records = trace([Event("spans.recorded", 30_000, 1, "r", "parse", (1,), 1, "process", {"spans": [span]})])
    begin = next(r for r in records if r["ph"] == "b")
    assert (begin["name"], begin["pid"], begin["args"]) == ("tokenise", 7, {"n": 1})


def test_an_empty_trace_and_an_interrupted_one(tmp_path: Path, docs_run: list[Event]) -> None:
    assert trace([]) == []
    path = tmp_path / "sub" / "t.json"
    sink = TraceSink(path)
    for event in docs_run:
        sink.emit(event)
    torn = path.read_text()
    assert torn.startswith("[\n{")
    assert json.loads(torn + "]")
    sink.close()


def test_gz_is_compressed(tmp_path: Path, docs_run: list[Event]) -> None:
    path = tmp_path / "t.json.gz"
    sink = TraceSink(path)
    for event in docs_run:
        sink.emit(event)
    sink.close()
    assert json.loads(gzip.decompress(path.read_bytes()))


def test_a_full_disk_ends_only_the_trace(docs_run: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    sink = TraceSink("/dev/full")
    for event in docs_run * 3:
        sink.emit(event)
    sink.close()
    assert sink.error is not None
    assert len(caplog.records) == 1


def test_more_overlap_than_tracks_floats_freely() -> None:
    tracks = _Tracks(100)
    assert [tracks.place(0, 10) for _ in range(MAX_TRACKS + 1)] == [*range(100, 100 + MAX_TRACKS), None]
    assert tracks.place(10, 12) == 100
    events = [
        Event("stage.completed", 1_000_000_000, n, "r", f"s{n}", None, 1, "async", {"duration_ms": 500.0})
        for n in range(MAX_TRACKS + 3)
    ]
    records = trace(events)
    jsonschema.validate(records, SCHEMA)
    assert len([r for r in records if r["ph"] == "b"]) == 3


def test_memory_does_not_grow_with_events(endless_events: Callable[[int], Iterator[Event]], tmp_path: Path) -> None:
    sink = TraceSink(tmp_path / "t.json")
    stream = iter(endless_events(40_000))
    for _ in range(10_000):
        sink.emit(next(stream))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for event in stream:
        sink.emit(event)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    sink.close()
    assert grown < 300_000


def test_clock_uses_the_exact_offset_or_the_smallest_seen() -> None:
    exact = ClockMap()
    exact.span(Event("run.started", 1_000_000_000, 0, data={"monotonic": 5.0}))
    done = Event("stage.completed", 3_000_000_000, 1, data={"started": 6.0, "seconds": 0.5})
    assert exact.span(done) == (2_000_000_000, 2_500_000_000)
    guess = ClockMap()
    assert guess.span(done) == (2_500_000_000, 3_000_000_000)
    earlier = Event("stage.completed", 2_600_000_000, 2, data={"started": 6.0, "seconds": 0.5})
    assert guess.span(earlier) == (2_100_000_000, 2_600_000_000)
    assert guess.span(done) == (2_100_000_000, 2_600_000_000)
    assert guess.span(Event("stage.failed", 100, 3, data={"duration_ms": 0.00005})) == (50, 100)
