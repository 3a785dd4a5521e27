"""Folding events into numbers: what is counted, that it balances, and that it stays small and cheap."""

import random
import timeit
from collections.abc import Callable, Iterator

import pytest

from stageflow.events.event import Event
from stageflow.observability.histogram import Histogram
from stageflow.observability.stats import StageStats, StatsFold


def fold(events: list[Event], stages: tuple[str, ...] = ()) -> StatsFold:
    made = StatsFold(stages)
    for event in events:
        made.add(event)
    return made


def event(type_: str, stage: str | None = "a", at: int = 0, **data: object) -> Event:
    return Event(type_, at, at, "r", stage, None, 1, "thread", dict(data))


def test_streams_count_blocks_once_and_balance(docs_run: list[Event]) -> None:
    stats = fold(docs_run).result()
    parse = stats["parse"]
    assert (parse.items_in, parse.items_out, parse.dropped, parse.failed) == (100, 88, 10, 2)
    assert parse.lane == "process"
    assert parse.kind == "transform"
    assert parse.status == "ok"
    assert parse.attempts == 100
    assert parse.busy_seconds == pytest.approx(3.0)
    assert parse.cpu_seconds == pytest.approx(2.9)
    assert parse.wait == {"slot": 0.3, "upstream": 0.05}
    assert parse.max_seconds == 0.09
    assert parse.p50_seconds == pytest.approx(0.03, rel=0.07)
    assert parse.worker_pids == (101, 102)
    assert parse.wall_seconds == pytest.approx(2.208)
    assert stats["fetch"].retried == 1
    assert stats["fetch"].attempts == 101
    for stage in stats.values():
        assert stage.items_in == stage.items_out + stage.dropped + stage.failed + stage.cancelled


def test_totals_are_the_sums(docs_run: list[Event]) -> None:
    made = fold(docs_run)
    totals, stats = made.totals(), made.result()
    assert totals.status == "completed"
    assert totals.pipeline == "docs"
    assert totals.items_in == sum(s.items_in for s in stats.values())
    assert totals.items_in == totals.items_out + totals.dropped + totals.failed + totals.cancelled
    assert totals.attempts == sum(s.attempts for s in stats.values())
    assert totals.backpressure_seconds == {"bytes": pytest.approx(0.05)}
    assert (totals.workers_started, totals.workers_lost, totals.workers_recycled) == (3, 1, 0)
    assert totals.wall_seconds == pytest.approx(2.24)


def test_an_attempt_event_and_the_end_of_its_stage_count_once(docs_run: list[Event]) -> None:
    summary = fold(docs_run).result()["summary"]
    assert (summary.items_in, summary.items_out, summary.attempts, summary.retried) == (1, 1, 2, 1)
    assert summary.busy_seconds == pytest.approx(0.010)
    assert summary.bytes_out == 50
    bare = fold(
        [event("stage.started"), event("stage.completed", seconds=0.5, bytes_out=7, duration_ms=600.0)]
    ).result()["a"]
    assert (bare.attempts, bare.busy_seconds, bare.bytes_out, bare.wall_seconds) == (1, 0.5, 7, 0.6)


def test_each_end_of_a_plain_stage() -> None:
    failed = fold([event("stage.started"), event("stage.failed", duration_ms=5.0, seconds=0.005)]).result()["a"]
    assert (failed.status, failed.items_in, failed.failed, failed.items_out) == ("fail", 1, 1, 0)
    skipped = fold([event("stage.skipped", reason="x")]).result()["a"]
    assert (skipped.status, skipped.items_in, skipped.skipped) == ("skip", 0, 1)
    cancelled = fold([event("stage.started"), event("stage.cancelled", reason="x")]).result()["a"]
    assert (cancelled.status, cancelled.items_in, cancelled.cancelled) == ("cancel", 1, 1)
    never = fold([event("stage.cancelled", reason="x")]).result()["a"]
    assert (never.status, never.items_in, never.attempts) == ("cancel", 0, 0)


def test_closing_totals_count_when_no_block_told_them() -> None:
    closed = fold(
        [event("stage.completed", items_in=5, items_out=3, dropped=1, failed=1, seconds=0.5, duration_ms=9.0)]
    )
    stats = closed.result()["a"]
    assert (stats.items_in, stats.items_out, stats.dropped, stats.failed, stats.busy_seconds) == (5, 3, 1, 1, 0.5)
    empty = fold([event("stage.completed", items_in=0, items_out=0, dropped=0, failed=0, duration_ms=1.0)]).result()[
        "a"
    ]
    assert (empty.items_in, empty.attempts, empty.status) == (0, 0, "ok")


def test_flat_maps_count_what_left_beside_what_came() -> None:
    stats = fold([event("stage.items", lo=0, hi=2, ok=2, dropped=0, failed=0, emitted=9, seconds=0.1)]).result()["a"]
    assert (stats.items_in, stats.items_out, stats.emitted) == (2, 2, 9)


