"""The spelled-out path of plain stages does what the general rules do."""

from __future__ import annotations

import random

import pytest

from stageflow import PipelineBuilder, RetryConfig
from stageflow.core.output import ErrorInfo
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.audit import audit
from stageflow.scheduler.books import Lane
from stageflow.scheduler.layout import Layout
from stageflow.scheduler.machine import Machine

LANES = {"async": 3, "thread": 2, "process": 2}


def nothing():
    """A stage."""


def random_graph(dice, size):
    builder = PipelineBuilder("g")
    for i in range(size):
        deps = sorted({f"s{dice.randrange(i)}" for _ in range(dice.randint(0, 3))}) if i else []
        options = {}
        if dice.random() < 0.15:
            options["retry"] = RetryConfig(max_attempts=3, base_delay_ms=10)
        if dice.random() < 0.15:
            options["concurrency"] = 1
        if dice.random() < 0.2:
            options["priority"] = dice.randint(1, 3)
        if dice.random() < 0.1:
            options["conditional"] = True
        builder.stage(f"s{i}", nothing, deps, **options)
    return builder.build()


def told(actions):
    """The actions, with each row of `Completed` as the two events that it stands for."""
    found = []
    for action in actions:
        if type(action) is not act.Completed:
            found.append(action)
            continue
        width = len(act.ROW)
        for row in (action.rows[at : at + width] for at in range(0, len(action.rows), width)):
            stage, attempt, _, duration, *rest = row
            seconds, cpu_seconds, bytes_in, bytes_out, pid, started = rest
            shared = {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "bytes_in": bytes_in,
                "bytes_out": bytes_out,
                "worker_pid": pid,
                "started": started,
            }
            ended = {
                "duration_ms": duration * 1000.0,
                **shared,
                "queued_ms": max(0.0, duration - seconds) * 1000.0,
            }
            found.append(act.Emit("stage.attempt", action.run, stage, None, attempt, {"status": "ok", **shared}))
            found.append(act.Emit("stage.completed", action.run, stage, None, attempt, ended))
    # runs that end in the same turn end in either order
    over = sorted((action for action in found if type(action) is act.FinishRun), key=lambda action: action.run)
    return [action for action in found if type(action) is not act.FinishRun], over


def ending(dice, task, skips):
    roll = dice.random()
    if roll < 0.06:
        return sig.AttemptEnded(task, "error", error=ErrorInfo(type="E", message="e", retryable=True), retryable=True)
    if roll < 0.1:
        return sig.AttemptEnded(task, "lost", suspect=dice.random() < 0.5, error=ErrorInfo(type="L", message="l"))
    if skips and roll < 0.13:
        return sig.AttemptEnded(task, "skip", reason="no")
    hint = "a hint" if roll > 0.98 else None
    return sig.AttemptEnded(task, "ok", 0, 7, dice.random(), 0.1, 5, 11, 1.0, skip_hint=hint)


@pytest.mark.parametrize("mode", ["fail_fast", "continue_on_failure", "best_effort"])
@pytest.mark.parametrize("block", range(4))
def test_both_ways_give_equal_actions_for_equal_signals(block, mode):
    short = 0
    for seed in range(block * 25, block * 25 + 25):
        dice = random.Random(f"{mode} {seed}")
        machines = [Machine(LANES, ahead={"process": 2}) for _ in range(2)]
        machines[1].unrolled = False
        faulty = dice.random() < 0.6
        runs = dice.randint(1, 2)
        signals = []
        for run in range(1, runs + 1):
            graph = random_graph(dice, dice.randint(1, 25))
            layout = Layout(graph, [dice.choice(list(LANES)) for _ in graph.specs])
            signals.append(sig.RunSubmitted(run, f"run-{run}", layout, mode, None, True))
        now, under, timers, finished = 10.0, [], {}, set()
        for _ in range(3000):
            both = [machine.handle_all(list(signals), now) for machine in machines]
            short += sum(type(action) is act.Completed for action in both[0])
            assert not any(type(action) is act.Completed for action in both[1])
            assert told(both[0]) == told(both[1])
            for machine in machines:
                audit(machine)
            for action in both[0]:
                if type(action) is act.StartAttempt:
                    under.append(action.task)
                elif type(action) is act.SetTimer:
                    timers[action.timer] = action.at
                elif type(action) is act.CancelTimer:
                    timers.pop(action.timer, None)
                elif type(action) is act.FinishRun:
                    finished.add(action.run)
            if len(finished) == runs:
                break
            now += 0.001
            if under:
                chosen = dice.sample(under, dice.randint(1, min(len(under), 4)))
                under = [task for task in under if task not in chosen]
                signals = [
                    ending(dice, task, True)
                    if faulty
                    else sig.AttemptEnded(task, "ok", seconds=dice.choice((0.0001, 0.001)))
                    for task in chosen
                ]
                if faulty and dice.random() < 0.01:
                    signals.insert(dice.randrange(len(signals) + 1), sig.CancelRequested(1, "by the test"))
            else:
                timer = min(timers, key=timers.__getitem__)
                now = max(now, timers.pop(timer))
                signals = [sig.TimerDue(timer)]
        assert len(finished) == runs
        assert machines[0].final_states == machines[1].final_states
    assert short


