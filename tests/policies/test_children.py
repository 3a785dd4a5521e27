"""Graphs inside graphs and runs started from stages: identity, links, events, limits and cancellation, in any lane."""

import asyncio
import time

import pytest

from stageflow import CancellationToken, ContextSnapshot, Engine, PipelineBuilder, RetryConfig, RunIdentity, StageOutput


def who(ctx):
    return {"run": ctx.run_id, "user": ctx.snapshot.run_id.user_id, "depth": ctx.depth, "text": ctx.snapshot.input_text}


def until_asked(ctx):
    ctx.defer(ctx.emit, "child.cleaned", {})
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
    with Engine(processes=1, threads=2, grace=0.3) as engine:
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
    async with Engine(grace=0.5) as engine:
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
