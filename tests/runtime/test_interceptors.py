"""Interceptors: order, short circuits, recovery, and that each built-in does what it says."""

import asyncio
import logging
from typing import Any

import pytest

from stageflow.core.errors import DefinitionError, StageCancelledError
from stageflow.core.kinds import StageStatus
from stageflow.core.output import StageOutput
from stageflow.pipeline.interceptors import (
    BaseInterceptor,
    CircuitBreaker,
    ConcurrencyLimit,
    ContextSizeInterceptor,
    ImmutabilityCheck,
    Interceptor,
    InterceptorChain,
    InterceptorContext,
    LoggingInterceptor,
    MetricsInterceptor,
    RateLimit,
    TimeoutInterceptor,
    size_of,
)
from stageflow.runtime.interceptors import InterceptorServices, InterceptorStates, LazyOutput, run_intercepted

OK = StageOutput.ok("value")


class World:
    """A clock that sleeping moves, and what was emitted."""

    def __init__(self, engine: InterceptorStates | None = None) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.services = InterceptorServices(InterceptorStates(engine), sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def ctx(self, **fields: Any) -> InterceptorContext:
        given: dict[str, Any] = {"stage": "s", "run_id": "r", "lane": "thread", **fields}
        return InterceptorContext(
            services=self.services, emit=lambda *event: self.events.append(event), now=lambda: self.now, **given
        )

    async def run(self, *interceptors: Any, attempt: Any = OK, **fields: Any) -> Any:
        async def body() -> Any:
            if callable(attempt):
                returned = attempt()
                return await returned if asyncio.iscoroutine(returned) else returned
            if isinstance(attempt, Exception):
                raise attempt
            return attempt

        return await run_intercepted(InterceptorChain(interceptors), self.ctx(**fields), body)


@pytest.fixture
def world() -> World:
    return World()


class Tracing:
    """Writes down its hooks; async ones if asked, so that both forms are covered."""

    def __init__(self, name: str, seen: list[str], priority: int = 0, **answers: Any) -> None:
        self.name, self.seen, self.priority, self.answers = name, seen, priority, answers

    def _say(self, hook: str, default: Any) -> Any:
        self.seen.append(f"{hook} {self.name}")
        answer = self.answers.get(hook, default)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def before(self, ctx: InterceptorContext) -> Any:
        return self._say("before", None)

    async def after(self, ctx: InterceptorContext, output: Any) -> Any:
        return self._say("after", output)

    def on_error(self, ctx: InterceptorContext, error: Any) -> Any:
        return self._say("error", None)

    def leave(self, ctx: InterceptorContext) -> None:
        self._say("leave", None)


async def test_low_priority_is_outside_and_equal_ones_keep_their_order(world):
    seen: list[str] = []
    chain = [Tracing("c", seen, 5), Tracing("a", seen), Tracing("b", seen), Tracing("z", seen, -5)]
    output = await world.run(*chain)
    assert output is OK
    assert seen == [
        "before z", "before a", "before b", "before c", "after c", "after b", "after a", "after z",
        "leave c", "leave b", "leave a", "leave z",
    ]  # fmt: skip
    assert isinstance(chain[0], Interceptor)
    assert isinstance(BaseInterceptor(), Interceptor)


async def test_a_short_circuit_skips_the_attempt_and_what_is_further_in(world):
    seen: list[str] = []
    cached = StageOutput.ok("cached")
    output = await world.run(
        Tracing("a", seen), Tracing("b", seen, before=cached), Tracing("c", seen), attempt=lambda: seen.append("ran")
    )
    assert output is cached
    assert seen == ["before a", "before b", "after b", "after a", "leave b", "leave a"]


@pytest.mark.parametrize("failure", [ValueError("bad"), StageOutput.fail("bad")])
async def test_the_first_recovery_wins_and_after_still_runs(world, failure):
    seen: list[str] = []
    saved = StageOutput.ok("saved")
    output = await world.run(
        Tracing("a", seen), Tracing("b", seen, error=saved), Tracing("c", seen, error=StageOutput.ok("late")),
        attempt=failure,
    )  # fmt: skip
    assert output is saved
    assert [each for each in seen if each.startswith("error")] == ["error a", "error b"]
    assert [each for each in seen if each.startswith("after")] == ["after c", "after b", "after a"]


async def test_an_exception_is_a_fail_with_its_story(world):
    output = await world.run(Tracing("a", []), attempt=ValueError("bad"), item=(3,))
    assert (output.status, output.error) == (StageStatus.FAIL, "bad")
    assert (output.error_info.type, output.error_info.item, output.error_info.lane) == ("ValueError", (3,), "thread")
    assert "raise attempt" in output.error_info.traceback


@pytest.mark.parametrize("hook", ["before", "after", "error"])
async def test_a_raising_hook_fails_the_attempt_and_the_others_leave(world, hook):
    seen: list[str] = []
    bad = Tracing("bad", seen, **{hook: RuntimeError("hook")})
    output = await world.run(Tracing("out", seen), bad, attempt=StageOutput.fail("x") if hook == "error" else OK)
    assert (output.status, output.error) == (StageStatus.FAIL, "hook")
    assert seen[-1] == "leave out"
    assert "after out" in seen
    assert ("leave bad" in seen) == (hook != "before")


@pytest.mark.parametrize("hook", ["before", "after", "error"])
async def test_a_hook_that_returns_something_else_is_named(world, hook):
    output = await world.run(Tracing("bad", [], **{hook: 5}), attempt=StageOutput.fail("x") if hook == "error" else OK)
    assert output.status is StageStatus.FAIL
    assert "interceptor Tracing returned a int" in output.error


async def test_cancellation_passes_through_and_everyone_leaves(world):
    seen: list[str] = []
    entered = asyncio.Event()

    async def hangs() -> None:
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(world.run(Tracing("a", seen), attempt=hangs))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["before a", "leave a"]
    output = await world.run(attempt=StageCancelledError("stop", reason="why"))
    assert (output.status, output.cancel_reason) == (StageStatus.CANCEL, "why")


async def test_lazy_outputs_decode_only_when_read(world):
    loads: list[int] = []
    lazy = LazyOutput(StageOutput.ok().add_metadata("k", 1), lambda: loads.append(1) or {"a": 1})
    assert await world.run(Tracing("a", []), MetricsInterceptor(), LoggingInterceptor(), attempt=lazy) is lazy
    assert (lazy.metadata, lazy.is_success, lazy.decoded, loads) == ({"k": 1}, True, False, [])

    class Reads(BaseInterceptor, frozen=True):
        def after(self, ctx: InterceptorContext, output: Any) -> Any:
            assert output.data == output.data_or_empty() == {"a": 1}
            return output.with_data({"b": 2})

    output = await world.run(Reads(), attempt=lazy)
    assert isinstance(output, StageOutput)
    assert (output.data, output.metadata, loads, lazy.decoded) == ({"a": 1, "b": 2}, {"k": 1}, [1], True)


def test_chains_are_values_and_check_their_members():
    chain = InterceptorChain()
    more = chain.add(TimeoutInterceptor(seconds=5)).add(TimeoutInterceptor(seconds=3))
    assert (len(chain), chain.is_empty, len(more), more.timeout, chain.timeout) == (0, True, 2, 3, None)
    for wrong in (object(), CircuitBreaker):
        with pytest.raises(DefinitionError, match="not an interceptor"):
            InterceptorChain([wrong])
    for make in (
        lambda: TimeoutInterceptor(seconds=0),
        lambda: RateLimit(rate=0),
        lambda: ConcurrencyLimit(limit=0),
        lambda: CircuitBreaker(threshold=0),
    ):
        with pytest.raises(DefinitionError, match="greater than 0"):
            make()


# ---------------------------------------------------------------- built in


async def test_timeout_stops_the_attempt_and_says_what_was_allowed(world):
    stopped = asyncio.Event()

    async def hangs() -> None:
        world.now += 3
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    output = await world.run(TimeoutInterceptor(seconds=0.01), attempt=hangs)
    assert stopped.is_set()
    assert (output.status, output.retryable, output.error_info.code) == (StageStatus.FAIL, True, "SF-TIMEOUT")
    assert (output.error_info.elapsed, output.error_info.limit) == (3.0, 0.01)
    own = await world.run(TimeoutInterceptor(seconds=60), attempt=TimeoutError("the stage's own"))
    assert own.error_info.type == "TimeoutError"


async def test_the_circuit_opens_tries_once_and_closes(world):
    breaker = CircuitBreaker(threshold=2, cooldown=10)
    for _ in range(2):
        assert (await world.run(breaker, attempt=ValueError("down"))).error == "down"
    assert world.events == [("circuit.opened", {"stage": "s", "failures": 2, "cooldown": 10})]
    ran: list[int] = []
    refused = await world.run(breaker, attempt=lambda: ran.append(1) or OK)
    assert (refused.status, refused.retryable, refused.error_info.code) == (StageStatus.FAIL, True, "SF-CIRCUIT-OPEN")
    assert (refused.error_info.retry_after, ran, breaker.status(world.ctx())) == (10.0, [], "open")
    world.now += 10
    assert breaker.status(world.ctx()) == "half_open"
    assert (await world.run(breaker, attempt=StageOutput.retry("still"))).status is StageStatus.RETRY
    assert breaker.status(world.ctx()) == "open"
    world.now += 10
    assert (await world.run(breaker)).status is StageStatus.OK
    assert (breaker.status(world.ctx()), world.events[-1]) == ("closed", ("circuit.closed", {"stage": "s"}))


async def test_only_failures_in_a_row_open_it_and_refusals_change_nothing(world):
    breaker = CircuitBreaker(threshold=2, cooldown=10)
    for attempt in (ValueError(), OK, ValueError(), StageOutput.skip("x"), ValueError(), StageOutput.cancel("c")):
        await world.run(breaker, attempt=attempt)
    assert breaker.status(world.ctx()) == "closed"
    await world.run(breaker, attempt=ValueError())
    for _ in range(5):
        await world.run(breaker)
    world.now += 9.9
    assert breaker.status(world.ctx()) == "open"


async def test_half_open_lets_one_through_and_a_cancelled_trial_decides_nothing(world):
    breaker = CircuitBreaker(threshold=1, cooldown=10)
    slow_started, slow_release = asyncio.Event(), asyncio.Event()

    async def slow() -> StageOutput:
        slow_started.set()
        await slow_release.wait()
        return OK

    early = asyncio.create_task(world.run(breaker, attempt=slow))
    await slow_started.wait()
    await world.run(breaker, attempt=ValueError())
    slow_release.set()
    await early  # began while the circuit was closed: its success does not close it
    assert breaker.status(world.ctx()) == "open"

    world.now += 10
    entered = asyncio.Event()

    async def hangs() -> None:
        entered.set()
        await asyncio.Event().wait()

    trial = asyncio.create_task(world.run(breaker, attempt=hangs))
    await entered.wait()
    assert (await world.run(breaker)).error_info.code == "SF-CIRCUIT-OPEN"
    trial.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trial
    assert (await world.run(breaker)).status is StageStatus.OK
    assert breaker.status(world.ctx()) == "closed"


async def test_a_recovered_failure_still_counts(world):
    breaker = CircuitBreaker(threshold=1, cooldown=10)
    saved = await world.run(breaker, Tracing("r", [], error=OK), attempt=ValueError())
    assert saved is OK
    assert breaker.status(world.ctx()) == "open"


async def test_a_circuit_is_one_for_the_engine_and_a_bucket_one_per_run():
    engine = InterceptorStates()
    one, two = World(engine), World(engine)
    breaker, rate = CircuitBreaker(threshold=1), RateLimit(rate=1)
    await one.run(breaker, rate, attempt=ValueError())
    assert breaker.status(two.ctx()) == "open"
    await two.run(rate)
    assert (one.slept, two.slept) == ([], [])
    equal = CircuitBreaker(threshold=1)
    assert equal == breaker
    assert equal.status(one.ctx()) == "closed"


async def test_the_rate_spreads_attempts_and_allows_a_burst_after_a_pause(world):
    limit = RateLimit(rate=2, burst=3)
    for _ in range(6):
        await world.run(limit)
    assert world.slept == [0.5, 1.0, 1.5]
    world.now += 100
    world.slept.clear()
    for stage in ("a", "b", "a", "b"):
        await world.run(limit, stage=stage)
    assert world.slept == [0.5]


async def test_concurrency_is_limited_in_order_and_freed_on_every_way_out(world):
    limit = ConcurrencyLimit(limit=2)
    running: list[int] = []
    gates = {n: asyncio.Event() for n in range(5)}

    def attempt(n: int) -> Any:
        async def body() -> StageOutput:
            running.append(n)
            await gates[n].wait()
            if n == 1:
                raise ValueError
            return OK

        return body

    async def turns() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(world.run(limit, attempt=attempt(n))) for n in range(5)]
    await turns()
    assert running == [0, 1]
    tasks[2].cancel()  # while it waits
    gates[1].set()  # fails
    await turns()
    assert running == [0, 1, 3]
    tasks[0].cancel()  # while it runs
    await turns()
    assert running == [0, 1, 3, 4]
    gates[3].set()
    gates[4].set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each).__name__ for each in outcomes] == [
        "CancelledError", "StageOutput", "CancelledError", "StageOutput", "StageOutput",
    ]  # fmt: skip
    assert (await world.run(limit)).status is StageStatus.OK


