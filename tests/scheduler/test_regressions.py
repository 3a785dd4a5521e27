"""Faults that the scheduler once had, each by name, on the machine alone."""

import random
from pathlib import Path

import pytest
from stageflow_scheduler_simulator import Simulation, replayed

from stageflow.scheduler import signals as sig
from stageflow.testing.sketches import Fate, GraphSketch, StageSketch

LOGS = Path(__file__).with_name("logs")


def simulate(*stages, mode="continue_on_failure", seed=0, **options):
    simulation = Simulation(random.Random(seed), **options)
    run = simulation.submit(GraphSketch(stages, mode))
    simulation.run()
    simulation.check_clean()
    simulation.check_reference(run)
    return simulation, run


SOURCE = StageSketch("s", "source", length=30)


@pytest.mark.parametrize("seed", range(8))
def test_a_chained_fold_keeps_its_order_while_a_step_waits_for_its_retry(seed):
    reduce = StageSketch("r", "reduce", over="s", fate=Fate("error", 5, 2, 1), attempts=2)
    simulate(SOURCE, reduce, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_an_ordered_sink_keeps_its_order_while_an_item_waits_for_its_retry(seed):
    policies = {"ordered": True, "kind": "transform"}
    sink = StageSketch("k", "sink", over="s", fate=Fate("error", 4, 1, 1), attempts=2, policies=policies)
    simulate(SOURCE, sink, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_part_that_begins_with_dropped_items_keeps_its_values(seed):
    dropping = StageSketch("d", "map", over="s", fate=Fate("drop", 3, 1), policies={"kind": "transform"})
    retried = StageSketch(
        "m", "map", over="d", fate=Fate("error", 2, 1, 1), attempts=3, policies={"kind": "transform", "keep": True}
    )
    simulate(SOURCE, dropping, retried, seed=seed)


def test_a_share_of_failed_items_is_told_at_the_end_even_if_the_failures_came_first():
    early = StageSketch("m", "map", over="s", fate=Fate("error", 2, 1), policies={"max_failed_items": 0.1})
    simulation, run = simulate(SOURCE, early)
    assert simulation.states(run)["m"] == "fail"


def test_a_map_that_fails_as_a_whole_lets_its_readers_end():
    failing = StageSketch("m", "map", over="s", fate=Fate("error", 2, 1), policies={"max_failed_items": 2})
    readers = [
        StageSketch("batch", "batch", over="m", policies={"batch": 4}),
        StageSketch("joined", "map", over="m", joined="s"),
        StageSketch("fold", "fold", over="m"),
    ]
    for seed in range(8):
        simulation, run = simulate(SOURCE, failing, *readers, seed=seed)
        assert simulation.states(run)["m"] == "fail"
        assert simulation.states(run)["fold"] == "skip"


def test_a_long_chain_of_maps_may_drop_everything():
    chain = [StageSketch("m0", "map", over="s", fate=Fate("drop"))]
    chain.extend(StageSketch(f"m{i}", "map", over=f"m{i - 1}") for i in range(1, 600))
    simulation, run = simulate(StageSketch("s", "source", length=3), *chain, audits=0.0)
    assert simulation.finished[run].status == "completed"


def test_a_run_whose_lane_is_full_of_another_run_is_not_forgotten():
    for seed in range(10):
        simulation = Simulation(random.Random(seed), lanes={"inline": 1}, memory=12)
        runs = [
            simulation.submit(
                GraphSketch((SOURCE, StageSketch("m", "map", over="s"), StageSketch("f", "fold", over="m")))
            )
            for _ in range(3)
        ]
        simulation.run()
        simulation.check_clean()
        for run in runs:
            simulation.check_reference(run)


def test_an_item_that_heeds_its_timeout_does_not_cancel_the_run():
    from stageflow.context.pieces import Done, ItemFailure
    from stageflow.core.output import ErrorInfo

    simulation = Simulation(random.Random(1))
    stage = StageSketch("m", "map", over="s", fate=Fate("hang"), policies={"timeout": 5.0})
    run = simulation.submit(GraphSketch((StageSketch("s", "source", length=1), stage), "continue_on_failure"))
    while not any(under.hung for under in simulation.under.values()):
        simulation.step()
    while not any(under.stopped for under in simulation.under.values()):
        simulation.timer(min(simulation.timers))
    (task,) = simulation.under
    del simulation.under[task]
    info = ErrorInfo(type="stageflow.StageCancelledError", message="stopped")
    done = Done(((0, 1, 0),), (ItemFailure(0, "cancel", info, (0,)),))
    simulation.send(sig.BlockPart(task, done, final=True))
    simulation.run()
    assert simulation.finished[run].status == "failed"
    assert simulation.failed_items[run, 1] == 1


@pytest.mark.parametrize("log", sorted(LOGS.glob("*.json")), ids=lambda path: path.stem)
def test_what_a_random_search_once_found(log):
    """Signal logs as `Simulation.save` writes them, up to the turn after which the books did not balance."""
    machine = replayed(log)
    assert machine.runs
