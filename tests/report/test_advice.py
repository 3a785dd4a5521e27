"""What the report says of a stage in the wrong lane."""

from __future__ import annotations

from stageflow.observability.stats import RunStats, StageStats
from stageflow.report.advice import advice, verdict


def said(**fields):
    stats = {"crunch": StageStats(stage="crunch", attempts=200, items_in=200, **fields)}
    totals = RunStats(wall_seconds=4.0)
    return verdict(stats, totals, 2), [one.text for one in advice(stats, totals, 2)]


def test_threads_that_wait_for_each_others_interpreter_are_sent_to_the_process_lane():
    sentence, lines = said(lane="thread", busy_seconds=60.0, cpu_seconds=3.2)
    assert "share one interpreter" in sentence
    assert "executor='process'" in sentence
    assert any("executor='process'" in line for line in lines)


def test_threads_that_wait_for_something_else_are_left_alone():
    for cpu_seconds in (0.5, 7.0):  # little computing, or computing that gives the interpreter away
        sentence, lines = said(lane="thread", busy_seconds=60.0, cpu_seconds=cpu_seconds)
        assert "interpreter" not in sentence
        assert not any("executor='process'" in line for line in lines)
