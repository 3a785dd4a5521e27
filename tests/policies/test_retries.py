"""How often, when and why an attempt is repeated: exact in every lane, and on a clock that jumps."""

import pytest
import tenacity

from stageflow import (
    BackoffStrategy,
    CancellationToken,
    Engine,
    JitterStrategy,
    PipelineBuilder,
    RetryConfig,
    StageOutput,
    StageTimeoutError,
)
from stageflow.testing.clock import VirtualClock


class BusyError(Exception):
    """Says when to come back."""

    retry_after = 7.0


class OtherError(Exception):
    pass


def fails_until(ctx, good):
    if ctx.attempt < good:
        raise BusyError(f"attempt {ctx.attempt}")
    return ctx.attempt


def asks_again(ctx):
    return ctx.attempt if ctx.attempt == 3 else StageOutput.retry("not yet")


def declines(ctx):
    return StageOutput.fail("no", retryable=ctx.snapshot.inputs["retryable"])


def raises_other(ctx):
    raise OtherError(ctx.attempt)


def at_once(**changes):
    return RetryConfig(base_delay_ms=0, jitter=JitterStrategy.NONE, **changes)


class Never:
    """A predicate that pickles nowhere and needs not to: it is asked in the parent."""

    def __init__(self):
        self.seen = []

    def __call__(self, info):
        self.seen.append((info.type.rpartition(".")[2], info.message, info.lane))
        return False


def test_max_attempts_counts_the_first_call(one, lane):
    hint = {"retry_on": (OtherError,), "max_attempts": 4}
    result = one(raises_other, lane, retry=at_once(**hint))
    assert result.failures.failures[0].attempts == 4
    assert result.outputs["s"].error == "4"


def test_the_attempt_that_succeeds_is_the_last(one, lane, engine, sink):
    result = one(asks_again, lane, retry=at_once(max_attempts=5), run={"event_sinks": [sink]})
    assert result.data("s") == 3
    assert [event.data["why"] for event in sink if event.type == "stage.retrying"] == ["failure", "failure"]
    assert sum(event.type == "stage.started" for event in sink) == 3


@pytest.mark.parametrize(("retryable", "attempts"), [(True, 3), (False, 1)])
def test_a_fail_is_retried_only_where_the_stage_called_it_retryable(one, lane, retryable, attempts):
    result = one(declines, lane, {"retryable": retryable}, retry=at_once(max_attempts=3))
    assert result.failures.failures[0].attempts == attempts
    assert result.outputs["s"].retryable is retryable


def test_without_a_policy_retry_ends_as_a_retryable_fail(one, lane):
    output = one(asks_again, lane).outputs["s"]
    assert (output.status, output.error, output.retryable) == ("fail", "not yet", True)


def test_types_choose_among_exceptions_and_not_among_what_the_stage_asked_for(one, lane):
    assert one(asks_again, lane, retry=at_once(retry_on=(KeyError,))).data("s") == 3
    assert one(fails_until, lane, {"good": 2}, retry=at_once(retry_on=(KeyError,))).failures.failures[0].attempts == 1


def test_a_predicate_sees_the_failure_and_decides(one, lane):
    never = Never()
    result = one(fails_until, lane, {"good": 2}, retry=at_once(retry_on=never))
    assert never.seen == [("BusyError", "attempt 1", lane)]
    assert result.failures.failures[0].attempts == 1


def test_tenacity_decides_with_the_stages_own_exception(one, lane):
    retry = RetryConfig(
        wait=tenacity.wait_none(),
        stop=tenacity.stop_after_attempt(4),
        retry_on=tenacity.retry_if_exception_type(OtherError),
    )
    assert one(raises_other, lane, retry=retry).failures.failures[0].attempts == 4
    assert one(fails_until, lane, {"good": 2}, retry=retry).failures.failures[0].attempts == 1


def test_a_strategy_that_raises_ends_the_task_with_its_error(one, lane):
    def broken(info):
        raise ZeroDivisionError("bad strategy")

    output = one(fails_until, lane, {"good": 3}, retry=at_once(retry_on=broken)).outputs["s"]
    assert output.error_info.type == "ZeroDivisionError"
    assert output.error == "bad strategy"


# ---------------------------------------------------------------- times


def run_on(clock, builder, **options):
    with Engine(processes=1, clock=clock, grace=1.0) as engine:
        return engine.run(builder.build(), **options)


