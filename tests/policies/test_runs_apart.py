"""Two concurrent runs of one graph share nothing but what is declared to be the engine's: limits and circuits."""

import asyncio
import threading

import pytest

from stageflow import (
    BaseInterceptor,
    ConcurrencyLimit,
    Engine,
    GuardRetryPolicy,
    PipelineBuilder,
    PipelineContext,
    RateLimit,
    Resources,
    StageOutput,
)
from stageflow.testing.clock import VirtualClock
from stageflow.testing.sinks import RecordingSink


class Counts(BaseInterceptor, frozen=True, kw_only=True):
    """Counts attempts of its run."""

    def before(self, ctx):
        ctx.state(self, list).append(ctx.stage)
        ctx.emit("counted", {"so_far": len(ctx.state(self, list))})


def starts_of(sink, stage):
    """Seconds at which the stage was started."""
    first = next(event.time_unix_ns for event in sink if event.type == "run.started")
    return [round((event.time_unix_ns - first) / 1e9, 6) for event in sink.of("stage.started", stage)]


async def both(engine, graph, *inputs, **options):
    sinks = [RecordingSink() for _ in inputs]
    runs = [
        engine.execute(graph, inputs=one, event_sinks=[sink], **options)
        for one, sink in zip(inputs, sinks, strict=True)
    ]
    return await asyncio.gather(*runs), sinks


async def test_a_token_bucket_is_shared_by_the_stages_of_a_run_and_by_no_other_run():
    clock, bucket = VirtualClock(), RateLimit(rate=0.1)
    began = {}

    async def stage(who, ctx):
        began.setdefault(who, []).append(clock.now)

    builder = PipelineBuilder("p")
    for name in ("a", "b", "c"):
        builder.stage(name, stage, interceptors=[bucket])
    async with Engine(clock=clock) as engine:
        await both(engine, builder.build(), {"who": 1}, {"who": 2})
    assert began == {1: pytest.approx([0.0, 10.0, 20.0]), 2: pytest.approx([0.0, 10.0, 20.0])}


async def test_rate_and_concurrency_of_a_stage_count_over_all_runs_of_the_engine():
    clock = VirtualClock()
    began, at_once, most = [], [0], [0]

    async def slow(who):
        began.append(clock.now)
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        await clock.sleep(25)
        at_once[0] -= 1

    graph = PipelineBuilder("p").stage("s", slow, rate="0.1/s", concurrency=2).build()
    async with Engine(clock=clock) as engine:
        await both(engine, graph, {"who": 1}, {"who": 2}, {"who": 3})
    assert most == [2]
    assert began == pytest.approx([0.0, 10.0, 25.0])


async def test_tokens_are_the_engines_and_come_back_from_a_run_that_fails():
    held = []

    def holds(who, ctx):
        held.append((who, ctx.tokens["gpu"]))
        if who == 1:
            raise ValueError
        return ctx.tokens["gpu"]

    needs = Resources(tokens={"gpu": 1})
    graph = PipelineBuilder("p").stage("s", holds, executor="thread", resources=needs).build()
    async with Engine(tokens={"gpu": 1}) as engine:
        (bad, good), _ = await both(engine, graph, {"who": 1}, {"who": 2})
        assert (bad.status, good.status) == ("failed", "completed")
        assert sorted(held) == [(1, (0,)), (2, (0,))]
        assert engine._state().driver.machine.admission.free_tokens == {"gpu": [0]}


async def test_interceptors_keep_one_state_per_run():
    counts, limit = Counts(), ConcurrencyLimit(limit=1)
    meet = threading.Barrier(2, timeout=20)

    def stage(who):
        meet.wait()  # both runs hold the one slot of their own limit at the same time
        return who

    graph = PipelineBuilder("p").stage("s", stage, executor="thread", interceptors=[counts, limit]).build()
    async with Engine() as engine:
        results, sinks = await both(engine, graph, {"who": 1}, {"who": 2})
    assert [result.data("s") for result in results] == [1, 2]
    assert [[event.data["so_far"] for event in sink if event.type == "counted"] for sink in sinks] == [[1], [1]]


async def test_guards_bags_and_outputs_are_a_runs_own():
    def work(who, ctx):
        return {"who": who, "tries": (ctx.feedback or {}).get("attempt", 0)}

    def guard(work, who):
        return work["tries"] if work["tries"] >= who else StageOutput.fail(f"{who} wants more than {work['tries']}")

    graph = (
        PipelineBuilder("p")
        .stage("work", work, executor="thread")
        .stage("guard", guard, kind="guard", executor="thread", guard_retry=GuardRetryPolicy("work", max_attempts=9))
        .build()
    )
    contexts = [PipelineContext() for _ in range(3)]
    for number, ctx in enumerate(contexts):
        ctx.data.set("mine", number)
    async with Engine() as engine:
        results = await asyncio.gather(
            *(engine.execute(graph, inputs={"who": who}, ctx=ctx) for who, ctx in enumerate(contexts))
        )
    assert [result.data("guard") for result in results] == [0, 1, 2]
    assert [ctx.outputs.get("work") for ctx in contexts] == [{"who": who, "tries": who} for who in range(3)]
    assert [ctx.data.to_dict() for ctx in contexts] == [{"mine": number} for number in range(3)]


async def test_a_run_that_fails_or_is_cancelled_touches_no_other():
    released = asyncio.Event()

    async def stage(who):
        if who == "bad":
            raise ValueError(who)
        await released.wait()
        return who

    graph = PipelineBuilder("p").stage("s", stage).stage("behind", lambda s: s.upper(), executor="thread").build()
    async with Engine(grace=20.0) as engine:
        good = await engine.start(graph, {"who": "good"})
        bad = await engine.execute(graph, {"who": "bad"})
        stopped = await engine.start(graph, {"who": "stopped"})
        stopped.cancel("enough")
        assert (bad.status, (await stopped).status) == ("failed", "cancelled")
        assert not good.done
        released.set()
        assert (await good).data("behind") == "GOOD"
