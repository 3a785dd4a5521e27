"""The mutable side of a run, worker-scoped resources, ports, and extensions: what a stage reaches beside its inputs."""

import contextlib
import os

import pytest

from stageflow import (
    ContextSnapshot,
    Engine,
    PipelineBuilder,
    PipelineContext,
    RetryConfig,
    RunIdentity,
    StageArtifact,
    StageEvent,
    StageOutput,
)


def flaky(ctx):
    if ctx.attempt == 1:
        raise ValueError
    return {"attempt": ctx.attempt}


def behind(flaky):
    return flaky["attempt"] + 1


async def test_a_run_has_the_identity_of_its_context_and_fills_its_bag():
    emitted = []
    ctx = PipelineContext(
        RunIdentity.new().with_user_id("ann"), emitter=lambda type, data: emitted.append((type, data))
    )
    graph = (
        PipelineBuilder("p")
        .stage("flaky", flaky, executor="thread", retry=RetryConfig(2, 0))
        .stage("behind", behind, executor="thread")
        .build()
    )
    async with Engine() as engine:
        result = await engine.execute(graph, ctx=ctx, snapshot=ContextSnapshot())
    assert result.run_id == ctx.pipeline_run_id()
    assert ctx.outputs.to_dict() == {"flaky": {"attempt": 2}, "behind": 3}
    assert (ctx.outputs.get_entry("flaky").attempt, ctx.outputs.get_entry("flaky").is_final) == (2, True)
    completed = [data for type, data in emitted if type == "stage.completed"]
    assert [data["stage"] for data in completed] == ["flaky", "behind"]
    assert {data["pipeline_run_id"] for data in completed} == {ctx.pipeline_run_id()}
    assert not ctx.is_cancelled()


@pytest.mark.parametrize("listening", [False, True])
async def test_its_outputs_are_filled_as_stages_end(listening):
    ctx = PipelineContext(emitter=(lambda type, data: None) if listening else None)
    seen = {}

    def watch(name):
        def stage():
            seen[name] = ctx.outputs.to_dict()
            return name

        return stage

    graph = (
        PipelineBuilder("p")
        .stage("a", watch("a"), executor="async")
        .map("m", lambda x: x + 1, over="xs", executor="thread", after=["a"])
        .stage("b", watch("b"), ["m"], executor="thread")
        .stage("far", os.getpid, ["b"], executor="process")
        .stage("c", watch("c"), ["far"], executor="inline")
        .build()
    )
    async with Engine(processes=1) as engine:
        result = await engine.execute(graph, ctx=ctx, inputs={"xs": [1, 2]})
    assert seen["a"] == {}
    assert {name: seen["b"][name] for name in ("a",)} == {"a": "a"}
    assert list(seen["b"]["m"]) == [2, 3]
    assert (seen["c"]["b"], seen["c"]["far"]) == ("b", result.data("far"))
    assert set(ctx.outputs.stages()) == {"a", "m", "b", "far", "c"}


async def test_a_context_stops_its_run_and_a_run_that_stops_itself_says_so_there():
    async with Engine(grace=20.0) as engine:
        ctx = PipelineContext()
        ctx.mark_cancelled("before")
        result = await engine.execute(PipelineBuilder("p").stage("s", lambda: 1).build(), ctx=ctx)
        assert (result.cancelled, result.cancel_reason) == (True, "before")
        ctx = PipelineContext()
        graph = PipelineBuilder("p").stage("s", lambda: StageOutput.cancel("enough")).build()
        await engine.execute(graph, ctx=ctx)
        assert (ctx.is_cancelled(), ctx.cancel_reason()) == (True, "enough")


async def test_a_forked_context_follows_its_parent_and_not_the_reverse():
    parent = PipelineContext(topology="p")
    child = parent.fork_for_subpipeline()
    child.mark_cancelled("child")
    assert not parent.is_cancelled()
    other = parent.fork_for_subpipeline()
    parent.mark_cancelled("parent")
    assert (other.cancel_reason(), child.cancel_reason(), other.topology()) == ("parent", "child", "p")


# ---------------------------------------------------------------- resources and ports