async def test_a_slot_handed_to_a_waiter_that_is_cancelled_goes_on_to_the_next(world):
    limit = ConcurrencyLimit(limit=1)
    release = asyncio.Event()

    async def holds() -> StageOutput:
        await release.wait()
        return OK

    first = asyncio.create_task(world.run(limit, attempt=holds))
    waiters = [asyncio.create_task(world.run(limit)) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    release.set()
    first.add_done_callback(lambda _: waiters[0].cancel())
    await first
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(outcomes[1], StageOutput)
    assert (await world.run(limit)) is OK


async def test_logging_and_metrics_tell_what_happened(world, caplog):
    caplog.set_level(logging.INFO, "stageflow.interceptors")

    def takes_time() -> StageOutput:
        world.now += 0.25
        return StageOutput.fail("broken", retryable=True)

    await world.run(LoggingInterceptor(), MetricsInterceptor(), attempt=takes_time)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["s: attempt 1 starts", "s: attempt 1 ended fail after 250.0 ms: broken"]
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert caplog.records[1].seconds == 0.25
    expected = {"stage": "s", "attempt": 1, "lane": "thread", "status": "fail", "seconds": 0.25, "retryable": True}
    assert world.events == [("stage.metrics", expected)]


async def test_changing_an_input_is_found(world):
    inputs = {"fetch": [1, [2]], "other": 3}

    def mutates() -> StageOutput:
        inputs["fetch"][1].append(4)  # type: ignore[index]
        return OK

    assert (await world.run(ImmutabilityCheck(), inputs=inputs, snapshot={"a": 1})) is OK
    output = await world.run(ImmutabilityCheck(), inputs=inputs, snapshot={"a": 1}, attempt=mutates)
    assert output.error_info.code == "SF-INPUTS-CHANGED"
    assert "changed input 'fetch'" in output.error
    assert world.events == [("stage.immutability_violated", {"stage": "s", "changed": ["input 'fetch'"]})]


async def test_context_size_warns_once_and_records_always(world, caplog):
    snapshot = {"text": "x" * 90}
    check = ContextSizeInterceptor(max_bytes=110)
    for _ in range(2):
        await world.run(check, snapshot=snapshot)
    assert [record.getMessage() for record in caplog.records] == ["the snapshot has 101 bytes, 92% of 110"]
    assert world.events == [("context.size_recorded", {"stage": "s", "size_bytes": 101})] * 2
    large = {"text": "x" * 200}
    await world.run(check, snapshot=large)
    assert "more than 110" in caplog.records[-1].getMessage()
    assert ContextSizeInterceptor(warn_threshold=7).warn_threshold == 1.0


def test_size_of_anything():
    assert size_of({"a": 1}) == 7
    assert size_of({"a": memoryview(b"x" * 1000)}) >= 1000
    assert size_of({"a": object()}) > 10
