"""The whole job, ours and by hand."""

import pytest

from benchmarks.measures import jobs
from benchmarks.measures.common import standard_pool


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A part of the standard library."""
    return jobs.make_input(tmp_path_factory.mktemp("job"), 0.1)


def test_ours(benchmark, on_loop, tree, tmp_path):
    benchmark.group = "index a source tree"
    runner, engine = on_loop
    graph = jobs.job_graph()
    inputs = {"root": str(tree), "output": str(tmp_path)}
    result = benchmark.pedantic(lambda: runner.run(engine.execute(graph, inputs)), rounds=5, warmup_rounds=1)
    assert result.data("report").files > 10


def test_by_hand(benchmark, on_loop, tree, tmp_path):
    benchmark.group = "index a source tree"
    runner, _ = on_loop
    with standard_pool() as pool:
        files = benchmark.pedantic(
            lambda: runner.run(jobs.by_hand(pool, str(tree), tmp_path)), rounds=5, warmup_rounds=1
        )
    assert files > 10
