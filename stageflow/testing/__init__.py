"""What a test suite needs: virtual clock, scripted executor, recording sink, executor conformance suite, pytest plugin.

May not import: `stageflow.report`, cli, demo, any executor.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from stageflow.testing.assertions import assert_output as assert_output
    from stageflow.testing.assertions import assert_run as assert_run
    from stageflow.testing.clock import VirtualClock as VirtualClock
    from stageflow.testing.conformance import check_executor as check_executor
    from stageflow.testing.fixtures import TestContext as TestContext
    from stageflow.testing.fixtures import TestFixture as TestFixture
    from stageflow.testing.fixtures import TestPort as TestPort
    from stageflow.testing.fixtures import linear_pipeline as linear_pipeline
    from stageflow.testing.golden import assert_golden as assert_golden
    from stageflow.testing.golden import golden_events as golden_events
    from stageflow.testing.golden import golden_text as golden_text
    from stageflow.testing.mocks import MockAuthProvider as MockAuthProvider
    from stageflow.testing.mocks import MockLLMProvider as MockLLMProvider
    from stageflow.testing.mocks import MockSTTProvider as MockSTTProvider
    from stageflow.testing.mocks import MockToolExecutor as MockToolExecutor
    from stageflow.testing.mocks import MockTTSProvider as MockTTSProvider
    from stageflow.testing.scripted import ScriptedExecutor as ScriptedExecutor
    from stageflow.testing.sinks import RecordingSink as RecordingSink
    from stageflow.testing.stages import FailingStage as FailingStage
    from stageflow.testing.stages import Flaky as Flaky
    from stageflow.testing.stages import KillsWorker as KillsWorker
    from stageflow.testing.stages import MockStage as MockStage
    from stageflow.testing.stages import OutOfMemory as OutOfMemory
    from stageflow.testing.stages import RecordingStage as RecordingStage
    from stageflow.testing.stages import SlowStage as SlowStage
    from stageflow.testing.stages import SuccessStage as SuccessStage

_HOME: Final = {
    name: f"stageflow.testing.{module}"
    for module, names in {
        "assertions": "assert_output assert_run",
        "clock": "VirtualClock",
        "conformance": "check_executor",
        "fixtures": "TestContext TestFixture TestPort linear_pipeline",
        "golden": "assert_golden golden_events golden_text",
        "mocks": "MockAuthProvider MockLLMProvider MockSTTProvider MockTTSProvider MockToolExecutor",
        "scripted": "ScriptedExecutor",
        "sinks": "RecordingSink",
        "stages": "FailingStage Flaky KillsWorker MockStage OutOfMemory RecordingStage SlowStage SuccessStage",
    }.items()
    for name in names.split()
}

__all__ = [
    "FailingStage", "Flaky", "KillsWorker", "MockAuthProvider", "MockLLMProvider", "MockSTTProvider", "MockStage",
    "MockTTSProvider", "MockToolExecutor", "OutOfMemory", "RecordingSink", "RecordingStage", "ScriptedExecutor",
    "SlowStage", "SuccessStage", "TestContext", "TestFixture", "TestPort", "VirtualClock", "assert_golden",
    "assert_output", "assert_run", "check_executor", "golden_events", "golden_text", "linear_pipeline",
]  # fmt: skip

if not TYPE_CHECKING:  # hidden from checkers, or they would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)
