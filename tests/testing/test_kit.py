"""The testing kit does what it says: clock, scripted lane, sinks, assertions, stages, faults, golden files, plugin."""

import asyncio
import re
import textwrap
from pathlib import Path

import pytest

import stageflow.testing
from stageflow import Engine, PipelineBuilder, RetryConfig, RunIdentity, StageOutput
from stageflow.core.executor import OutcomeKind
from stageflow.testing import (
    FailingStage,
    Flaky,
    KillsWorker,
    MockStage,
    OutOfMemory,
    RecordingSink,
    RecordingStage,
    ScriptedExecutor,
    SlowStage,
    SuccessStage,
    TestContext,
    TestFixture,
    VirtualClock,
    assert_golden,
    assert_output,
    assert_run,
    golden_events,
    golden_text,
    linear_pipeline,
)

HOUR = 3600.0


def twice(x):
    return x * 2


def test_every_public_name_exists():
    assert {name for name in stageflow.testing.__all__ if getattr(stageflow.testing, name) is not None}
    assert set(stageflow.testing.__all__) == set(stageflow.testing._HOME)


# ---------------------------------------------------------------- the example of the README


def test_the_example_of_the_readme_works(pytestconfig, tmp_path):
    readme = Path(stageflow.testing.__file__).with_name("README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) == 5
    names = {
        "Flaky": Flaky, "PipelineBuilder": PipelineBuilder, "RetryConfig": RetryConfig, "assert_run": assert_run,
    }  # fmt: skip
    exec(textwrap.dedent(code), names)
    sink, clock = RecordingSink(), VirtualClock()
    with Engine(clock=clock, event_sinks=(sink,), processes=1) as engine:
        names["test_a_flaky_fetch_is_tried_again"](engine, clock, sink)
    assert clock.now > 0


def test_the_fixtures_of_the_plugin_work_together(stageflow_engine, virtual_clock, recording_sink):
    stage = SlowStage(HOUR, "late", clock=virtual_clock)
    graph = PipelineBuilder("p").stage("slow", stage).build()
    assert_run(stageflow_engine.run(graph)).completed().stage("slow").has_value("late")
    assert virtual_clock.now == HOUR
    recording_sink.assert_order("run.started", "stage.completed", "run.completed")


# ---------------------------------------------------------------- virtual time


def test_backoffs_are_exact_and_take_no_time(stageflow_engine, virtual_clock, recording_sink):
    starts = []

    def failing():
        starts.append(virtual_clock.now)
        raise ValueError("no")

    retry = RetryConfig(max_attempts=5, base_delay_ms=1000 * HOUR, max_delay_ms=1e12, jitter="none")
    result = stageflow_engine.run(PipelineBuilder("p").stage("f", failing, retry=retry).build())
    assert_run(result).failed("no")
    assert starts == [0.0, HOUR, 3 * HOUR, 7 * HOUR, 15 * HOUR]


def test_a_timeout_is_exact(stageflow_engine, virtual_clock):
    graph = PipelineBuilder("p").stage("s", SlowStage(10 * HOUR, clock=virtual_clock), timeout=HOUR).build()
    result = stageflow_engine.run(graph)
    assert virtual_clock.now == HOUR
    assert result.outputs["s"].error_info.limit == HOUR


def test_a_total_timeout_counts_every_attempt_and_wait(stageflow_engine, virtual_clock):
    calls = []

    async def failing():
        calls.append(virtual_clock.now)
        await virtual_clock.sleep(100)
        raise ValueError("no")

    retry = RetryConfig(max_attempts=9, base_delay_ms=30_000, backoff="constant", jitter="none")
    result = stageflow_engine.run(PipelineBuilder("p").stage("f", failing, retry=retry, total_timeout=320).build())
    assert calls == [0.0, 130.0, 260.0]
    assert virtual_clock.now == 320.0
    assert_run(result).failed()


def test_time_stands_still_while_a_thread_works(stageflow_engine, virtual_clock):
    seen = []

    def works():
        virtual_clock.block(5)
        seen.append(virtual_clock.now)

    graph = PipelineBuilder("p").stage("w", works).stage("s", SlowStage(3, clock=virtual_clock)).build()
    assert stageflow_engine.run(graph).success
    assert seen == [5.0]


def test_time_stands_still_while_a_source_works(stageflow_engine, virtual_clock):
    async def turns():
        for _ in range(20):  # more than time takes to jump
            await asyncio.sleep(0)

    def source():
        (line,) = virtual_clock._lines.values()
        asyncio.run_coroutine_threadsafe(turns(), line.loop).result(20)
        yield virtual_clock.now

    graph = PipelineBuilder("p").stage("source", source).map("m", lambda x: x, "source", executor="inline").build()
    result = stageflow_engine.run(graph, timeout=HOUR)
    assert result.success, result.error
    assert list(result.data("m")) == [0.0]


# ---------------------------------------------------------------- a lane that the test dictates


def test_a_script_says_how_calls_end():
    lane = ScriptedExecutor("process", slots=1, script=[OutcomeKind.LOST, ValueError("once"), "done"])
    retry = RetryConfig(max_attempts=2, base_delay_ms=1000)
    graph = PipelineBuilder("p").stage("s", twice, executor="process", inputs={"x": "x"}, retry=retry).build()
    sink = RecordingSink()
    with Engine(lanes={"process": lambda: lane}, clock=VirtualClock()) as engine:
        result = engine.run(graph, {"x": 1}, event_sinks=[sink])
    assert result.outputs["s"].status == "ok"
    assert len(lane.calls) == 3
    reasons = [event.data["why"] for event in sink.of("stage.retrying")]
    assert reasons == ["infrastructure", "failure"]


async def test_the_third_death_on_one_task_is_final():
    lane = ScriptedExecutor("process", slots=1)
    graph = PipelineBuilder("p").stage("s", twice, executor="process").build()
    async with Engine(lanes={"process": lambda: lane}) as engine:
        import asyncio

        run = asyncio.create_task(engine.execute(graph, {"x": 1}))
        for _ in range(3):
            lane.lose(await lane.next_call())
        result = await run
    assert_run(result).failed("died")
    assert len(lane.calls) == 3


# ---------------------------------------------------------------- assertions


def test_assertions_pass_and_chain():
    output = StageOutput.ok({"a": 1}).add_metadata("k", "v")
    assert_output(output).succeeded().status("ok").has_data().contains("a").value("a", 1).metadata("k", "v")
    assert_output(StageOutput.fail("boom", retryable=True)).failed("boo").retryable()
    assert_output(StageOutput.skip("why")).succeeded().skipped("why").not_retryable()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: assert_output(StageOutput.fail("boom")).succeeded(), r"Expected success.*status=fail.*'boom'"),
        (lambda: assert_output(StageOutput.ok(3)).failed(), r"Expected failure.*data=3"),
        (lambda: assert_output(StageOutput.ok({})).has_data(), r"Expected data.*\{\}"),
        (lambda: assert_output(StageOutput.ok({"a": 1})).value("a", 2), "'a' to be 2 and not 1"),
        (lambda: assert_output(StageOutput.ok({"a": 1})).contains("b"), "key 'b'.*{'a': 1}"),
        (lambda: assert_output(StageOutput.ok()).metadata("k"), "metadata with the key 'k'"),
    ],
)
def test_a_failed_assertion_shows_what_was_there(check, message):
    with pytest.raises(AssertionError, match=message):
        check()


