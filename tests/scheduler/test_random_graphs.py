"""Random pipelines x random order of everything, on the machine alone: the books balance after each signal, every run
ends, and where the outcome is determined it is the one that a trivial interpreter works out."""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stageflow_scheduler_simulator import Plan, Simulation

from stageflow.core.errors import InvariantError
from stageflow.pipeline.policies import Resources
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.audit import Story, replay
from stageflow.scheduler.machine import Machine
from stageflow.testing.strategies import graphs, random_sketch

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def simulate(seed, **options):
    """One random pipeline under random circumstances, to its end."""
    dice = random.Random(seed)
    sketch = random_sketch(dice, most=options.pop("most", 9), faults=options.pop("faults", True))
    options.setdefault("memory", dice.choice([0, 0, 15, 60]))
    options.setdefault("deaths", dice.choice([0, 0, 0.1, 0.3]))
    options.setdefault("crowds", dice.choice([0, 0.3]))
    lanes = {"process": dice.randint(1, 3), "thread": dice.randint(1, 3), "async": 4, "inline": 1}
    simulation = Simulation(dice, lanes=lanes, ahead={"process": dice.randint(1, 3)}, **options)
    run = simulation.submit(sketch)
    simulation.run()
    simulation.check_clean()
    return simulation, run


@pytest.mark.parametrize("block", range(8))
def test_any_pipeline_without_faults_gives_the_reference_values(block):
    for seed in range(block * 20, block * 20 + 20):
        simulation, run = simulate(seed, faults=False)
        assert simulation.finished[run].status == "completed"
        simulation.check_reference(run)


@pytest.mark.parametrize("block", range(8))
def test_any_pipeline_with_faults_ends_as_the_reference_says(block):
    for seed in range(10_000 + block * 60, 10_000 + block * 60 + 60):
        simulation, run = simulate(seed)
        simulation.check_reference(run)


@pytest.mark.parametrize("block", range(4))
def test_a_cancel_at_any_moment_ends_every_run_and_leaves_nothing(block):
    for seed in range(20_000 + block * 50, 20_000 + block * 50 + 50):
        simulation, run = simulate(seed, cancel=0.05)
        assert simulation.finished[run].status in ("completed", "failed", "cancelled")


@pytest.mark.parametrize("circumstances", [{"deaths": 0.3}, {"memory": 15}, {"cancel": 0.03}, {"stops": 0.05}])
def test_values_that_go_on_before_their_item_has_ended_come_once_and_in_order(circumstances):
    flowed, stood, seed = 0, 0, 60_000
    while flowed < 150:
        seed += 1
        dice = random.Random(seed)
        sketch = random_sketch(dice, most=7, faults="stops" not in circumstances)
        if not any(one.role == "flat" for one in sketch.stages):
            continue
        stages = tuple(
            replace(one, policies={**one.policies, "replayable": True}) if one.role == "flat" else one
            for one in sketch.stages
        )
        simulation = Simulation(dice, **circumstances)
        run = simulation.submit(replace(sketch, stages=stages))
        simulation.run()
        simulation.check_clean()
        if "cancel" not in circumstances and "stops" not in circumstances:
            simulation.check_reference(run)
        flowed += simulation.flowed
        stood += simulation.stood
    assert stood > (40 if "memory" in circumstances else 0)


@pytest.mark.parametrize("circumstances", [{"deaths": 0.1}, {"memory": 15}, {"stops": 0.03}])
def test_what_runs_back_to_back_becomes_what_it_becomes_stage_by_stage(circumstances):
    regions, handed = Counter(), 0
    for seed in range(80_000, 80_080):
        dice = random.Random(seed)
        simulation = Simulation(dice, audits=0.2, **circumstances)
        run = simulation.submit(random_sketch(dice, most=4, chain=True))
        simulation.run()
        simulation.check_clean()
        simulation.check_reference(run)
        specs = simulation.layouts[run].specs
        for action in simulation.actions:
            if type(action) is act.StartBlock and action.region is not None:
                last = specs[action.region[-1]].policies
                regions["batch"] += specs[action.stage].policies.batch is not None
                regions["retry"] += last.retry is not None
                regions["timeout"] += last.timeout is not None
        handed += sum(
            bool(told.done.handed) for _, signals in simulation.log for told in signals if hasattr(told, "done")
        )
    assert min(regions["batch"], regions["retry"], regions["timeout"], handed) > 10


