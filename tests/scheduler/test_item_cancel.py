"""One item of a map stopped at a random moment: it ends once, its neighbours lose nothing, the books balance."""

import random
from dataclasses import replace

import pytest
from stageflow_scheduler_simulator import Simulation

from stageflow.testing.strategies import Fate, GraphSketch, StageSketch, random_sketch

SOURCE = StageSketch("s", "source", length=30)
KINDS = {
    "map": StageSketch("m", "map", over="s", policies={"kind": "transform", "keep": True}),
    "one by one": StageSketch("m", "map", over="s", policies={"keep": True}),
    "flat": StageSketch("m", "flat", over="s", policies={"kind": "transform", "keep": True}),
    "batch": StageSketch("m", "batch", over="s", policies={"batch": 4, "keep": True}),
    "retried": StageSketch(
        "m", "map", over="s", fate=Fate("error", 3, 1, 1), attempts=3, policies={"kind": "transform", "keep": True}
    ),
    "dropping": StageSketch(
        "m", "map", over="s", fate=Fate("drop", 3, 1), policies={"kind": "transform", "keep": True}
    ),
    "ordered": StageSketch("m", "sink", over="s", policies={"ordered": True, "kind": "transform"}),
}


@pytest.mark.parametrize("lane", ["process", "async"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_item_ends_once_and_its_neighbours_lose_nothing(kind, lane):
    seen = 0
    for seed in range(25):
        dice = random.Random(seed)
        deaths = dice.choice([0, 0, 0.2])
        lanes = {"process": 2, "thread": 2, "async": 2, "inline": 1}
        simulation = Simulation(dice, lanes=lanes, deaths=deaths, stops=0.1)
        stages = (SOURCE, replace(KINDS[kind], lane=lane))
        run = simulation.submit(GraphSketch(stages, "continue_on_failure"))
        simulation.run()
        simulation.check_clean()
        stopped = [index for _, stage, index in simulation.stopped if stage == 1]
        seen += len(stopped)
        totals = simulation.totals[run, 1]
        assert totals["cancelled"] == len(stopped)
        assert totals["items_in"] == 30
        assert totals["failed"] == 0
        values = simulation.sketches[run].reference().values["s"]
        runner = simulation.layouts[run].specs[1].runner
        wanted = []
        for index, value in enumerate(values):
            if index in stopped:
                continue
            fate = KINDS[kind].fate
            if kind == "dropping" and fate.strikes(value, 1):
                continue
            if kind == "flat":
                wanted.extend(runner(item=value, ctx=_Second()))
            elif kind == "batch":
                wanted.extend(runner(item=[value], ctx=_Second()))
            else:
                wanted.append(runner(item=value, ctx=_Second()))
        got = (
            [v for _, part in simulation.kept.get((run, 1), []) for v in part]
            if kind == "ordered"
            else simulation.sequence(run, 1)
        )
        if kind == "ordered":  # an item may have had its effect before it was stopped
            got = [value for value in got if value in wanted]
        assert got == wanted
        assert simulation.finished[run].status == ("failed" if stopped else "completed")
    assert seen > 10


class _Second:
    """A context of an attempt that goes well."""

    attempt = 2
    feedback = None


@pytest.mark.parametrize("block", range(6))
def test_any_pipeline_lets_any_item_be_stopped(block):
    for seed in range(40_000 + block * 40, 40_000 + block * 40 + 40):
        dice = random.Random(seed)
        memory, deaths = dice.choice([0, 0, 15, 60]), dice.choice([0, 0, 0.1, 0.3])
        lanes = {"process": dice.randint(1, 3), "thread": dice.randint(1, 3), "async": 4, "inline": 1}
        simulation = Simulation(dice, lanes=lanes, memory=memory, deaths=deaths, stops=0.1)
        run = simulation.submit(random_sketch(dice, most=9))
        simulation.run()
        simulation.check_clean()
        if simulation.stopped:
            assert simulation.finished[run].status != "completed"
