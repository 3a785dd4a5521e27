"""Graphs inside graphs and runs started from stages: identity, links, events, limits and cancellation, in any lane."""

import asyncio
import time

import pytest

from stageflow import (
    CancellationToken,
    ContextSnapshot,
    Engine,
    FailureCollector,
    PipelineBuilder,
    PipelineContext,
    Resources,
    RetryConfig,
    RunIdentity,
    StageOutput,
)
from stageflow.testing.sinks import RecordingSink


def who(ctx):
    return {"run": ctx.run_id, "user": ctx.snapshot.run_id.user_id, "depth": ctx.depth, "text": ctx.snapshot.input_text}


def until_asked(ctx):
    ctx.defer(ctx.emit, "child.cleaned", {})
    ctx.emit("child.waits", {})
    while not ctx.token.cancelled:
        time.sleep(0.002)
    return ctx.token.reason


def explode(n):
    raise ValueError(f"child got {n}")


def double(n):
    return n * 2


CHILD = PipelineBuilder("child").stage("who", who).build()
SLOW = PipelineBuilder("slow").stage("until_asked", until_asked, executor="thread").build()
BAD = PipelineBuilder("bad").stage("explode", explode).build()


def spawns(ctx):
    result = ctx.spawn_sync(CHILD, {})
    return {**result.data("who"), "parent": result.parent_run_id, "child": result.run_id}


async def spawns_async(ctx):
    result = await ctx.spawn(CHILD, {})
    return {**result.data("who"), "parent": result.parent_run_id, "child": result.run_id}


def spawns_slow(ctx):
    return ctx.spawn_sync(SLOW, {}).status


async def spawns_slow_async(ctx):
    return (await ctx.spawn(SLOW, {})).status


def spawns_bad(ctx):
    result = ctx.spawn_sync(BAD, {"n": 3})
    return result.success, result.error


def deeper(ctx, n):
    graph = PipelineBuilder("deeper").stage("deeper", deeper, executor=ctx.snapshot.metadata["lane"]).build()
    result = ctx.spawn_sync(graph, {"n": n + 1})
    return result.data("deeper") if result.success else (n, result.error)


@pytest.mark.parametrize(
    ("stage", "lane"),
    [
        (spawns, "thread"),
        (spawns, "process"),
        (spawns, "inline"),
        (spawns_async, "async"),
        (spawns_async, "thread"),
        (spawns_async, "process"),
        (spawns_async, "inline"),
    ],
)
def test_a_child_has_its_own_id_and_its_parents_rest(engine, sink, stage, lane):
    graph = PipelineBuilder("p").stage("s", stage, executor=lane).build()
    snapshot = ContextSnapshot(run_id=RunIdentity.new().with_user_id("ann"), input_text="hello")
    result = engine.run(graph, snapshot=snapshot, event_sinks=[sink])
    value = result.data("s")
    assert (value["user"], value["text"], value["depth"]) == ("ann", "hello", 1)
    assert value["parent"] == result.run_id
    assert value["run"] == value["child"] != result.run_id
    told = [(event.type, event.run_id, event.data["child_run_id"]) for event in sink if "child" in event.type]
    assert told == [
        ("pipeline.spawned_child", result.run_id, value["child"]),
        ("pipeline.child_completed", result.run_id, value["child"]),
    ]


@pytest.mark.parametrize("lane", ["thread", "process", "inline"])
def test_a_failed_child_is_told_to_the_parents_sinks_and_fails_nobody(one, sink, lane):
    result = one(spawns_bad, lane, run={"event_sinks": [sink]})
    assert result.data("s") == (False, "stage 'explode' failed: child got 3")
    (failed,) = [event for event in sink if event.type == "pipeline.child_failed"]
    assert failed.data["error"] == "stage 'explode' failed: child got 3"


def test_spawn_sync_on_the_engines_loop_is_refused(one):
    assert "await ctx.spawn" in one(spawns, "async").failures.failures[0].error_info.traceback


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_depth_is_limited_across_processes(engine, lane):
    graph = PipelineBuilder("p").stage("s", deeper, executor=lane).build()
    depth, error = engine.run(graph, {"n": 0}, metadata={"lane": lane}).data("s")
    assert depth == 4  # its child, at depth 5, was refused one of its own
    assert "depth 6; the limit is 5" in error


