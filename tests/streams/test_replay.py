"""Sources that fail: made anew before their first item, and after it where they say that they give the same again."""

from __future__ import annotations

import os
import signal

import pytest

from stageflow import Engine, PipelineBuilder, RetryConfig

AT_ONCE = RetryConfig(max_attempts=3, base_delay_ms=0)


def failing(times: int, at: int, closed: list, *, shrinks: bool = False):
    """A source of n numbers that raises at one of them the first `times` times."""
    made = 0

    def source(n: int):
        nonlocal made
        made += 1
        try:
            for i in range(0 if shrinks and made > 1 else n):
                if i == at and made <= times:
                    raise ConnectionError(f"lost at {i}")
                yield i
        finally:
            closed.append(made)

    return source


def failing_async(times: int, at: int, closed: list):
    inner = failing(times, at, closed)

    async def source(n: int):
        items = inner(n)
        try:
            for i in items:
                yield i
        finally:
            items.close()

    return source


def same(x: int) -> int:
    return x


def run(engine, source, lane=None, **policies):
    graph = PipelineBuilder("r").stage("source", source, **policies).map("same", same, "source").build()
    options = {} if lane is None else {"lane": lane}
    return graph.run({"n": 300}, **options) if options else engine.run(graph, {"n": 300})


@pytest.mark.parametrize("make", [failing, failing_async])
@pytest.mark.parametrize("at", [0, 1, 150, 299])
def test_a_replayable_source_goes_on_where_it_failed(engine, make, at):
    closed: list[int] = []
    result = run(engine, make(2, at, closed), retry=AT_ONCE, replayable=True)
    assert result.success, result.error
    assert list(result.data("same")) == list(range(300))
    assert closed == [1, 2, 3]
    stats = result.stats["source"]
    assert (stats.items_out, stats.failed, stats.retried) == (300, 0, 2)


def test_the_inline_lane_replays_too(engine):
    closed: list[int] = []
    result = run(engine, failing(1, 20, closed), lane="inline", retry=AT_ONCE, replayable=True)
    assert list(result.data("same")) == list(range(300))
    assert closed == [1, 2]


def test_what_has_given_an_item_and_cannot_be_replayed_is_not_tried_again(engine):
    closed: list[int] = []
    before = run(engine, failing(1, 0, closed), retry=AT_ONCE)
    assert list(before.data("same")) == list(range(300))
    assert closed == [1, 2]
    after = run(engine, failing(1, 5, closed), retry=AT_ONCE)
    assert after.status == "failed"
    assert "lost at 5" in after.error
    assert closed == [1, 2, 1]


def test_attempts_of_a_source_come_to_an_end(engine):
    closed: list[int] = []
    result = run(engine, failing(9, 7, closed), retry=AT_ONCE, replayable=True)
    assert result.status == "failed"
    assert closed == [1, 2, 3]
    assert result.stats["source"].retried == 2
    (failure,) = result.failures.failures
    assert (failure.stage, failure.error_type) == ("source", "ConnectionError")


def test_the_policy_chooses_what_is_tried_again(engine):
    closed: list[int] = []
    picky = RetryConfig(max_attempts=3, base_delay_ms=0, retry_on=(OSError,))
    assert run(engine, failing(1, 7, closed), retry=picky, replayable=True).success
    pickier = RetryConfig(max_attempts=3, base_delay_ms=0, retry_on=(KeyError,))
    assert not run(engine, failing(1, 7, closed), retry=pickier, replayable=True).success


def test_a_source_that_gives_less_the_second_time_is_told_so(engine):
    closed: list[int] = []
    result = run(engine, failing(1, 200, closed, shrinks=True), retry=AT_ONCE, replayable=True)
    assert result.status == "failed"
    assert "declared replayable" in result.error


# ---------------------------------------------------------------- paths of items that are lost behind a flat-map


@pytest.fixture(scope="module")
def impatient():
    """Two workers; one that does not heed its timeout is killed at once."""
    with Engine(processes=2, grace=0.05) as made:
        yield made


def parts(x: int):
    for k in range(3):
        yield x, k


@pytest.mark.parametrize("how", ["raises", "dies", "timeout", "batch"])
def test_an_item_lost_behind_a_flat_map_is_named_by_its_path(impatient, how):
    def guilty(part):
        if part == (5, 2):
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "timeout":
                while True:
                    pass
            raise ValueError("no")
        return part

    def several(batch):
        return [guilty(part) for part in batch]

    more = {"timeout": {"timeout": 0.2}, "batch": {"batch": 4}}.get(how, {})
    graph = (
        PipelineBuilder("p")
        .stage("numbers", lambda: iter(range(9)))
        .map("parts", parts, "numbers")
        .map("guilty", several if how == "batch" else guilty, "parts", **more)
        .build()
    )
    result = impatient.run(graph, failure_mode="continue_on_failure")
    assert [(one.stage, one.item, one.error_info.item) for one in result.failures.failures] == [
        ("guilty", (5, 2), (5, 2))
    ]
    assert list(result.data("guilty")) == [(x, k) for x in range(9) for k in range(3) if (x, k) != (5, 2)]