@pytest.mark.parametrize("block", range(4))
def test_runs_that_share_lanes_tokens_and_memory_do_not_touch_each_other(block):
    for seed in range(30_000 + block * 10, 30_000 + block * 10 + 10):
        dice = random.Random(seed)
        simulation = Simulation(dice, lanes={"process": 2, "thread": 2, "async": 2, "inline": 1}, memory=40)
        runs = [simulation.submit(random_sketch(dice, most=6)) for _ in range(3)]
        simulation.run(60_000)
        simulation.check_clean()
        for run in runs:
            simulation.check_reference(run)


@given(graphs(most=6), st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
def test_hypothesis_finds_no_pipeline_that_breaks_the_books(sketch, seed):
    simulation = Simulation(random.Random(seed), deaths=0.1)
    run = simulation.submit(sketch)
    simulation.run()
    simulation.check_clean()
    simulation.check_reference(run)


def test_a_log_of_signals_replays_to_the_same_actions():
    for seed in range(40):
        simulation, _ = simulate(seed, audits=0.0)
        fresh = Machine(
            {name: lane.slots for name, lane in simulation.machine.lanes.items()},
            tokens={"gpu": 2},
            memory=simulation.machine.memory,
            poison_limit=simulation.machine.poison_limit,
            ahead=simulation.machine.ahead,
        )
        assert replay(simulation.log, fresh) == simulation.actions


def test_the_story_of_a_stage_is_kept_on_request():
    dice = random.Random(3)
    simulation = Simulation(dice)
    story = Story(simulation.machine)
    simulation.submit(random_sketch(dice, faults=False))
    simulation.run()
    assert story.of("run-1", "s0")[-1].endswith("-> DONE")
    assert story.of("run-1", "nobody") == ()


@pytest.mark.parametrize("circumstances", [{}, {"cancel": 0.005}, {"memory": 15}])
def test_attempts_may_wait_for_runs_that_they_have_started(circumstances):
    nested = stuck = 0
    for seed in range(70_000, 70_100):
        dice = random.Random(seed)
        plan, *children = (holding(random_sketch(dice, most=most, lanes=("thread", "async"))) for most in (6, 3, 3))
        simulation = Simulation(dice, children=children, crowds=0.2, **circumstances)
        simulation.submit(plan)
        simulation.run()
        for run, end in simulation.finished.items():
            simulation.check_reference(run)
            nested += simulation.depth[run] > 1
            stuck += end.error is not None and end.error.code == "SF-NO-PROGRESS"
    assert nested > 5
    assert stuck > 0, "some child needed the tokens that its parents held"


def holding(sketch):
    """The same pipeline, whose plain stages need a token each."""
    token = {"resources": Resources(tokens={"gpu": 1})}
    stages = (replace(one, policies={**one.policies, **token}) if one.role == "stage" else one for one in sketch.stages)
    return Plan(replace(sketch, stages=tuple(stages)))


def test_a_fault_that_was_seen_late_is_told_by_the_turn_in_which_it_began(monkeypatch):
    handle_all = Machine.handle_all

    def leaks(machine, signals, now):
        actions = handle_all(machine, signals, now)
        machine.lanes["async"].used += any(type(signal) is sig.SourceEnded for signal in signals)
        return actions

    monkeypatch.setattr(Machine, "handle_all", leaks)
    simulation = Simulation(random.Random(5), audits=0.0)
    simulation.submit(random_sketch(random.Random(5), faults=False))
    with pytest.raises(InvariantError, match="a slot is used iff a task holds it") as caught:
        simulation.run()
    first = next(turn for turn, (_, told) in enumerate(simulation.log) if type(told[-1]) is sig.SourceEnded)
    assert caught.value.__notes__[0].startswith(f"after turn {first} of {len(simulation.log)}")


def searched(tmp_path, seconds):
    command = [sys.executable, str(Path(__file__).with_name("search.py")), "--logs", str(tmp_path)]
    done = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_search_on_all_cores_finds_nothing(tmp_path):
    found = searched(tmp_path, 1)
    assert found["steps"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_millions_of_steps_a_minute_find_nothing(tmp_path):
    found = searched(tmp_path, 900)
    assert found["steps_a_minute"] > 1_000_000