def test_result_follows_the_graph_and_lists_stages_without_events() -> None:
    made = fold([event("stage.skipped", "z"), event("stage.skipped", "b")], stages=("a", "b"))
    assert list(made.result()) == ["a", "b", "z"]
    assert made.result()["a"] == StageStats(stage="a")
    view = made.view()
    assert dict(view) == made.result()
    assert len(view) == 3
    with pytest.raises(KeyError):
        view["nobody"]


def test_a_running_stage_has_wall_time_so_far() -> None:
    made = fold([event("stage.started", at=1_000_000_000)])
    assert made.stats_of("a", now_ns=3_000_000_000).wall_seconds == 2.0
    assert made.stats_of("a").status == "running"


def test_what_an_attempt_says_it_waits_for_is_counted_once_however_many_wait() -> None:
    def told(type_: str, at: int, item: int, attempt: int = 1) -> Event:
        return Event(type_, at * 10**9, at, "r", "a", (item,), attempt, "async", {"reason": "approval"})

    made = fold([told("stage.waiting", 1, 0), told("stage.waiting", 2, 1), told("stage.waited", 4, 0)])
    assert made.stats_of("a", now_ns=6 * 10**9).wait == {"approval": 5.0}, "so far, while one still waits"
    assert made.stats_of("a").wait == {}
    made.add(told("stage.waited", 7, 1))
    made.add(told("stage.waited", 8, 1))  # said twice
    assert made.stats_of("a").wait == {"approval": 6.0}
    made.add(told("stage.waiting", 10, 2))
    made.add(told("stage.retrying", 11, 2))  # its worker died: nobody says that it has waited
    made.add(told("stage.waiting", 20, 2, attempt=2))
    end = Event(
        "stage.completed", 22 * 10**9, 22, "r", "a", None, None, "async", {"items_in": 3, "wait": {"slot": 1.0}}
    )
    made.add(end)  # nor here
    assert made.stats_of("a").wait == {"approval": 9.0, "slot": 1.0}


def test_an_event_that_lacks_everything_is_no_problem() -> None:
    made = StatsFold()
    for type_ in (
        "run.started",
        "stage.items",
        "stage.attempt",
        "stage.completed",
        "stage.retrying",
        "run.failed",
        "stage.progress",
        "stage.waiting",
        "stage.waited",
        "stage.placed",
        "worker.lost",
        "backpressure.left",
        "mine",
    ):
        made.add(Event(type_, 0, 0))
    assert made.events == 13
    assert made.totals().status == "failed"


@pytest.mark.parametrize("shape", ["exponential", "uniform", "constant"])
def test_quantiles_are_within_the_promised_error(shape: str) -> None:
    rng = random.Random(4)
    draw: Callable[[], float] = {
        "exponential": lambda: rng.expovariate(100.0),
        "uniform": lambda: rng.uniform(1e-5, 20.0),
        "constant": lambda: 0.125,
    }[shape]
    values = sorted(draw() for _ in range(5_000))
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for q in (0.5, 0.95, 0.99):
        assert histogram.quantile(q) == pytest.approx(values[int(q * 5_000) - 1], rel=0.07)
    assert histogram.maximum == values[-1]
    assert histogram.total == pytest.approx(sum(values))
    other = Histogram()
    other.merge(histogram)
    assert other.quantile(0.5) == histogram.quantile(0.5)
    assert histogram.cumulative((0.0, 1e9)) == [0, 5_000]


def test_histogram_takes_anything_in_bounded_space() -> None:
    histogram = Histogram()
    for value in (-1.0, 0.0, 1e-9, 1e12, float("inf") if False else 1e15):
        histogram.add(value)
    rng = random.Random(1)
    for _ in range(20_000):
        histogram.add(10 ** rng.uniform(-9, 9))
    assert len(histogram.bins) <= 337
    assert histogram.quantile(0.0) >= 0.0
    assert Histogram().quantile(0.5) == 0.0


def test_many_events_do_not_grow_it(endless_events: Callable[[int], Iterator[Event]]) -> None:
    made = StatsFold()
    for one in endless_events(100_000):
        made.add(one)
    assert made.events == 100_000
    assert len(made.tallies) == 2
    tally = made.tallies["parse"]
    assert tally.pids is not None
    assert len(tally.pids) <= 256
    assert tally.histogram is not None
    assert len(tally.histogram.bins) <= 337


def test_plain_stage_events_are_kept_late_in_bounded_number() -> None:
    made = StatsFold()
    for n in range(70_000):
        made.add(Event("stage.started", n, n, "r", str(n % 10), None, 1, "async"))
        assert len(made.late) < 65_536
    assert len(made.tallies) == 10


def test_a_block_costs_microseconds() -> None:
    made = StatsFold(("a",))
    block = event("stage.items", lo=0, hi=10, ok=10, dropped=0, failed=0, seconds=0.1, worker_pid=3)
    best = min(timeit.repeat(lambda: made.add(block), number=1_000, repeat=20)) / 1_000
    assert best < 15e-6