@pytest.mark.parametrize(
    ("stage", "lane"), [(spawns_slow, "thread"), (spawns_slow, "process"), (spawns_slow_async, "async")]
)
def test_cancelling_the_parent_stops_its_children(one, stage, lane):
    token = CancellationToken().with_deadline(0.4)
    result = one(stage, lane, run={"token": token})
    assert (result.status, result.cancel_reason, result.abandoned) == ("cancelled", "deadline", ())


def test_waiting_for_a_child_holds_no_slot():
    """Two slots, two stages that each need a child with a stage in the same lane."""
    with Engine(processes=1, threads=2, grace=20.0) as engine:
        builder = PipelineBuilder("p")
        for number in range(4):
            builder.stage(f"s{number}", nested_threads, executor="thread")
        assert engine.run(builder.build()).success


def nested_threads(ctx):
    inner = PipelineBuilder("inner").stage("double", double, executor="thread").build()
    return ctx.spawn_sync(inner, {"n": 2}).data("double")


# ---------------------------------------------------------------- as a stage


def test_a_subpipeline_binds_its_inputs_by_name_and_gives_its_outputs(engine, sink):
    inner = PipelineBuilder("inner").stage("double", double).stage("again", lambda double: double + 1).build()
    graph = PipelineBuilder("p").stage("n", lambda: 21).subpipeline("sub", inner).stage("out", lambda sub: sub).build()
    result = engine.run(graph, event_sinks=[sink])
    assert result.data("out") == {"double": 42, "again": 43}
    assert [event.stage for event in sink if event.type == "pipeline.spawned_child"] == ["sub"]


def test_a_failed_subpipeline_fails_its_stage_with_the_cause(engine):
    graph = PipelineBuilder("p").stage("n", lambda: 1).subpipeline("sub", BAD).build()
    output = engine.run(graph).outputs["sub"]
    assert output.error == "subpipeline 'bad' failed: stage 'explode' failed: child got 1"
    assert output.error_info.cause.type == "ValueError"


def test_a_subpipeline_is_retried_like_any_stage(engine):
    seen = []

    def flaky():
        seen.append(1)
        if len(seen) < 3:
            raise ValueError
        return len(seen)

    inner = PipelineBuilder("inner").stage("flaky", flaky, executor="thread").build()
    graph = PipelineBuilder("p").subpipeline("sub", inner, retry=RetryConfig(3, 0)).build()
    assert engine.run(graph).data("sub") == {"flaky": 3}


def test_a_child_that_cancels_itself_does_not_cancel_its_parent(engine):
    inner = PipelineBuilder("inner").stage("stop", lambda: StageOutput.cancel("enough")).build()
    graph = PipelineBuilder("p").subpipeline("sub", inner).stage("beside", lambda: 1).build()
    result = engine.run(graph, failure_mode="continue_on_failure")
    assert result.status == "failed"
    assert result.outputs["sub"].error == "subpipeline 'inner' was cancelled: enough"
    assert result.data("beside") == 1


async def test_stopping_one_stage_stops_only_its_own_children():
    async with Engine(grace=20.0) as engine:
        quick = PipelineBuilder("quick").stage("quick", hold_on).build()
        graph = PipelineBuilder("p").subpipeline("slow", SLOW).subpipeline("quick", quick).build()
        handle = await engine.start(graph, failure_mode="continue_on_failure")
        await asyncio.sleep(0.1)
        handle.cancel("enough", stage="slow")
        result = await handle
    assert result.outputs["slow"].error_info.code == "SF-CANCELLED"
    assert result.data("quick") == {"quick": "held on"}


async def hold_on():
    await asyncio.sleep(0.4)
    return "held on"


def needs(n):
    return n + 1


def token_child(lane, **needed):
    return PipelineBuilder("child").stage("inner", needs, executor=lane, **needed).build()


