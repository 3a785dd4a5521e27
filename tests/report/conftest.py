"""The made-up run of the observability tests, for reports."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from stageflow.events.event import Event


def _sample() -> ModuleType:
    path = Path(__file__).parents[1] / "observability" / "conftest.py"
    spec = importlib.util.spec_from_file_location("stageflow_sample_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MODULE = _sample()


@pytest.fixture
def docs_run() -> list[Event]:
    events: list[Event] = _MODULE.make_run()
    return events


@pytest.fixture
def make_events() -> Callable[..., list[Event]]:
    made: Callable[..., list[Event]] = _MODULE.make_run
    return made


@pytest.fixture
def endless_events() -> Callable[[int], Iterator[Event]]:
    made: Callable[[int], Iterator[Event]] = _MODULE.endless
    return made
