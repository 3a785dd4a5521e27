"""Contexts for calling one stage without an engine, and small records of what pipelines gave.

context = TestContext(inputs={"url": "x"}, upstream={"fetch": b"..."})
output = await context.run(ParseStage())
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from stageflow.context.attempt import CallPlan, Program, Slot, finish_context_async
from stageflow.context.identity import RunIdentity
from stageflow.context.inputs import StageInputs
from stageflow.context.snapshot import ContextSnapshot
from stageflow.context.stage_context import StageContext
from stageflow.core.output import StageOutput
from stageflow.pipeline.builder import PipelineBuilder

__all__ = ["TestContext", "TestFixture", "TestPort", "linear_pipeline"]

_log = logging.getLogger("stageflow.testing")


class TestPort:
    """A `WorkerPort` that remembers: `notes`, `shown` progress, and a flag the test sets with `cancel`."""

    __test__ = False  # not for pytest to collect
    lane = "inline"
    worker_pid = 0

    def __init__(self) -> None:
        self.notes: list[tuple[str, Any]] = []
        self.shown: tuple[float, float] | None = None
        self.reason: str | None = None
        self._callbacks: list[Any] = []

    def cancel(self, reason: str = "cancelled by the test") -> None:
        """Set the flag of the running stage."""
        self.reason = reason
        for callback in self._callbacks:
            callback()

    def cancelled(self) -> bool:
        """Whether the flag is set."""
        return self.reason is not None

    def cancel_reason(self) -> str | None:
        """Why."""
        return self.reason

    def progress(self, done: float, total: float) -> None:
        """Remember."""
        self.shown = (done, total)

    def note(self, kind: str, data: Any) -> None:
        """Remember."""
        self.notes.append((kind, data))

    def buffer(self, nbytes: int) -> memoryview:
        """Plain memory."""
        return memoryview(bytearray(nbytes))

    def items(self, current: Any) -> None:
        """One stage runs, and no block of items."""

    def on_cancel(self, callback: Any) -> None:
        """Call back when the test cancels."""
        self._callbacks.append(callback)


class TestContext:
    """Everything a stage may read, given by the test. Every argument is honoured."""

    __test__ = False

    def __init__(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        upstream: Mapping[str, Any] | None = None,
        failed: tuple[str, ...] = (),
        skipped: tuple[str, ...] = (),
        metadata: Mapping[str, Any] | None = None,
        identity: RunIdentity | None = None,
        snapshot: ContextSnapshot | None = None,
        attempt: int = 1,
        item: tuple[int, ...] | None = None,
        deadline: float | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        made = snapshot if snapshot is not None else ContextSnapshot.new()
        if inputs:
            made = made.with_inputs(inputs)
        if identity is not None:
            made = made.with_run_id(identity)
        for key, value in (metadata or {}).items():
            made = made.with_metadata(key, value)
        self.snapshot = made
        self.upstream = dict(upstream or {})
        self.failed = failed
        self.skipped = skipped
        self.attempt = attempt
        self.item = item
        self.deadline = deadline
        self.extras = extras
        self.port = TestPort()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the stage emitted."""
        return [data for kind, data in self.port.notes if kind == "event"]

    def build(
        self, name: str = "stage", *, kind: str = "work", resources: Mapping[str, Any] | None = None
    ) -> StageContext:
        """The StageContext of a stage called `name`."""
        declared = (*self.upstream, *self.failed, *self.skipped)
        slots = tuple(Slot(stage, None, True) for stage in self.upstream)
        program = Program(
            name=name,
            kind=kind,
            runner=None,
            form="object",
            is_async=False,
            plan=CallPlan(slots, (), (), True),
            declared=declared,
            resources=resources,
        )
        inputs = StageInputs(self.upstream, declared, name, failed=self.failed, skipped=self.skipped)
        run_id = self.snapshot.run_id.pipeline_run_id or "test-run"
        return StageContext(
            program, self.port, run_id, self.attempt, self.item, self.snapshot, inputs, self.deadline, self.extras
        )

    async def run(self, stage: Any, name: str = "stage") -> StageOutput:
        """Execute an object stage and run what it deferred; a plain value becomes an output. Exceptions propagate."""
        ctx = self.build(name)
        runner = stage() if isinstance(stage, type) else stage
        try:
            result = runner.execute(ctx)
            if inspect.isawaitable(result):
                result = await result
        finally:
            await finish_context_async(ctx)
        return result if isinstance(result, StageOutput) else StageOutput(data=result)


class TestFixture:
    """Outputs recorded by name."""

    __test__ = False

    def __init__(self) -> None:
        self.outputs: dict[str, StageOutput] = {}

    def record_output(self, stage: str, output: StageOutput) -> None:
        """Remember an output; a later one of the same stage replaces it."""
        self.outputs[stage] = output

    def record_run(self, result: Any) -> None:
        """Remember every output of a run."""
        self.outputs.update(result.outputs.items())

    def get_output(self, stage: str) -> StageOutput:
        """The output of a stage; KeyError with the names there are."""
        if stage not in self.outputs:
            raise KeyError(f"no output of {stage!r} was recorded; there are {', '.join(self.outputs) or 'none'}")
        return self.outputs[stage]

    @property
    def all_succeeded(self) -> bool:
        """True when nothing recorded failed."""
        return all(output.is_success for output in self.outputs.values())

    @property
    def any_failed(self) -> bool:
        """True when something recorded failed."""
        return any(output.is_failure for output in self.outputs.values())


def linear_pipeline(name: str, stages: Mapping[str, Any]) -> PipelineBuilder:
    """A builder with these stages one behind the other, each depending on the one before."""
    builder = PipelineBuilder(name)
    before: tuple[str, ...] = ()
    for stage, runner in stages.items():
        builder.stage(stage, runner, before)
        before = (stage,)
    return builder
