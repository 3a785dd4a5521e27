"""What runs too long is stopped, in whatever way its lane has, and says how long and how long it might have taken."""

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from stageflow import Engine, PipelineBuilder, RetryConfig, StageTimeoutError
from stageflow.testing.clock import VirtualClock
from stageflow.testing.sinks import RecordingSink


def obeys(ctx):
    ctx.defer(ctx.emit, "cleaned", {})
    ctx.emit("too long", {})
    while not ctx.token.cancelled:
        time.sleep(0.002)
    ctx.raise_if_cancelled()


async def waits(ctx):
    ctx.defer(ctx.emit, "cleaned", {})
    ctx.emit("too long", {})
    await asyncio.sleep(60)


def deaf(ctx):
    """Heeds nothing."""
    ctx.emit("too long", {})
    time.sleep(60)


def with_child(ctx):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    ctx.emit("too long", {"pid": child.pid})
    child.wait()


def slow_item(x, ctx):
    if x == 1:
        ctx.emit("too long", {})
        while not ctx.token.cancelled:
            time.sleep(0.002)
        ctx.raise_if_cancelled()
    return x


def late_item(x, ctx):
    if x == 1:
        ctx.emit("too long", {})
        while not ctx.token.cancelled:
            time.sleep(0.002)
    return x


def late_error(x, ctx):
    if late_item(x, ctx) == 1:
        raise ValueError("too late")
    return x


GRACE = 30.0


class Passing(RecordingSink):
    """Lets so much time pass whenever an attempt says that it is at work on what takes too long."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock = clock
        self.seconds = seconds

    def emit(self, event):
        super().emit(event)
        if event.type == "too long":
            self.clock.advance(self.seconds)


@pytest.fixture(scope="module")
def virtual():
    """An engine whose time passes when a test says so: no load of the machine can use it up."""
    with Engine(processes=1, threads=4, grace=GRACE, clock=VirtualClock()) as engine:
        yield engine


def run_alone(engine, function, lane, seconds, *, run=None, **policies):
    """Run one function as the stage "s"; its result, and what was told."""
    sink = Passing(engine.clock, seconds)
    graph = PipelineBuilder("one").stage("s", function, executor=lane, **policies).build()
    return engine.run(graph, event_sinks=[sink], **(run or {})), sink


@pytest.mark.parametrize("lane", ["async", "thread", "process"])
def test_an_attempt_that_heeds_its_flag_ends_at_its_timeout(virtual, lane):
    result, sink = run_alone(virtual, waits if lane == "async" else obeys, lane, 5, timeout=5)
    info = result.outputs["s"].error_info
    assert (info.code, info.limit, info.lane, info.abandoned) == ("SF-TIMEOUT", 5.0, lane, None)
    assert info.elapsed == pytest.approx(5.0)
    assert sink.of("cleaned")
    with pytest.raises(Exception, match="timeout") as raised:
        result.raise_for_failure()
    assert isinstance(raised.value.__cause__, StageTimeoutError)
    assert raised.value.__cause__.limit == 5.0


def test_a_process_attempt_that_heeds_nothing_is_killed(virtual):
    began = time.monotonic()
    result, _ = run_alone(virtual, deaf, "process", 5 + GRACE, timeout=5)
    assert result.outputs["s"].error_info.code == "SF-TIMEOUT"
    assert result.abandoned == ()
    assert time.monotonic() - began < 50  # it would have slept for 60


def test_what_the_stage_started_does_not_outlive_it(virtual):
    _, sink = run_alone(virtual, with_child, "process", 5 + GRACE, timeout=5)
    (pid,) = [event.data["pid"] for event in sink.of("too long")]
    deadline = time.monotonic() + 30
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


@pytest.fixture
def stubborn():
    """A function that heeds nothing until the test is over."""
    release = threading.Event()

    def heeds_nothing(ctx):
        ctx.emit("too long", {})
        release.wait(60)

    yield heeds_nothing
    release.set()


def test_a_thread_that_will_not_end_is_abandoned_and_named(virtual, stubborn):
    retry = RetryConfig(max_attempts=3, base_delay_ms=0)
    result, _ = run_alone(virtual, stubborn, "thread", 5 + GRACE, timeout=5, retry=retry)
    info = result.outputs["s"].error_info
    assert info.abandoned is True
    assert result.failures.failures[0].attempts == 1  # WORK: its side effects must not happen twice at once
    assert [(one.stage, one.attempt) for one in result.abandoned] == [("s", 1)]
    assert "heeds_nothing" in result.abandoned[0].stack
    with pytest.raises(Exception, match="abandoned") as raised:
        result.raise_for_failure()
    assert raised.value.__cause__.abandoned is True


def test_a_stage_of_another_kind_is_retried_beside_its_abandoned_attempt(virtual, stubborn):
    retry = RetryConfig(max_attempts=2, base_delay_ms=0)
    result, _ = run_alone(virtual, stubborn, "thread", 5 + GRACE, timeout=5, retry=retry, kind="enrich")
    assert result.failures.failures[0].attempts == 2
    assert [one.attempt for one in result.abandoned] == [1, 2]


def test_an_inline_attempt_cannot_be_interrupted_and_fails_when_it_returns(one):
    result = one(lambda: time.sleep(0.1), "inline", timeout=0.05)
    info = result.outputs["s"].error_info
    assert (info.code, info.limit) == ("SF-TIMEOUT", 0.05)
    assert info.elapsed >= 0.1


@pytest.mark.parametrize("lane", ["async", "thread", "process"])
def test_the_time_of_a_run_stops_what_runs_in_it(virtual, lane):
    result, _ = run_alone(virtual, waits if lane == "async" else obeys, lane, 5, run={"timeout": 5})
    assert result.status == "failed"
    assert result.outputs["s"].status == "cancel"
    assert (result.error_info.code, result.error_info.limit) == ("SF-TIMEOUT", 5.0)
    assert result.error_info.elapsed == pytest.approx(5.0)
    assert result.abandoned == ()


@pytest.mark.parametrize("lane", ["thread", "process"])
@pytest.mark.parametrize("function", [slow_item, late_item, late_error])
def test_an_item_that_takes_too_long_is_lost_alone_whatever_it_answers(virtual, lane, function):
    # one at a time: the time of the others would pass as well
    graph = PipelineBuilder("p").map("m", function, over="xs", executor=lane, timeout=5, concurrency=1).build()
    sink = Passing(virtual.clock, 5)
    result = virtual.run(graph, {"xs": [0, 1, 2]}, failure_mode="continue_on_failure", event_sinks=[sink])
    assert list(result.data("m")) == [0, 2]
    (failure,) = result.failures
    assert (failure.item, failure.error_info.code, failure.error_info.limit) == ((1,), "SF-TIMEOUT", 5.0)


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


def naps(x) -> int:
    time.sleep(0.06)
    return 1


@pytest.mark.parametrize("lane", ["async", "inline"])
@pytest.mark.parametrize("shape", ["stage", "map", "reduce"])
def test_what_holds_the_loop_for_too_long_fails_when_it_returns(lane, shape):
    """Nothing can interrupt it there."""
    policies = {"executor": lane, "timeout": 0.05}
    builder = PipelineBuilder("t")
    if shape == "stage":
        builder.stage("late", naps, inputs={"x": "xs"}, **policies)
    elif shape == "map":
        builder.map("late", naps, over="xs", **policies)
    else:
        builder.reduce("late", lambda total, x: total + naps(x), "xs", initial=0, **policies)
    result = builder.build().run({"xs": [1]})
    assert result.status == "failed"
    assert result.error_info.type.endswith("StageTimeoutError")
