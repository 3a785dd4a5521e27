"""The pytest plugin: fixtures for pipelines under test, offered wherever stageflow is installed.

Loaded by every pytest session of its users, so it imports nothing of the engine until a fixture is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stageflow.testing.benchmark import PipelineBenchmark


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fixtures here."""
    group = parser.getgroup("stageflow")
    group.addoption(
        "--pipeline-baseline",
        default=None,
        metavar="FILE",
        help="where `pipeline_benchmark` keeps its stored numbers (default: pipeline-benchmarks.json in rootdir)",
    )
    group.addoption(
        "--pipeline-baseline-update",
        action="store_true",
        help="store what `pipeline_benchmark` measures instead of comparing with it",
    )


@pytest.fixture
def pipeline_benchmark(request: pytest.FixtureRequest) -> PipelineBenchmark:
    """Measure a pipeline: `pipeline_benchmark(graph, items)`; see `stageflow.testing.benchmark.PipelineBenchmark`."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pipeline_benchmark needs pytest-benchmark: pip install pytest-benchmark")
    from stageflow.testing.benchmark import STORE, PaceStore, PipelineBenchmark

    given = request.config.getoption("--pipeline-baseline")
    path = Path(given) if given else request.config.rootpath / STORE
    store = PaceStore(path, update=bool(request.config.getoption("--pipeline-baseline-update")))
    return PipelineBenchmark(request.getfixturevalue("benchmark"), store, request.node.nodeid)
