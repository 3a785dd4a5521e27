"""Prometheus text: its grammar, its numbers, and the server."""

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from stageflow.events.event import Event
from stageflow.observability.prometheus import MAX_STAGES, MetricsServer, PrometheusSink
from stageflow.observability.stats import StatsFold

SAMPLE = re.compile(r'^([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)+)\})? (-?[0-9.e+-]+|\+Inf|NaN)$')


def parse(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Read exposition text as strictly as a scraper does: types first, no series twice, no family split."""
    types: dict[str, str] = {}
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    order: list[str] = []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types
            types[name] = kind
            continue
        if line.startswith("# HELP "):
            continue
        match = SAMPLE.match(line)
        assert match, line
        name = match[1]
        family = re.sub(r"_(bucket|sum|count)$", "", name) if name not in types else name
        assert family in types, line
        if types[family] == "counter":
            assert name.endswith("_total")
        if not order or order[-1] != family:
            assert family not in order, f"{family} is split"
            order.append(family)
        labels = tuple(sorted(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or "")))
        assert (name, labels) not in found, line
        found[name, labels] = float(match[3])
    return found


def fed(events: list[Event]) -> PrometheusSink:
    sink = PrometheusSink()
    for event in events:
        sink.emit(event)
    return sink


def value(found: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float:
    return sum(v for (n, given), v in found.items() if n == name and labels.items() <= dict(given).items())


def test_numbers_are_those_of_the_stats(docs_run: list[Event]) -> None:
    fold = StatsFold()
    for event in docs_run:
        fold.add(event)
    found = parse(fed(docs_run).render())
    for name, s in fold.result().items():
        for outcome, count in (("ok", s.items_out), ("dropped", s.dropped), ("failed", s.failed)):
            assert value(found, "stageflow_items_total", stage=name, outcome=outcome) == count
        assert value(found, "stageflow_bytes_total", stage=name, direction="out") == s.bytes_out
        assert value(found, "stageflow_retries_total", stage=name) == s.retried
        total = value(found, "stageflow_attempt_duration_seconds_sum", stage=name)
        assert total == pytest.approx(s.busy_seconds)
    assert value(found, "stageflow_runs_total", status="completed") == 1
    assert value(found, "stageflow_run_seconds_total") == pytest.approx(2.24)
    assert value(found, "stageflow_stage_wait_seconds_total", stage="parse", reason="slot") == pytest.approx(0.3)
    assert value(found, "stageflow_workers") == 2
    assert value(found, "stageflow_worker_events_total", event="lost") == 1


def test_buckets_are_cumulative_and_end_with_the_count(docs_run: list[Event]) -> None:
    text = fed(docs_run).render()
    lines = [
        line
        for line in text.splitlines()
        if line.startswith("stageflow_attempt_duration_seconds_bucket") and 'stage="parse"' in line
    ]
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines]
    assert counts == sorted(counts)
    assert 'le="+Inf"' in lines[-1]
    assert counts[-1] == 100


def test_counters_never_go_back_while_runs_come_and_go(make_events: Callable[..., list[Event]]) -> None:
    sink = PrometheusSink()
    last = 0.0
    for run in ("a", "b"):
        for n, event in enumerate(make_events(run)):
            sink.emit(event)
            if n % 9 == 0:
                now = value(parse(sink.render()), "stageflow_items_total")
                assert now >= last
                last = now
    found = parse(sink.render())
    assert value(found, "stageflow_items_total", stage="parse") == 200
    assert value(found, "stageflow_runs_in_progress") == 0


def test_labels_are_escaped() -> None:
    sink = PrometheusSink()
    sink.emit(Event("run.started", 1, 0, "r", data={"pipeline": 'a"b\\c\nd'}))
    sink.emit(Event("stage.completed", 2, 1, "r", 'x"}\n# TYPE evil counter', None, 1, "async", {"seconds": 0.5}))
    found = parse(sink.render())
    assert value(found, "stageflow_items_total", outcome="ok") == 1


def test_the_number_of_series_is_bounded() -> None:
    sink = PrometheusSink()
    sink.emit(Event("run.started", 1, 0, "r", data={"pipeline": "p"}))
    for n in range(MAX_STAGES + 50):
        sink.emit(Event("stage.completed", 1, n, "r", f"s{n}", None, 1, "async", {"seconds": 0.1}))
    found = parse(sink.render())
    assert value(found, "stageflow_items_total", stage="other", outcome="ok") == 50
    assert value(found, "stageflow_items_total", outcome="ok") == MAX_STAGES + 50


def test_many_events_cost_no_memory(endless_events: Callable[[int], Iterator[Event]]) -> None:
    sink = PrometheusSink()
    for event in endless_events(50_000):
        sink.emit(event)
    assert len(sink.render()) < 20_000


def test_the_server_answers_on_loopback_only_and_closes(docs_run: list[Event]) -> None:
    with MetricsServer(fed(docs_run)) as server:
        assert server.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert value(parse(answer.read().decode()), "stageflow_items_total", stage="parse") == 100
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.url.replace("/metrics", "/secret"), timeout=30)
        port = int(server.url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.send(b"GET ")  # a client that stops in the middle holds up nobody
            with urllib.request.urlopen(server.url, timeout=30) as answer:
                assert answer.status == 200
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
