"""A stage context that needs no engine: what a stage reads is given, what it emits is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from stageflow.context.inputs import StageInputs
from stageflow.context.snapshot import ContextSnapshot


class BareContext:
    """The part of StageContext that ready-made stages use."""

    def __init__(self, snapshot: ContextSnapshot, inputs: Mapping[str, Any], stage_name: str = "stage") -> None:
        self.snapshot = snapshot
        self.inputs = StageInputs(inputs, tuple(inputs), stage_name)
        self.stage_name = stage_name
        self.run_id = snapshot.pipeline_run_id or "run-1"
        self.item = None
        self.attempt = 1
        self.emitted: list[tuple[str, dict[str, Any]]] = []

    def emit(self, type: str, data: Mapping[str, Any] | None = None) -> None:
        self.emitted.append((type, dict(data or {})))


@pytest.fixture
def bare_context() -> Callable[..., BareContext]:
    def make(inputs: Mapping[str, Any] | None = None, snapshot: ContextSnapshot | None = None) -> BareContext:
        return BareContext(snapshot or ContextSnapshot(), inputs or {})

    return make
