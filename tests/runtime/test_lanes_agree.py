"""One pipeline gives the same results in every lane, on one worker and on two, and as a reference without an engine."""

import random

import pytest

from stageflow import Engine
from stageflow.testing.clock import VirtualClock
from stageflow.testing.strategies import random_sketch

LANES = ("inline", "thread", "async", "process")


def values(result, sketch):
    """Every value of a run, by stage."""
    found = {}
    for stage in sketch.stages:
        output = result.outputs.get(stage.name)
        if output is None or str(output.status) != "ok" or stage.role == "sink":
            continue
        data = output.data
        found[stage.name] = (
            list(data) if stage.role in ("source", "map", "flat", "batch") and data is not None else data
        )
    return found


@pytest.fixture(scope="module")
def engines():
    made = {lane: Engine(processes=2, threads=4, lane=lane, tokens={"gpu": 2}) for lane in LANES}
    made["mixed"] = Engine(processes=2, threads=4, tokens={"gpu": 2})
    made["one worker"] = Engine(processes=1, threads=1, tokens={"gpu": 2})
    yield made
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("seed", range(12))
def test_random_pipelines_give_the_reference_values_in_every_lane(engines, seed):
    sketch = random_sketch(random.Random(seed), most=7, faults=False)
    for stage in sketch.stages:
        stage.policies.pop("rate", None)  # seconds of waiting here; the virtual clock below has them
    graph, wanted = sketch.build(), sketch.reference()
    for name, engine in engines.items():
        result = engine.run(graph)
        assert result.status == "completed", (name, result.error)
        for stage, value in values(result, sketch).items():
            if value is not None:
                assert value == wanted.values[stage], (name, stage)


@pytest.mark.parametrize("lane", [*LANES, None])
@pytest.mark.parametrize("block", range(4))
def test_pipelines_with_faults_end_as_the_reference_says(lane, block):
    with Engine(processes=2, threads=3, lane=lane, tokens={"gpu": 2}, clock=VirtualClock()) as engine:
        for seed in range(block * 10, block * 10 + 10):
            sketch = random_sketch(random.Random(seed), most=7)
            if any(broken(stage) for stage in sketch.stages):
                continue  # how far a broken stream comes depends on timing; the scheduler's own tests have those
            wanted = sketch.reference()
            result = engine.run(sketch.build(), failure_mode=sketch.mode)
            assert result.status == wanted.status, (seed, result.error)
            if not wanted.states:
                continue
            states = {name: str(output.status) for name, output in result.outputs.items()}
            assert states == wanted.states, seed
            for stage, value in values(result, sketch).items():
                if value is not None:
                    assert value == wanted.values[stage], (seed, stage)
            assert result.failures.failed_items == sum(wanted.lost.values()), seed


def broken(stage):
    return stage.breaks_at is not None or "max_failed_items" in stage.policies