def starts(clock):
    seen = []

    def stage(ctx):
        seen.append(clock.now)
        raise BusyError if ctx.snapshot.inputs.get("hint") else ValueError

    return seen, stage


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        (BackoffStrategy.EXPONENTIAL, [0.0, 100.0, 300.0, 700.0]),
        (BackoffStrategy.LINEAR, [0.0, 100.0, 300.0, 600.0]),
        (BackoffStrategy.CONSTANT, [0.0, 100.0, 200.0, 300.0]),
    ],
)
def test_delays_follow_the_formula(backoff, expected):
    clock = VirtualClock()
    seen, stage = starts(clock)
    retry = RetryConfig(4, 100_000, 1_000_000, backoff=backoff, jitter=JitterStrategy.NONE)
    run_on(clock, PipelineBuilder("p").stage("s", stage, executor="async", retry=retry))
    assert seen == pytest.approx(expected)


def test_a_delay_is_never_above_its_cap():
    clock = VirtualClock()
    seen, stage = starts(clock)
    retry = RetryConfig(4, 100_000, 150_000, jitter=JitterStrategy.NONE)
    run_on(clock, PipelineBuilder("p").stage("s", stage, executor="async", retry=retry))
    assert seen == pytest.approx([0.0, 100.0, 250.0, 400.0])


@pytest.mark.parametrize("jitter", [JitterStrategy.FULL, JitterStrategy.EQUAL, JitterStrategy.DECORRELATED])
def test_seeded_jitter_is_the_same_in_every_run_and_within_its_bounds(jitter):
    runs = []
    for _ in range(2):
        clock = VirtualClock()
        seen, stage = starts(clock)
        retry = RetryConfig(5, 10_000, 60_000, jitter=jitter, seed=7)
        run_on(clock, PipelineBuilder("p").stage("s", stage, executor="async", retry=retry))
        runs.append(seen)
    assert runs[0] == runs[1]
    delays = [later - earlier for earlier, later in zip(runs[0], runs[0][1:], strict=False)]
    assert len(set(delays)) == 4
    low = {JitterStrategy.FULL: 0.0, JitterStrategy.EQUAL: 5.0, JitterStrategy.DECORRELATED: 10.0}[jitter]
    assert all(low <= delay <= 60.0 for delay in delays)


def test_retry_after_is_the_least_to_wait():
    clock = VirtualClock()
    seen, stage = starts(clock)
    graph = PipelineBuilder("p").stage("s", stage, executor="async", retry=at_once(max_attempts=3))
    run_on(clock, graph, inputs={"hint": True})
    assert seen == pytest.approx([0.0, 7.0, 14.0])


def test_tenacity_waits_are_kept_to_the_second():
    clock = VirtualClock()
    seen, stage = starts(clock)
    retry = RetryConfig(wait=tenacity.wait_incrementing(start=10, increment=5), stop=tenacity.stop_after_delay(40))
    run_on(clock, PipelineBuilder("p").stage("s", stage, executor="async", retry=retry))
    assert seen == pytest.approx([0.0, 10.0, 25.0, 45.0])


def test_total_timeout_covers_attempts_and_waits():
    clock = VirtualClock()
    seen, stage = starts(clock)
    retry = RetryConfig(10, 10_000, 10_000, jitter=JitterStrategy.NONE)
    result = run_on(clock, PipelineBuilder("p").stage("s", stage, executor="async", retry=retry, total_timeout=25))
    assert seen == pytest.approx([0.0, 10.0, 20.0])  # the next would begin at 30
    assert clock.now < 25
    assert result.outputs["s"].error_info.type == "ValueError"


def test_total_timeout_stops_an_attempt_under_way():
    clock = VirtualClock()
    seen = []

    async def stage(ctx):
        seen.append(clock.now)
        await clock.sleep(18)
        raise ValueError

    retry = RetryConfig(10, 1000, 1000, jitter=JitterStrategy.NONE)
    result = run_on(clock, PipelineBuilder("p").stage("s", stage, retry=retry, total_timeout=25))
    info = result.outputs["s"].error_info
    assert seen == pytest.approx([0.0, 19.0])
    assert (info.code, info.limit, info.elapsed) == ("SF-TIMEOUT", 25.0, pytest.approx(25.0))


def test_waiting_holds_no_slot():
    clock = VirtualClock()
    order = []

    def flaky(ctx):
        order.append(("flaky", ctx.attempt))
        if ctx.attempt == 1:
            raise ValueError
        return 1

    retry = RetryConfig(2, 3_600_000, 3_600_000, jitter=JitterStrategy.NONE)
    builder = PipelineBuilder("p").stage("flaky", flaky, executor="inline", retry=retry)
    for number in range(3):
        builder.stage(f"other{number}", lambda: order.append(("other", 1)), executor="inline")
    assert run_on(clock, builder).success
    assert order == [("flaky", 1), ("other", 1), ("other", 1), ("other", 1), ("flaky", 2)]
    assert clock.now == pytest.approx(3600.0)


