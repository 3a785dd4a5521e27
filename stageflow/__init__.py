"""Stageflow: a pipeline engine for one machine and all its cores.

The public names live in the rooms below and are loaded on first use; importing this package alone loads none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stageflow.context.cancellation import CancellationToken as CancellationToken
    from stageflow.context.identity import RunIdentity as RunIdentity
    from stageflow.context.inputs import StageInputs as StageInputs
    from stageflow.context.pipeline_context import PipelineContext as PipelineContext
    from stageflow.context.snapshot import ContextSnapshot as ContextSnapshot
    from stageflow.context.stage_context import StageContext as StageContext
    from stageflow.core.errors import CircuitOpenError as CircuitOpenError
    from stageflow.core.errors import CollectTooLargeError as CollectTooLargeError
    from stageflow.core.errors import ContractErrorInfo as ContractErrorInfo
    from stageflow.core.errors import ContractViolationError as ContractViolationError
    from stageflow.core.errors import DataConflictError as DataConflictError
    from stageflow.core.errors import DefinitionError as DefinitionError
    from stageflow.core.errors import IdempotencyMismatchError as IdempotencyMismatchError
    from stageflow.core.errors import InvariantError as InvariantError
    from stageflow.core.errors import LaneClosedError as LaneClosedError
    from stageflow.core.errors import NoProgressError as NoProgressError
    from stageflow.core.errors import NotShippableError as NotShippableError
    from stageflow.core.errors import OutputConflictError as OutputConflictError
    from stageflow.core.errors import PipelineValidationError as PipelineValidationError
    from stageflow.core.errors import ResourceError as ResourceError
    from stageflow.core.errors import SharedMemoryFullError as SharedMemoryFullError
    from stageflow.core.errors import StageCancelledError as StageCancelledError
    from stageflow.core.errors import StageFailedError as StageFailedError
    from stageflow.core.errors import StageflowError as StageflowError
    from stageflow.core.errors import StageTimeoutError as StageTimeoutError
    from stageflow.core.errors import UndeclaredDependencyError as UndeclaredDependencyError
    from stageflow.core.errors import WorkerDiedError as WorkerDiedError
    from stageflow.core.errors import WorkerStartError as WorkerStartError
    from stageflow.core.failure import RemoteError as RemoteError
    from stageflow.core.kinds import DROP as DROP
    from stageflow.core.kinds import FailureMode as FailureMode
    from stageflow.core.kinds import Lane as Lane
    from stageflow.core.kinds import StageKind as StageKind
    from stageflow.core.kinds import StageStatus as StageStatus
    from stageflow.core.output import ErrorInfo as ErrorInfo
    from stageflow.core.output import StageArtifact as StageArtifact
    from stageflow.core.output import StageEvent as StageEvent
    from stageflow.core.output import StageOutput as StageOutput
    from stageflow.core.stage import Stage as Stage
    from stageflow.events.event import Event as Event
    from stageflow.events.sinks import EventSink as EventSink
    from stageflow.observability.stats import StageStats as StageStats
    from stageflow.pipeline.builder import PipelineBuilder as PipelineBuilder
    from stageflow.pipeline.decorator import stage as stage
    from stageflow.pipeline.graph import StageGraph as StageGraph
    from stageflow.pipeline.plan import Plan as Plan
    from stageflow.pipeline.policies import BackoffStrategy as BackoffStrategy
    from stageflow.pipeline.policies import GuardRetryPolicy as GuardRetryPolicy
    from stageflow.pipeline.policies import IdempotencyConfig as IdempotencyConfig
    from stageflow.pipeline.policies import JitterStrategy as JitterStrategy
    from stageflow.pipeline.policies import Resources as Resources
    from stageflow.pipeline.policies import RetryConfig as RetryConfig
    from stageflow.runtime.config import EngineConfig as EngineConfig
    from stageflow.runtime.engine import Engine as Engine
    from stageflow.runtime.oneliner import map as map
    from stageflow.runtime.result import FailureSummary as FailureSummary
    from stageflow.runtime.result import RunResult as RunResult
    from stageflow.runtime.sequence import ItemSequence as ItemSequence

_HOME = {
    "BackoffStrategy": "pipeline.policies",
    "CancellationToken": "context.cancellation",
    "CircuitOpenError": "core.errors",
    "CollectTooLargeError": "core.errors",
    "ContextSnapshot": "context.snapshot",
    "ContractErrorInfo": "core.errors",
    "ContractViolationError": "core.errors",
    "DROP": "core.kinds",
    "DataConflictError": "core.errors",
    "DefinitionError": "core.errors",
    "Engine": "runtime.engine",
    "EngineConfig": "runtime.config",
    "ErrorInfo": "core.output",
    "Event": "events.event",
    "EventSink": "events.sinks",
    "FailureMode": "core.kinds",
    "FailureSummary": "runtime.result",
    "GuardRetryPolicy": "pipeline.policies",
    "IdempotencyConfig": "pipeline.policies",
    "IdempotencyMismatchError": "core.errors",
    "InvariantError": "core.errors",
    "ItemSequence": "runtime.sequence",
    "JitterStrategy": "pipeline.policies",
    "Lane": "core.kinds",
    "LaneClosedError": "core.errors",
    "NoProgressError": "core.errors",
    "NotShippableError": "core.errors",
    "OutputConflictError": "core.errors",
    "PipelineBuilder": "pipeline.builder",
    "PipelineContext": "context.pipeline_context",
    "PipelineValidationError": "core.errors",
    "Plan": "pipeline.plan",
    "RemoteError": "core.failure",
    "ResourceError": "core.errors",
    "Resources": "pipeline.policies",
    "RetryConfig": "pipeline.policies",
    "RunIdentity": "context.identity",
    "RunResult": "runtime.result",
    "SharedMemoryFullError": "core.errors",
    "Stage": "core.stage",
    "StageArtifact": "core.output",
    "StageCancelledError": "core.errors",
    "StageContext": "context.stage_context",
    "StageEvent": "core.output",
    "StageFailedError": "core.errors",
    "StageGraph": "pipeline.graph",
    "StageInputs": "context.inputs",
    "StageKind": "core.kinds",
    "StageOutput": "core.output",
    "StageStats": "observability.stats",
    "StageStatus": "core.kinds",
    "StageTimeoutError": "core.errors",
    "StageflowError": "core.errors",
    "UndeclaredDependencyError": "core.errors",
    "WorkerDiedError": "core.errors",
    "WorkerStartError": "core.errors",
    "map": "runtime.oneliner",
    "stage": "pipeline.decorator",
}

__all__ = sorted(_HOME)  # noqa: PLE0605
__version__ = "0.1.0"

if not TYPE_CHECKING:  # hidden from type checkers, or they would accept any name

    def __getattr__(name: str) -> object:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
