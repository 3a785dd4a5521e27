"""A guard that fails has the whole path to it run again, with its feedback; everybody else sees the final version."""

import pytest

from stageflow import Engine, GuardRetryPolicy, PipelineBuilder, StageKind, StageOutput
from stageflow.testing.clock import VirtualClock

FOUR = ("guard_retry.attempt", "guard_retry.scheduled", "guard_retry.exhausted", "guard_retry.recovered")


def draft(ctx):
    said = ctx.feedback
    return {"version": 1 if said is None else said["attempt"] + 1, "told": None if said is None else dict(said)}


def polish(draft, ctx):
    return {**draft, "polished": draft["version"], "feedback_seen": ctx.feedback is not None}


def strict(polish):
    if polish["version"] < 3:
        return StageOutput.fail(f"version {polish['version']}", data={"missing": 3 - polish["version"]})
    return polish["version"]


def stubborn(polish):
    return StageOutput.fail("always the same", data={"missing": 1})


def raises(polish):
    raise ValueError("always the same")


def build(guard, lane, **policy):
    seen = []

    def beside(polish):
        seen.append(polish["version"])
        return polish["version"]

    graph = (
        PipelineBuilder("p")
        .stage("draft", draft, executor=lane)
        .stage("polish", polish, executor=lane)
        .stage(
            "guard",
            guard,
            kind=StageKind.GUARD,
            executor=lane,
            guard_retry=GuardRetryPolicy("draft", **{"max_attempts": 5, **policy}),
        )
        .stage("beside", beside, executor="thread", after=["guard"])
        .build()
    )
    return graph, seen


def test_the_whole_path_runs_again_with_the_guards_words_and_data(engine, lane, sink):
    graph, seen = build(strict, lane)
    result = engine.run(graph, event_sinks=[sink])
    assert result.success
    assert result.data("guard") == 3
    final = result.data("polish")
    assert (final["polished"], final["feedback_seen"]) == (3, True)
    assert final["told"] == {"guard": "guard", "error": "version 2", "data": {"missing": 1}, "attempt": 2}
    assert seen == [3]  # who waits for the guard sees the final version only
    assert [event.type for event in sink if event.type in FOUR] == [
        "guard_retry.attempt",
        "guard_retry.scheduled",
        "guard_retry.attempt",
        "guard_retry.scheduled",
        "guard_retry.recovered",
    ]
    assert [event.stage for event in sink if event.type == "stage.completed"].count("draft") == 3


def test_attempts_count_the_guards_failures(engine, lane, sink):
    graph, seen = build(strict, lane, max_attempts=2)
    result = engine.run(graph, event_sinks=[sink])
    assert result.status == "failed"
    assert result.outputs["guard"].error == "version 2"
    assert result.outputs["guard"].data == {"missing": 1}
    assert result.data("draft")["version"] == 2
    (last,) = [event.data for event in sink if event.type == "guard_retry.exhausted"]
    assert (last["reason"], last["attempts"]) == ("max_attempts", 2)
    assert seen == []


@pytest.mark.parametrize("guard", [stubborn, raises])
def test_unchanged_failures_stagnate_by_text_and_data(engine, lane, sink, guard):
    graph, _ = build(guard, lane, stagnation_limit=2)
    assert not engine.run(graph, event_sinks=[sink]).success
    (last,) = [event.data for event in sink if event.type == "guard_retry.exhausted"]
    assert (last["reason"], last["attempts"], last["stagnation_hits"]) == ("stagnation", 3, 2)


def test_only_the_named_fields_are_compared(engine, sink):
    calls = []

    def noisy(polish):
        calls.append(1)
        return StageOutput.fail("same text", data={"noise": len(calls), "missing": 1})

    graph, _ = build(noisy, "thread", stagnation_limit=2, hash_fields=("missing",))
    engine.run(graph, event_sinks=[sink])
    assert [event.data["reason"] for event in sink if event.type == "guard_retry.exhausted"] == ["stagnation"]
    assert len(calls) == 3


def test_the_guards_time_runs_from_its_first_failure(sink):
    clock = VirtualClock()

    async def slow_draft():
        await clock.sleep(10)
        return clock.now

    def guard(draft):
        return StageOutput.fail(f"at {draft}")

    policy = GuardRetryPolicy("draft", max_attempts=100, timeout_seconds=25)
    graph = PipelineBuilder("p").stage("draft", slow_draft).stage("guard", guard, kind="guard", guard_retry=policy)
    with Engine(clock=clock) as engine:
        assert not engine.run(graph.build(), event_sinks=[sink]).success
    assert clock.now == pytest.approx(40.0)
    assert [event.data["reason"] for event in sink if event.type == "guard_retry.exhausted"] == ["timeout"]


def test_a_consumer_of_the_retried_stage_sees_the_last_version_in_the_end(engine):
    versions = []

    def reads(draft):
        versions.append(draft["version"])
        return draft["version"]

    policy = GuardRetryPolicy("draft", max_attempts=5)
    graph = (
        PipelineBuilder("p")
        .stage("draft", draft, executor="thread")
        .stage("polish", polish, executor="thread")
        .stage("guard", strict, kind=StageKind.GUARD, guard_retry=policy, executor="thread")
        .stage("reads", reads, executor="thread")
        .build()
    )
    result = engine.run(graph)
    assert result.success
    assert result.data("reads") == result.data("draft")["version"] == 3
    assert versions[-1] == 3


def test_the_failure_of_a_retried_stage_is_the_runs(engine):
    def once(ctx):
        if ctx.feedback is not None:
            raise OSError("the second time")
        return {"version": 1}

    policy = GuardRetryPolicy("draft", max_attempts=5)
    graph = (
        PipelineBuilder("p")
        .stage("draft", once, executor="thread")
        .stage("polish", polish, executor="thread")
        .stage("guard", strict, kind=StageKind.GUARD, guard_retry=policy, executor="thread")
        .build()
    )
    result = engine.run(graph)
    assert result.outputs["draft"].error == "the second time"
    assert result.failures.failures[0].stage == "draft"
