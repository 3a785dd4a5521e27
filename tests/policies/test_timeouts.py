"""What runs too long is stopped, in whatever way its lane has, and says how long and how long it might have taken."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

from stageflow import Engine, PipelineBuilder, RetryConfig, StageTimeoutError
from stageflow.testing.clock import VirtualClock


def obeys(ctx):
    ctx.defer(ctx.emit, "cleaned", {})
    while not ctx.token.cancelled:
        time.sleep(0.002)
    ctx.raise_if_cancelled()


async def waits(ctx):
    ctx.defer(ctx.emit, "cleaned", {})
    await asyncio.sleep(60)


def deaf(ctx):
    """Heeds nothing until its time is up twice over."""
    time.sleep(1.2)


def with_child(ctx):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    ctx.emit("child", {"pid": child.pid})
    child.wait()


def slow_item(x, ctx):
    if x == 1:
        while not ctx.token.cancelled:
            time.sleep(0.002)
        ctx.raise_if_cancelled()
    return x


def late_item(x, ctx):
    if x == 1:
        while not ctx.token.cancelled:
            time.sleep(0.002)
    return x


def late_error(x, ctx):
    if late_item(x, ctx) == 1:
        raise ValueError("too late")
    return x


@pytest.mark.parametrize("lane", ["async", "thread", "process"])
def test_an_attempt_that_heeds_its_flag_ends_at_its_timeout(one, lane, sink):
    result = one(waits if lane == "async" else obeys, lane, timeout=0.1, run={"event_sinks": [sink]})
    info = result.outputs["s"].error_info
    assert (info.code, info.limit, info.lane, info.abandoned) == ("SF-TIMEOUT", 0.1, lane, None)
    assert info.elapsed >= 0.1
    assert any(event.type == "cleaned" for event in sink)
    with pytest.raises(Exception, match="timeout") as raised:
        result.raise_for_failure()
    assert isinstance(raised.value.__cause__, StageTimeoutError)
    assert raised.value.__cause__.limit == 0.1


def test_a_process_attempt_that_heeds_nothing_is_killed(one):
    result = one(deaf, "process", timeout=0.1)
    assert result.outputs["s"].error_info.code == "SF-TIMEOUT"
    assert result.abandoned == ()
    assert result.duration_ms < 1100


def test_what_the_stage_started_does_not_outlive_it(one, sink):
    one(with_child, "process", timeout=0.3, run={"event_sinks": [sink]})
    (pid,) = [event.data["pid"] for event in sink if event.type == "child"]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(pid):
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not os.path.exists("/proc")


def test_a_thread_that_will_not_end_is_abandoned_and_named(one):
    result = one(deaf, "thread", timeout=0.1, retry=RetryConfig(max_attempts=3, base_delay_ms=0))
    info = result.outputs["s"].error_info
    assert info.abandoned is True
    assert result.failures.failures[0].attempts == 1  # WORK: its side effects must not happen twice at once
    assert [(one.stage, one.attempt) for one in result.abandoned] == [("s", 1)]
    assert "deaf" in result.abandoned[0].stack
    with pytest.raises(Exception, match="abandoned") as raised:
        result.raise_for_failure()
    assert raised.value.__cause__.abandoned is True


def test_a_stage_of_another_kind_is_retried_beside_its_abandoned_attempt(one):
    retry = RetryConfig(max_attempts=2, base_delay_ms=0)
    result = one(deaf, "thread", timeout=0.05, retry=retry, kind="enrich")
    assert result.failures.failures[0].attempts == 2
    assert [one.attempt for one in result.abandoned] == [1, 2]


def test_an_inline_attempt_cannot_be_interrupted_and_fails_when_it_returns(one):
    result = one(lambda: time.sleep(0.1), "inline", timeout=0.05)
    info = result.outputs["s"].error_info
    assert (info.code, info.limit) == ("SF-TIMEOUT", 0.05)
    assert info.elapsed >= 0.1


@pytest.mark.parametrize("lane", ["async", "thread", "process"])
def test_the_time_of_a_run_stops_what_runs_in_it(one, lane):
    result = one(waits if lane == "async" else obeys, lane, run={"timeout": 0.1})
    assert result.status == "failed"
    assert result.outputs["s"].status == "cancel"
    assert (result.error_info.code, result.error_info.limit) == ("SF-TIMEOUT", 0.1)
    assert 0.1 <= result.error_info.elapsed < 5.0
    assert result.abandoned == ()


@pytest.mark.parametrize("lane", ["thread", "process"])
@pytest.mark.parametrize("function", [slow_item, late_item, late_error])
def test_an_item_that_takes_too_long_is_lost_alone_whatever_it_answers(engine, lane, function):
    graph = PipelineBuilder("p").map("m", function, over="xs", executor=lane, timeout=0.15).build()
    result = engine.run(graph, {"xs": [0, 1, 2]}, failure_mode="continue_on_failure")
    assert list(result.data("m")) == [0, 2]
    (failure,) = result.failures
    assert (failure.item, failure.error_info.code, failure.error_info.limit) == ((1,), "SF-TIMEOUT", 0.15)


def test_time_in_the_queue_does_not_count():
    clock = VirtualClock()
    took = []

    async def stage(name):
        took.append(clock.now)
        await clock.sleep(8)
        return name

    builder = PipelineBuilder("p")
    for number in range(3):
        builder.stage(f"s{number}", stage, inputs={"name": "n"}, timeout=10, concurrency=1)
    builder.map("m", stage, over="xs", inputs={}, timeout=10, concurrency=1)
    with Engine(clock=clock) as engine:
        assert engine.run(builder.build(), {"n": 1, "xs": [1, 2, 3]}).success
    assert sorted(took)[-1] == pytest.approx(16.0)


def test_a_stage_that_is_done_in_time_is_never_timed_out_later():
    clock = VirtualClock()

    async def quick():
        await clock.sleep(4)
        return 1

    async def long():
        await clock.sleep(100)
        return 2

    graph = PipelineBuilder("p").stage("quick", quick, timeout=5).stage("long", long).build()
    with Engine(clock=clock) as engine:
        result = engine.run(graph)
    assert result.success
    assert clock.now == pytest.approx(100.0)
