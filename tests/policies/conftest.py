"""One engine for the whole room, and one stage in a graph of its own, in any lane."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stageflow import Engine, PipelineBuilder, RunResult
from stageflow.testing.sinks import RecordingSink

LANES = ("async", "thread", "process", "inline")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine(processes=2, threads=8, grace=20.0) as made:
        yield made


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def one(engine: Engine) -> Callable[..., RunResult]:
    """Run one function as the stage "s"."""

    def run(function: Any, lane: str, inputs: Any = None, *, run: Any = None, **policies: Any) -> RunResult:
        graph = PipelineBuilder("one").stage("s", function, executor=lane, **policies).build()
        return engine.run(graph, inputs or {}, **(run or {}))

    return run


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()