class Port:
    """An injected service: made once per process, closed with it."""

    def __init__(self, log):
        self.log = log
        self.write("open")

    def write(self, what):
        with open(self.log, "a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def call(self, x):
        return x, os.getpid()

    def close(self):
        self.write("close")


@contextlib.contextmanager
def session(log):
    port = Port(log)
    try:
        yield port
    finally:
        port.close()


def uses_port(x, ctx):
    port = ctx.resource("db")
    assert port is ctx.resource("db")
    return port.call(x)


@pytest.mark.parametrize("lane", ["async", "thread", "process", "inline"])
@pytest.mark.parametrize("factory", [Port, session])
def test_a_resource_is_made_once_per_process_and_closed_with_the_engine(lane, factory, tmp_path):
    log = tmp_path / "log"
    graph = PipelineBuilder("p").map("m", uses_port, over="xs", executor=lane).build()
    with Engine(processes=2, resources={"db": lambda: factory(str(log))}) as engine:
        values = list(engine.run(graph, {"xs": list(range(40))}).data("m"))
        values += list(engine.run(graph, {"xs": list(range(40))}).data("m"))
    pids = {pid for _, pid in values}
    assert (pids == {os.getpid()}) is (lane != "process")
    lines = log.read_text().split("\n")[:-1]
    assert sorted(lines) == sorted(f"{what} {pid}" for pid in pids for what in ("open", "close"))


def test_an_unknown_resource_names_the_known(one, lane):
    assert "no resource 'db' is configured" in one(uses_port, lane, {"x": 1}).outputs["s"].error


# ---------------------------------------------------------------- extensions


def reads_extension(ctx):
    return ctx.snapshot.extensions.get("skills"), ctx.snapshot.extensions.contains("unknown")


def test_extensions_reach_every_lane(engine, lane):
    snapshot = ContextSnapshot()
    bundle = snapshot.extensions.register("skills", {"level": 3})
    bundle = bundle if bundle is not None else snapshot.extensions
    snapshot = snapshot.with_extensions(bundle)
    graph = PipelineBuilder("p").stage("s", reads_extension, executor=lane).build()
    assert engine.run(graph, snapshot=snapshot).data("s") == ({"level": 3}, False)


# ---------------------------------------------------------------- what is attached to an output


def attaches(ctx):
    ctx.artifact("table", "t1", "Table", [1, 2], rows=2)
    output = StageOutput.ok(1).with_events([StageEvent.with_data("seen", {"pages": 3})])
    return output.with_artifacts([StageArtifact.new("picture", "p1", "Picture")])


def test_events_and_artifacts_of_an_output_reach_the_sinks_and_the_result(one, lane, sink):
    output = one(attaches, lane, run={"event_sinks": [sink]}).outputs["s"]
    assert [(made.artifact_type, made.id, made.metadata) for made in output.artifacts] == [
        ("picture", "p1", {}),
        ("table", "t1", {"rows": 2}),
    ]
    assert [(event.stage, event.data) for event in sink.of("seen")] == [("s", {"pages": 3})]
    told = [(event.stage, event.data["type"], event.data["name"]) for event in sink.of("stage.artifact")]
    assert told == [("s", "picture", "Picture"), ("s", "table", "Table")]


async def test_events_of_a_run_say_whose_it_is():
    """Ids, mode and topology: what every sink is told at the start, and an emitter with each event."""
    emitted = []
    identity = RunIdentity.new().with_request_id("q").with_session_id("s")
    ctx = PipelineContext(
        identity, topology="docs", execution_mode="test", emitter=lambda type, data: emitted.append((type, data))
    )
    graph = PipelineBuilder("p").stage("s", lambda: 1, executor="async").build()
    async with Engine() as engine:
        await engine.execute(graph, ctx=ctx)
    started = next(data for type, data in emitted if type == "run.started")
    assert (started["session_id"], started["execution_mode"], started["topology"]) == ("s", "test", "docs")
    for type, data in emitted:
        assert (data["request_id"], data["execution_mode"], data["topology"]) == ("q", "test", "docs"), type
        assert data["pipeline_run_id"] == identity.pipeline_run_id