@pytest.mark.parametrize("lanes", [("async",), ("process",), ("process", "thread")])
def test_a_chain_is_handed_on_as_the_general_rules_would(lanes):
    builder = PipelineBuilder("chain")
    for i in range(40):
        builder.stage(f"s{i}", nothing, [f"s{i - 1}"] if i else [])
    layout = Layout(builder.build(), [lanes[i // 5 % len(lanes)] for i in range(40)])
    machines = [Machine(LANES, ahead={"process": 2}) for _ in range(2)]
    machines[1].unrolled = False
    dice = random.Random(3)
    signals, now, handed = [sig.RunSubmitted(1, "r", layout, "fail_fast", None, True)], 1.0, 0
    while True:
        both = [machine.handle_all(list(signals), now) for machine in machines]
        assert told(both[0]) == told(both[1])
        kinds = [type(action) for action in both[0]]
        handed += kinds == [act.Completed, act.StartAttempt]
        books = [
            (one.seconds, one._seq, one._next_task, [(lane.used, len(lane.fifo)) for lane in one.lanes.values()])
            for one in machines
        ]
        assert books[0] == books[1]
        for machine in machines:
            audit(machine)
        if act.FinishRun in kinds:
            break
        (started,) = (action for action in both[0] if type(action) is act.StartAttempt)
        now += 0.5
        signals = [sig.AttemptEnded(started.task, "ok", 0, 7, dice.random() / 100, 0.1, 5, 11, now)]
        if started.stage == 7:
            signals.append(sig.CapacityChanged(lanes[0], 1))
    assert handed == 39


@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize(("seconds", "ahead"), [(0.02, 1), (0.002, 2), (0.0001, 8)])
def test_the_shorter_a_process_stage_is_the_more_of_it_are_handed_over_ahead(seconds, ahead, unrolled):
    builder = PipelineBuilder("wide")
    for i in range(40):
        builder.stage(f"s{i}", nothing)
    layout = Layout(builder.build(), ["process"] * 40)
    machine = Machine(LANES, ahead={"process": 2})
    machine.unrolled = unrolled
    machine.seconds.update({(layout.key, stage): seconds for stage in range(40)})
    actions = machine.handle(sig.RunSubmitted(1, "r", layout), 1.0)
    most = len(actions)
    while started := [action for action in actions if type(action) is act.StartAttempt]:
        assert all(action.short == (seconds < 0.005) for action in started)
        actions = machine.handle_all([sig.AttemptEnded(action.task, seconds=seconds) for action in started], 1.0)
        audit(machine)
    assert most == LANES["process"] * ahead
    assert any(type(action) is act.FinishRun for action in actions)


def test_nobody_listening_changes_only_what_is_told():
    dice = random.Random(1)
    for _ in range(20):
        graph = random_graph(dice, 12)
        layout = Layout(graph, ["async"] * 12)
        ends = []
        for listening in (False, True):
            machine = Machine(LANES)
            signals = [sig.RunSubmitted(1, "r", layout, "fail_fast", None, listening)]
            starts, status = [], None
            while status is None:
                tasks = []
                for action in machine.handle_all(signals, 1.0):
                    if type(action) is act.StartAttempt:
                        tasks.append(action.task)
                        starts.append((action.task, action.stage))
                    elif type(action) is act.FinishRun:
                        status = action.status
                signals = [sig.AttemptEnded(task) for task in tasks]
            ends.append((starts, status, machine.final_states))
        assert ends[0] == ends[1]


def test_a_queue_gives_the_least_entry_whatever_came_first():
    class Any:
        id = 1

    dice = random.Random(2)
    lane = Lane("async", 1)
    entries = [(dice.randint(0, 2), -dice.randint(0, 3), 1, i, Any(), i, None, 0.0) for i in range(300)]
    taken, pushed = [], []
    for entry in entries:
        lane.push(entry)
        pushed.append(entry)
        if dice.random() < 0.4:
            least = min(pushed)
            assert lane.first() is least
            assert lane.pop() is least
            pushed.remove(least)
            taken.append(least)
    assert sorted(entry[:4] for entry in lane.entries()) == sorted(entry[:4] for entry in pushed)
    rest = []
    while lane:
        rest.append(lane.pop())
    assert rest == sorted(pushed)
