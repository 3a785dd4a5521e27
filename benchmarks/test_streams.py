"""Items without work as a map stage, beside `multiprocessing.Pool.map`."""

import multiprocessing

from benchmarks.graphs import CountingSink
from benchmarks.work import noop
from stageflow import PipelineBuilder

ITEMS = list(range(20_000))
GRAPH = PipelineBuilder("items", inputs={"items": list}).map("noop", noop, over="items").build()


def test_items(benchmark, on_loop):
    benchmark.group = "20,000 no-op items"
    runner, engine = on_loop
    result = benchmark(lambda: runner.run(engine.execute(GRAPH, {"items": ITEMS})))
    assert len(result.data("noop")) == len(ITEMS)


def test_items_with_a_sink(benchmark, on_loop):
    benchmark.group = "20,000 no-op items"
    runner, engine = on_loop
    sink = CountingSink(wants_items=True)
    assert benchmark(lambda: runner.run(engine.execute(GRAPH, {"items": ITEMS}, event_sinks=(sink,)))).success
    assert sink.events >= len(ITEMS)


def test_items_in_the_standard_pool(benchmark):
    benchmark.group = "20,000 no-op items"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert len(benchmark(lambda: pool.map(noop, ITEMS))) == len(ITEMS)