def test_cancelling_ends_the_wait():
    clock = VirtualClock()
    token = CancellationToken(deadline=50.0, clock=lambda: clock.now)
    retry = RetryConfig(3, 3_600_000, 3_600_000, jitter=JitterStrategy.NONE)
    _, stage = starts(clock)
    result = run_on(clock, PipelineBuilder("p").stage("s", stage, executor="async", retry=retry), token=token)
    assert (result.status, result.cancel_reason) == ("cancelled", "deadline")
    assert clock.now == pytest.approx(50.0)


def test_timeouts_are_judged_by_the_policy():
    """Types must name them, a tenacity stop ends them, and the predicate sees them."""
    for retry, attempts in (
        (at_once(max_attempts=3), 3),
        (at_once(max_attempts=3, retry_on=(ValueError,)), 1),
        (at_once(max_attempts=3, retry_on=(TimeoutError,)), 3),
        (at_once(max_attempts=3, retry_on=(StageTimeoutError,)), 3),
        (RetryConfig(wait=tenacity.wait_none(), stop=tenacity.stop_after_attempt(2)), 2),
        (at_once(max_attempts=3, retry_on=lambda info: info.code == "SF-TIMEOUT" and info.limit == 5), 3),
    ):
        clock = VirtualClock()
        seen = []

        async def stage(ctx, clock=clock, seen=seen):
            seen.append(ctx.attempt)
            await clock.sleep(60)

        result = run_on(clock, PipelineBuilder("p").stage("s", stage, retry=retry, timeout=5))
        assert len(seen) == attempts, retry
        assert result.outputs["s"].error_info.code == "SF-TIMEOUT"


def only_two(x, ctx):
    if x == 2 and ctx.attempt < 3:
        raise BusyError("come back")
    return x, ctx.attempt


def test_items_are_retried_alone(engine, lane, sink):
    graph = (
        PipelineBuilder("p")
        .map("m", only_two, over="xs", executor=lane, retry=RetryConfig(wait=tenacity.wait_none(), max_attempts=3))
        .build()
    )
    result = engine.run(graph, {"xs": [1, 2, 3]}, event_sinks=[sink])
    assert list(result.data("m")) == [(1, 1), (2, 3), (3, 1)]
    assert [event.item for event in sink if event.type == "stage.retrying"] == [(1,), (1,)]


def breaks_judging(state):
    raise ZeroDivisionError("bad strategy")


@pytest.mark.parametrize("how", ["plain", "item", "fold"])
def test_a_strategy_that_raises_over_a_timeout_is_named_with_the_timeout_as_its_cause(how):
    clock = VirtualClock()

    async def stage(ctx):
        await clock.sleep(60)

    async def item(x, ctx):
        await clock.sleep(60)

    async def fold(acc, x):
        await clock.sleep(60)

    policies = {"retry": RetryConfig(wait=tenacity.wait_none(), stop=breaks_judging), "timeout": 5}
    builder = PipelineBuilder("p")
    if how == "plain":
        builder.stage("s", stage, **policies)
    elif how == "item":
        builder.map("s", item, over="xs", **policies)
    else:
        builder.reduce("s", fold, over="xs", initial=0, executor="async", **policies)
    result = run_on(clock, builder, inputs={} if how == "plain" else {"xs": [1]})
    info = result.failures.failures[0].error_info
    assert (info.type, info.message) == ("ZeroDivisionError", "bad strategy")
    assert (info.cause.code, info.cause.limit) == ("SF-TIMEOUT", 5)
    assert clock.now == pytest.approx(5.0)


def test_a_strategy_that_raises_over_an_item_is_named_with_the_items_failure(engine, lane):
    retry = RetryConfig(wait=tenacity.wait_none(), stop=breaks_judging)
    graph = PipelineBuilder("p").map("m", only_two, over="xs", executor=lane, retry=retry).build()
    result = engine.run(graph, {"xs": [1, 2, 3]}, failure_mode="continue_on_failure")
    (failure,) = result.failures
    assert (failure.item, failure.error_info.type, failure.error_info.cause.message) == (
        (1,),
        "ZeroDivisionError",
        "come back",
    )
