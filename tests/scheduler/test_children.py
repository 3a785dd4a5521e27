"""Attempts that wait for child runs: what they hold is not lent, and a child that needs it ends and says so.

One machine, no loop: the driver's part is played by the test, which says what ended and counts what was started.
"""

import pytest

from stageflow import PipelineBuilder, Resources
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.audit import audit
from stageflow.scheduler.layout import Layout
from stageflow.scheduler.machine import Machine


def work(n=1):
    return n


def layout(*stages, lane="thread"):
    """A graph of stages that do not depend on each other: (name, policies)."""
    graph = PipelineBuilder("g")
    for name, policies in stages:
        graph = graph.stage(name, work, executor=lane, **policies)
    return Layout(graph.build(), [lane] * len(stages))


GPU = {"resources": Resources(tokens={"gpu": 1})}
DISK = {"resources": Resources(tokens={"disk": 1})}


class Told:
    """A machine, what runs in it and which runs have ended how."""

    def __init__(self, **options):
        self.machine = Machine({"thread": 4, "process": 2}, **options)
        self.under = {}
        self.ended = {}
        self.runs = 0

    def say(self, *signals):
        for action in self.machine.handle_all(list(signals), 1.0):
            if type(action) in (act.StartAttempt, act.StartBlock):
                self.under[action.run, action.stage] = action.task
            elif type(action) is act.FinishRun:
                self.ended[action.run] = action
        audit(self.machine)

    def run(self, plan, parent=0):
        self.runs += 1
        if parent:
            self.say(sig.ChildrenWait(parent, True))
        self.say(sig.RunSubmitted(self.runs, f"run-{self.runs}", plan, "fail_fast", None, True, parent))
        return self.runs

    def over(self, run, stage=0):
        self.say(sig.AttemptEnded(self.under.pop((run, stage)), "ok"))

    def came_back(self, parent):
        self.say(sig.ChildrenWait(parent, False))


def test_a_child_that_needs_what_its_parent_holds_ends_and_says_who_waits_for_whom():
    told = Told(tokens={"gpu": 1})
    outer = told.run(layout(("outer", GPU)))
    parent = told.under[outer, 0]
    child = told.run(layout(("inner", GPU)), parent)
    ended = told.ended[child]
    assert (ended.status, ended.error.code) == ("failed", "SF-NO-PROGRESS")
    assert ended.error.message == (
        "nothing of the run can start: stage 'outer' of run run-1 holds the token 'gpu' and waits for its child run"
        " run-2, whose stage 'inner' waits for the token 'gpu'"
    )
    told.came_back(parent)
    told.over(outer)
    assert told.ended[outer].status == "completed", "what it does about that is the parent's affair"
    assert told.machine.admission.free_tokens == {"gpu": [0]}


def test_a_second_token_is_enough_for_both():
    told = Told(tokens={"gpu": 2})
    outer = told.run(layout(("outer", GPU)))
    child = told.run(layout(("inner", GPU)), told.under[outer, 0])
    told.over(child)
    assert told.ended[child].status == "completed"


def test_what_somebody_else_holds_is_waited_for():
    told = Told(tokens={"gpu": 2})
    other = told.run(layout(("other", GPU)))
    outer = told.run(layout(("outer", GPU)))
    parent = told.under[outer, 0]
    child = told.run(layout(("inner", GPU)), parent)
    assert child not in told.ended
    told.over(other)
    told.over(child)
    told.came_back(parent)
    told.over(outer)
    assert [told.ended[run].status for run in (other, outer, child)] == ["completed"] * 3


def test_the_child_does_first_what_it_can():
    told = Told(tokens={"gpu": 1})
    outer = told.run(layout(("outer", GPU)))
    child = told.run(layout(("inner", GPU), ("free", {})), told.under[outer, 0])
    assert child not in told.ended
    told.over(child, 1)
    assert told.ended[child].error.code == "SF-NO-PROGRESS"


def test_a_run_between_is_named_as_well():
    told = Told(tokens={"gpu": 1})
    outer = told.run(layout(("outer", GPU)))
    middle = told.run(layout(("middle", {})), told.under[outer, 0])
    inner = told.run(layout(("inner", GPU)), told.under[middle, 0])
    message = told.ended[inner].error.message
    assert (
        "'outer' of run run-1 holds the token 'gpu' and waits for its child run run-2, whose stage 'middle'" in message
    )
    assert "waits for its child run run-3, whose stage 'inner' waits for the token 'gpu'" in message
    assert middle not in told.ended


def test_two_parents_that_hold_what_the_other_child_needs():
    told = Told(tokens={"gpu": 1, "disk": 1})
    first, second = told.run(layout(("first", GPU))), told.run(layout(("second", DISK)))
    a = told.run(layout(("inner_a", DISK)), told.under[first, 0])
    assert not told.ended, "the second may end yet"
    b = told.run(layout(("inner_b", GPU)), told.under[second, 0])
    assert set(told.ended) == {b}, "one of them is enough: the younger"
    message = told.ended[b].error.message
    assert "'first' of run run-1 holds the token 'gpu' and waits for its child run run-3" in message
    assert "'second' of run run-2 holds the token 'disk' and waits for its child run run-4" in message
    told.came_back(told.under[second, 0])
    told.over(second)
    told.over(a)
    assert told.ended[a].status == "completed"


def test_children_of_one_attempt_are_waited_for_together():
    told = Told(tokens={"gpu": 1})
    outer = told.run(layout(("outer", GPU)))
    parent = told.under[outer, 0]
    used = told.machine.lanes["thread"].used
    free = told.run(layout(("free", {})), parent)
    held = told.run(layout(("held", GPU)), parent)
    assert held not in told.ended, "the parent may go on with what the first of them says"
    told.over(free)
    assert held not in told.ended
    told.came_back(parent)
    assert told.machine.lanes["thread"].used == used - 1, "it waits for the other"
    assert told.ended[held].error.code == "SF-NO-PROGRESS"
    told.came_back(parent)
    assert told.machine.lanes["thread"].used == used
    told.over(outer)
    assert told.ended[outer].status == "completed"


@pytest.mark.parametrize(
    ("policies", "holds", "options"),
    [
        ({"concurrency": 1}, "the turn of its stage (`concurrency`)", {}),
        ({"resources": Resources(memory=600)}, "reserved memory", {"memory": 1000}),
        ({"resources": Resources(cpu=2)}, "cores", {}),
    ],
)
def test_every_limit_that_a_waiting_attempt_keeps(policies, holds, options):
    told = Told(**options)
    plan = layout(("again", policies))
    outer = told.run(plan)
    child = told.run(plan, told.under[outer, 0])
    assert f"holds {holds} and waits for its child run run-2" in told.ended[child].error.message


def test_slots_are_given_back_in_every_lane():
    for lane in ("thread", "process"):
        told = Told()
        told.machine.lanes[lane].slots = 1
        plan = layout(("again", {}), lane=lane)
        runs = [told.run(plan)]
        for _ in range(4):
            runs.append(told.run(plan, told.under[runs[-1], 0]))
        for run in reversed(runs):
            if run != runs[-1]:
                told.came_back(told.under[run, 0])
            told.over(run)
        assert {told.ended[run].status for run in runs} == {"completed"}


def test_a_rate_is_no_circle():
    told = Told(tokens={"gpu": 1})
    outer = told.run(layout(("outer", GPU)))
    plan = layout(("inner", {"rate": "1/10s"}))
    parent = told.under[outer, 0]
    told.run(plan, parent)
    late = told.run(plan, parent)
    assert late not in told.ended