def test_assertions_on_runs_name_every_stage(stageflow_engine):
    graph = PipelineBuilder("p").stage("good", SuccessStage(1)).stage("bad", FailingStage("boom")).build()
    result = stageflow_engine.run(graph, failure_mode="continue_on_failure")
    assert_run(result).failed("boom").ran("good").stage("bad").failed("boom")
    with pytest.raises(AssertionError, match="good: ok, bad: fail"):
        assert_run(result).completed()


def test_event_assertions(stageflow_engine, recording_sink):
    stageflow_engine.run(PipelineBuilder("p").stage("a", SuccessStage()).build())
    recording_sink.assert_emitted("stage.*", stage="a")
    recording_sink.assert_not_emitted("stage.failed")
    with pytest.raises(AssertionError, match=r"saw 0.*run\.started"):
        recording_sink.assert_emitted("stage.failed")
    with pytest.raises(AssertionError, match=r"'run\.started' is missing"):
        recording_sink.assert_order("run.completed", "run.started")


# ---------------------------------------------------------------- stages, faults and fixtures


def test_the_stages(stageflow_engine):
    mock, recording = MockStage({"v": 1}), RecordingStage()
    graph = PipelineBuilder("p").stage("m", mock).stage("r", recording, ["m"]).build()
    assert stageflow_engine.run(graph).success
    assert mock.call_count == 1
    assert recording.executions == [("r", 1, {"m": {"v": 1}})]
    mock.reset()
    recording.clear()
    assert (mock.call_count, recording.executions) == (0, [])


