"""Stages without work: ours with and without a sink, and the least it can cost."""

import pytest

from benchmarks.graphs import CountingSink, floor
from benchmarks.measures.scheduling import graph_of
from benchmarks.simulated import Simulation, layout_of, stream_layout

SHAPES = ("chain 1,000", "fan-out 1,000")


@pytest.mark.parametrize("who", ["no sink", "counting sink", "asyncio floor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stages(benchmark, on_loop, shape, who):
    benchmark.group = shape
    runner, engine = on_loop
    graph = graph_of(shape)
    if who == "asyncio floor":
        benchmark(lambda: runner.run(floor(graph.deps, graph.dependents)))
        return
    sinks = (CountingSink(),) if who == "counting sink" else ()
    result = benchmark(lambda: runner.run(engine.execute(graph, event_sinks=sinks)))
    assert result.success


def test_pure_machine_chain(benchmark):
    benchmark.group = "machine alone"
    layout = layout_of([[i - 1] if i else [] for i in range(1000)])
    assert benchmark(lambda: Simulation(layout, 4, lambda stage: 0.001).run()).finished == "completed"


def test_pure_machine_blocks(benchmark):
    benchmark.group = "machine alone"
    layout = stream_layout()
    run = benchmark(lambda: Simulation(layout, 4, lambda stage: 1e-4, items=20_000).run())
    assert run.done_items == 20_000
