"""What a run keeps of its failures, and the same rules for code that follows a run from outside."""

import pytest

from stageflow import FailureCollector, FailureMode, FailureRecord, FailureSummary, PipelineBuilder


def fails():
    raise ValueError("no")


def odd_fails(x):
    if x % 2:
        raise ValueError(f"odd {x}")
    return x


def build(lane):
    return (
        PipelineBuilder("p")
        .stage("fails", fails, executor=lane)
        .stage("behind", lambda fails: 1)
        .stage("far", lambda behind: 2)
        .stage("beside", lambda: 3, executor=lane)
        .build()
    )


def test_partial_results_and_every_failure_are_kept(engine, lane):
    result = engine.run(build(lane), failure_mode="continue_on_failure")
    summary = result.failures
    assert (summary.total_stages, summary.completed_stages, summary.failed_stages, summary.skipped_stages) == (
        4,
        1,
        1,
        2,
    )
    assert summary.success_rate() == 0.25
    assert summary.partial_results["beside"].data == 3
    (record,) = summary
    assert (record.stage, record.error, record.error_type) == ("fails", "no", "ValueError")
    assert summary.to_dict()["success_rate"] == 0.25


def test_the_rate_of_an_empty_run_is_zero():
    assert FailureSummary().success_rate() == 0.0


@pytest.mark.parametrize(("budget", "fails_all"), [(3, False), (2, True), (0.5, False), (0.25, True)])
def test_an_error_budget_is_a_count_or_a_fraction(engine, budget, fails_all):
    graph = (
        PipelineBuilder("p")
        .map("m", odd_fails, over="xs", executor="thread", max_failed_items=budget)
        .stage("n", lambda m: len(m))
        .build()
    )
    result = engine.run(graph, {"xs": list(range(6))}, failure_mode="continue_on_failure")
    assert result.success is False
    assert sorted(failure.item for failure in result.failures if failure.item) or fails_all
    assert (str(result.outputs["m"].status) == "fail") is fails_all
    if not fails_all:
        assert result.data("n") == 3


def test_a_collector_folds_the_events_of_a_run_to_the_same_summary(engine, lane):
    collector = FailureCollector(FailureMode.CONTINUE_ON_FAILURE)
    result = engine.run(build(lane), failure_mode="continue_on_failure", event_sinks=[collector])
    told, kept = collector.summary(4), result.failures
    for field in ("completed_stages", "failed_stages", "skipped_stages", "failed_items"):
        assert getattr(told, field) == getattr(kept, field)
    assert [failure.error for failure in told] == [failure.error for failure in kept]


@pytest.mark.parametrize(
    ("mode", "child", "grandchild", "beside", "stop"),
    [
        (FailureMode.FAIL_FAST, False, False, False, True),
        (FailureMode.CONTINUE_ON_FAILURE, False, False, True, False),
        (FailureMode.BEST_EFFORT, True, True, True, False),
    ],
)
def test_what_may_run_after_a_failure(mode, child, grandchild, beside, stop):
    collector = FailureCollector(mode)
    assert collector.can_run("a", [])
    collector.record_failure(FailureRecord(stage="a", error="no"))
    assert collector.can_run("child", ["a"]) is child
    assert collector.can_run("grandchild", ["child"]) is grandchild
    assert collector.can_run("beside", []) is beside
    assert collector.should_stop() is stop
    assert collector.has_failed("a")
    assert not collector.has_failed("beside")