@pytest.mark.parametrize("inner", ["thread", "process", "async", "inline"])
@pytest.mark.parametrize("outer", ["thread", "async"])
async def test_a_child_that_needs_its_parents_token_is_told_so_and_does_not_hang(outer, inner):
    child = token_child(inner, resources=Resources(tokens={"gpu": 1}))

    def waits(ctx):
        return ctx.spawn_sync(child, {"n": 1}).error

    async def waits_async(ctx):
        return (await ctx.spawn(child, {"n": 1})).error

    runner = waits if outer == "thread" else waits_async
    graph = PipelineBuilder("parent").stage("outer", runner, executor=outer, resources=Resources(tokens={"gpu": 1}))
    async with Engine(threads=1, processes=1, tokens={"gpu": 1}) as engine:
        result = await asyncio.wait_for(graph.build().execute(engine=engine), 20)
        assert "stage 'outer'" in result.data("outer")
        assert "holds the token 'gpu' and waits for its child run" in result.data("outer")
        assert "stage 'inner' waits for the token 'gpu'" in result.data("outer")
        again = await child.execute(inputs={"n": 1}, engine=engine)
        assert again.data("inner") == 2, "the token is free again"


async def test_a_subpipeline_that_needs_the_token_of_its_stage_fails_that_stage():
    child = token_child("thread", resources=Resources(tokens={"gpu": 1}))
    graph = (
        PipelineBuilder("parent", inputs={"n": int})
        .stage("outer", child, resources=Resources(tokens={"gpu": 1}))
        .build()
    )
    async with Engine(threads=1, processes=1, tokens={"gpu": 1}) as engine:
        result = await asyncio.wait_for(graph.execute(inputs={"n": 1}, engine=engine), 20)
    assert not result.success
    assert "holds the token 'gpu'" in result.error
    assert result.outputs["outer"].error_info.cause.code == "SF-NO-PROGRESS"


async def test_a_stage_with_one_turn_that_spawns_its_own_graph():
    graphs = []

    def again(ctx, n):
        return ctx.spawn_sync(graphs[0], {"n": n - 1}).error if n else None

    graphs.append(PipelineBuilder("again").stage("again", again, executor="thread", concurrency=1).build())
    async with Engine(threads=4, processes=1) as engine:
        result = await asyncio.wait_for(graphs[0].execute(inputs={"n": 1}, engine=engine), 20)
    assert "holds the turn of its stage (`concurrency`) and waits for its child run" in result.data("again")


LAST_SLOT = PipelineBuilder("child").stage("needs", needs, executor="process").build()
LAST_THREAD = PipelineBuilder("child").stage("needs", needs, executor="thread").build()


def spawns_process(n, ctx):
    return ctx.spawn_sync(LAST_SLOT, {"n": n}).data("needs")


def spawns_thread(n, ctx):
    return ctx.spawn_sync(LAST_THREAD, {"n": n}).data("needs")


async def gathers(n, ctx):
    results = await asyncio.gather(*(ctx.spawn(LAST_THREAD, {"n": n + i}) for i in range(3)))
    return sum(result.data("needs") for result in results)


@pytest.mark.parametrize("lane", ["thread", "process"])
@pytest.mark.parametrize("runner", [spawns_process, spawns_thread, gathers])
async def test_the_last_slot_of_a_lane_is_free_while_its_attempt_waits_for_a_child(lane, runner):
    graph = PipelineBuilder("parent", inputs={"ns": list}).map("outer", runner, "ns", executor=lane).build()
    async with Engine(threads=1, processes=1) as engine:
        result = await asyncio.wait_for(graph.execute(inputs={"ns": [1, 2, 3]}, engine=engine), 30)
    result.raise_for_failure()
    assert list(result.data("outer")) == ([9, 12, 15] if runner is gathers else [2, 3, 4])


def spawns_with_token(ctx):
    return ctx.spawn_sync(token_child("thread", resources=Resources(tokens={"gpu": 1})), {"n": 1}).success


async def test_a_worker_has_no_tokens_of_its_parents_engine_and_says_so():
    graph = PipelineBuilder("parent").stage("outer", spawns_with_token, executor="process").build()
    async with Engine(threads=1, processes=1, tokens={"gpu": 1}) as engine:
        result = await asyncio.wait_for(graph.execute(engine=engine), 30)
    assert not result.success
    assert "needs the token 'gpu', which the engine does not have" in result.error


# ---------------------------------------------------------------- what the parent's sinks hear


def tells(ctx):
    ctx.emit("said", {"depth": ctx.depth})
    return 1


TELLING = PipelineBuilder("telling").stage("tells", tells).build()


def spawns_telling(ctx):
    return ctx.spawn_sync(TELLING, {}).run_id


async def spawns_telling_async(ctx):
    return (await ctx.spawn(TELLING, {})).run_id