@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_worker_killed_at_any_point_of_a_map_changes_no_result(stageflow_engine, when):
    fault = KillsWorker(twice, 2, when=when)
    graph = PipelineBuilder("p").map("m", fault, "xs", executor="process", kind="work").build()
    result = stageflow_engine.run(graph, {"xs": list(range(8))})
    assert_run(result).completed()
    assert list(result.data("m")) == [x * 2 for x in range(8)]
    assert fault.count() == 10


def test_running_out_of_memory_is_an_ordinary_failure(stageflow_engine):
    retry = RetryConfig(max_attempts=2, base_delay_ms=1)
    graph = PipelineBuilder("p").map("m", OutOfMemory(twice), "xs", retry=retry, executor="process").build()
    result = stageflow_engine.run(graph, {"xs": [1, 2, 3]})
    assert list(result.data("m")) == [2, 4, 6]


async def test_a_context_honours_everything_it_is_given():
    identity = RunIdentity(pipeline_run_id="run-7", request_id="req-1")
    context = TestContext(
        {"url": "u"}, upstream={"fetch": b"x"}, failed=("other",), metadata={"k": 1}, identity=identity, attempt=3,
        item=(4,),
    )  # fmt: skip

    class Reads:
        def execute(self, ctx):
            ctx.emit("seen", {"n": 1})
            ctx.defer(seen.append, "cleaned")
            return {
                "url": ctx.snapshot.inputs["url"],
                "fetch": ctx.inputs["fetch"],
                "failed": list(ctx.inputs.failed),
                "meta": ctx.snapshot.metadata["k"],
                "run": (ctx.run_id, ctx.snapshot.run_id.request_id),
                "attempt": ctx.attempt,
                "item": ctx.item,
            }

    seen = []
    output = await context.run(Reads)
    assert output.data == {
        "url": "u", "fetch": b"x", "failed": ["other"], "meta": 1, "run": ("run-7", "req-1"),
        "attempt": 3, "item": (4,),
    }  # fmt: skip
    assert [event["type"] for event in context.events] == ["seen"]
    assert seen == ["cleaned"]


def test_fixture_and_linear_pipeline(stageflow_engine):
    fixture = TestFixture()
    assert (fixture.all_succeeded, fixture.any_failed) == (True, False)
    graph = linear_pipeline("l", {"a": SuccessStage(), "b": SuccessStage(), "c": FailingStage()}).build()
    assert graph.execution_order == ["a", "b", "c"]
    fixture.record_run(stageflow_engine.run(graph))
    assert (fixture.all_succeeded, fixture.any_failed) == (False, True)
    with pytest.raises(KeyError, match="there are a, b, c"):
        fixture.get_output("d")


# ---------------------------------------------------------------- golden files


def test_golden_files(stageflow_engine, recording_sink, tmp_path, monkeypatch):
    graph = PipelineBuilder("p").stage("a", SuccessStage(1)).build()
    path = tmp_path / "events.jsonl"
    stageflow_engine.run(graph)
    first = golden_events(recording_sink)
    with pytest.raises(AssertionError, match="does not exist"):
        assert_golden(path, first)
    monkeypatch.setenv("STAGEFLOW_UPDATE_GOLDEN", "1")
    assert_golden(path, first)
    monkeypatch.delenv("STAGEFLOW_UPDATE_GOLDEN")
    recording_sink.clear()
    stageflow_engine.run(graph)
    assert_golden(path, golden_events(recording_sink))
    with pytest.raises(AssertionError, match=r"\+.*another"):
        assert_golden(path, first + "another\n")
    assert golden_text("took 12.5 ms, 80 % of 3 items") == "took N ms, N % of 3 items\n"
