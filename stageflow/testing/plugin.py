"""The pytest plugin: fixtures for pipelines under test, offered wherever stageflow is installed.

Loaded by every pytest session of its users, so it imports nothing of the engine until a fixture is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stageflow.runtime.engine import Engine
    from stageflow.testing.benchmark import PipelineBenchmark
    from stageflow.testing.clock import VirtualClock
    from stageflow.testing.sinks import RecordingSink


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
def virtual_clock() -> VirtualClock:
    """A clock that jumps when everything waits; `stageflow_engine` runs on it when a test takes both."""
    from stageflow.testing.clock import VirtualClock

    return VirtualClock()


@pytest.fixture
def recording_sink() -> RecordingSink:
    """A sink that keeps every event; `stageflow_engine` tells it all when a test takes both."""
    from stageflow.testing.sinks import RecordingSink

    return RecordingSink()


@pytest.fixture
def stageflow_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A small engine (2 workers, 4 threads), closed after the test. `@pytest.mark.parametrize("stageflow_engine",
    [{"lane": "inline"}], indirect=True)` gives it other settings."""
    from stageflow.runtime.engine import Engine

    settings = {"processes": 2, "threads": 4, "grace": 2.0, **getattr(request, "param", {})}
    if "recording_sink" in request.fixturenames:
        settings["event_sinks"] = (request.getfixturevalue("recording_sink"),)
    clock = request.getfixturevalue("virtual_clock") if "virtual_clock" in request.fixturenames else None
    with Engine(clock=clock, **settings) as engine:
        yield engine


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