@pytest.mark.parametrize("at", ["run", "engine"])
@pytest.mark.parametrize(
    ("stage", "lane"),
    [
        (spawns_telling, "thread"),
        (spawns_telling, "process"),
        (spawns_telling, "inline"),
        (spawns_telling_async, "async"),
        (TELLING, "subpipeline"),
    ],
)
def test_a_childs_events_reach_the_parents_sinks_once_with_its_own_id(sink, stage, lane, at):
    builder = PipelineBuilder("p")
    if lane == "subpipeline":
        builder.subpipeline("s", stage)
    else:
        builder.stage("s", stage, executor=lane)
    with Engine(processes=1, event_sinks=[sink] if at == "engine" else []) as engine:
        result = engine.run(builder.build(), event_sinks=[sink] if at == "run" else [])
    (spawned,) = sink.of("pipeline.spawned_child")
    child = spawned.data["child_run_id"]
    if lane != "subpipeline":
        assert result.data("s") == child
    told = [event for event in sink if event.run_id == child and not event.type.startswith(("worker.", "engine."))]
    assert [(event.type, event.stage) for event in told if event.type != "stage.attempt"] == [
        ("run.started", None),
        ("stage.started", "tells"),
        ("said", "tells"),
        ("stage.completed", "tells"),
        ("run.completed", None),
    ]
    assert told[0].data["parent_run_id"] == result.run_id
    assert sink.of("said")[0].data == {"depth": 1}
    assert result.stats["s"].attempts == 1
    assert set(result.stats) == {"s"}


def test_a_child_with_sinks_of_its_own_is_heard_by_both(engine, sink):
    own = type(sink)()

    async def spawns_with_sink(ctx):
        return (await ctx.spawn(TELLING, {}, event_sinks=[own])).run_id

    graph = PipelineBuilder("p").stage("s", spawns_with_sink).build()
    child = engine.run(graph, event_sinks=[sink]).data("s")
    for heard in (own, sink):
        assert [event.run_id for event in heard.of("said")] == [child]
    assert {event.run_id for event in own if event.run_id is not None} == {child}


@pytest.mark.parametrize(
    ("stage", "lane"),
    [(spawns_slow, "thread"), (spawns_slow, "process"), (spawns_slow_async, "async"), (SLOW, "subpipeline")],
)
def test_a_child_that_was_stopped_is_told_as_cancelled(engine, stage, lane):
    builder = PipelineBuilder("p")
    if lane == "subpipeline":
        builder.subpipeline("s", stage)
    else:
        builder.stage("s", stage, executor=lane)
    token = CancellationToken()

    class Stops(RecordingSink):
        """Cancels the parent once the child is at work."""

        def emit(self, event):
            super().emit(event)
            if event.type == "child.waits":
                token.cancel("enough")

    sink = Stops()
    result = engine.run(builder.build(), token=token, event_sinks=[sink])
    assert (result.status, result.cancel_reason) == ("cancelled", "enough")
    (ended,) = [event for event in sink if event.type.startswith("pipeline.child_")]
    assert (ended.type, ended.stage, ended.data["reason"]) == ("pipeline.child_cancelled", "s", "enough")
    assert ended.run_id == result.run_id
    assert [event.run_id for event in sink.of("child.cleaned")] == [ended.data["child_run_id"]]


def test_a_collector_of_failures_counts_the_stage_and_not_its_childs(engine):
    collector = FailureCollector()
    result = engine.run(PipelineBuilder("p").stage("n", lambda: 1).subpipeline("sub", BAD).build(),
                        event_sinks=[collector])  # fmt: skip
    assert [failure.stage for failure in result.failures] == [failure.stage for failure in collector.failures()]


async def test_an_emitter_is_told_which_child_an_event_is_of():
    emitted = []
    ctx = PipelineContext(emitter=lambda type, data: emitted.append((type, data)))
    async with Engine() as engine:
        await engine.execute(PipelineBuilder("p").subpipeline("sub", TELLING).build(), ctx=ctx)
    ((_, spawned),) = [one for one in emitted if one[0] == "pipeline.spawned_child"]
    ((_, said),) = [one for one in emitted if one[0] == "said"]
    assert (said["pipeline_run_id"], said["child_run_id"]) == (ctx.pipeline_run_id(), spawned["child_run_id"])
    ended = next(data for type, data in emitted if type == "stage.completed" and data["stage"] == "sub")
    assert "child_run_id" not in ended
