"""Stageflow: a pipeline engine for one machine and all its cores.

The public names live in the rooms below and are loaded on first use; importing this package alone loads none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from stageflow.core.loading import uncollected

if TYPE_CHECKING:
    from stageflow.context.bags import ContextBag as ContextBag
    from stageflow.context.bags import OutputBag as OutputBag
    from stageflow.context.cancellation import CancellationToken as CancellationToken
    from stageflow.context.cleanup import CleanupRegistry as CleanupRegistry
    from stageflow.context.cleanup import cleanup_on_cancel as cleanup_on_cancel
    from stageflow.context.cleanup import run_with_cleanup as run_with_cleanup
    from stageflow.context.identity import RunIdentity as RunIdentity
    from stageflow.context.inputs import StageInputs as StageInputs
    from stageflow.context.interception import InterceptorContext as InterceptorContext
    from stageflow.context.pipeline_context import ExecutionContext as ExecutionContext
    from stageflow.context.pipeline_context import PipelineContext as PipelineContext
    from stageflow.context.snapshot import ContextSnapshot as ContextSnapshot
    from stageflow.context.snapshot import Conversation as Conversation
    from stageflow.context.snapshot import Enrichments as Enrichments
    from stageflow.context.snapshot import ExtensionBundle as ExtensionBundle
    from stageflow.context.snapshot import Message as Message
    from stageflow.context.stage_context import StageContext as StageContext
    from stageflow.context.taskgroup import StructuredTaskGroup as StructuredTaskGroup
    from stageflow.contracts.diff import ContractCompatibilityReport as ContractCompatibilityReport
    from stageflow.contracts.registry import ContractMetadata as ContractMetadata
    from stageflow.contracts.registry import ContractRegistry as ContractRegistry
    from stageflow.contracts.registry import ContractVersionError as ContractVersionError
    from stageflow.contracts.suggestions import ContractSuggestion as ContractSuggestion
    from stageflow.contracts.suggestions import get_contract_suggestion as get_contract_suggestion
    from stageflow.contracts.typed import TypedOutputConfig as TypedOutputConfig
    from stageflow.contracts.typed import TypedStageOutput as TypedStageOutput
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
    from stageflow.pipeline.interceptors import BaseInterceptor as BaseInterceptor
    from stageflow.pipeline.interceptors import CircuitBreaker as CircuitBreaker
    from stageflow.pipeline.interceptors import ConcurrencyLimit as ConcurrencyLimit
    from stageflow.pipeline.interceptors import ContextSizeInterceptor as ContextSizeInterceptor
    from stageflow.pipeline.interceptors import ImmutabilityCheck as ImmutabilityCheck
    from stageflow.pipeline.interceptors import InputsChangedError as InputsChangedError
    from stageflow.pipeline.interceptors import Interceptor as Interceptor
    from stageflow.pipeline.interceptors import LoggingInterceptor as LoggingInterceptor
    from stageflow.pipeline.interceptors import MetricsInterceptor as MetricsInterceptor
    from stageflow.pipeline.interceptors import RateLimit as RateLimit
    from stageflow.pipeline.interceptors import TimeoutInterceptor as TimeoutInterceptor
    from stageflow.pipeline.plan import Plan as Plan
    from stageflow.pipeline.policies import BackoffStrategy as BackoffStrategy
    from stageflow.pipeline.policies import GuardRetryPolicy as GuardRetryPolicy
    from stageflow.pipeline.policies import IdempotencyConfig as IdempotencyConfig
    from stageflow.pipeline.policies import JitterStrategy as JitterStrategy
    from stageflow.pipeline.policies import PolicyError as PolicyError
    from stageflow.pipeline.policies import Rate as Rate
    from stageflow.pipeline.policies import Resources as Resources
    from stageflow.pipeline.policies import RetryConfig as RetryConfig
    from stageflow.runtime.config import EngineConfig as EngineConfig
    from stageflow.runtime.engine import Engine as Engine
    from stageflow.runtime.failures import FailureCollector as FailureCollector
    from stageflow.runtime.handles import RunHandle as RunHandle
    from stageflow.runtime.oneliner import map as map
    from stageflow.runtime.result import Abandoned as Abandoned
    from stageflow.runtime.result import FailureRecord as FailureRecord
    from stageflow.runtime.result import FailureSummary as FailureSummary
    from stageflow.runtime.result import RunResult as RunResult
    from stageflow.runtime.sequence import ItemSequence as ItemSequence
    from stageflow.store.idempotency import IdempotencyStore as IdempotencyStore
    from stageflow.store.idempotency import InMemoryIdempotencyStore as InMemoryIdempotencyStore
    from stageflow.store.sqlite import SqliteIdempotencyStore as SqliteIdempotencyStore

_HOME = {
    "Abandoned": "runtime.result",
    "BackoffStrategy": "pipeline.policies",
    "BaseInterceptor": "pipeline.interceptors",
    "CancellationToken": "context.cancellation",
    "CircuitBreaker": "pipeline.interceptors",
    "CircuitOpenError": "core.errors",
    "CleanupRegistry": "context.cleanup",
    "CollectTooLargeError": "core.errors",
    "ConcurrencyLimit": "pipeline.interceptors",
    "ContextBag": "context.bags",
    "ContextSizeInterceptor": "pipeline.interceptors",
    "ContextSnapshot": "context.snapshot",
    "ContractCompatibilityReport": "contracts.diff",
    "ContractErrorInfo": "core.errors",
    "ContractMetadata": "contracts.registry",
    "ContractRegistry": "contracts.registry",
    "ContractSuggestion": "contracts.suggestions",
    "ContractVersionError": "contracts.registry",
    "ContractViolationError": "core.errors",
    "Conversation": "context.snapshot",
    "DROP": "core.kinds",
    "DataConflictError": "core.errors",
    "DefinitionError": "core.errors",
    "Engine": "runtime.engine",
    "EngineConfig": "runtime.config",
    "Enrichments": "context.snapshot",
    "ErrorInfo": "core.output",
    "Event": "events.event",
    "EventSink": "events.sinks",
    "ExecutionContext": "context.pipeline_context",
    "ExtensionBundle": "context.snapshot",
    "FailureCollector": "runtime.failures",
    "FailureMode": "core.kinds",
    "FailureRecord": "runtime.result",
    "FailureSummary": "runtime.result",
    "GuardRetryPolicy": "pipeline.policies",
    "IdempotencyConfig": "pipeline.policies",
    "IdempotencyMismatchError": "core.errors",
    "IdempotencyStore": "store.idempotency",
    "ImmutabilityCheck": "pipeline.interceptors",
    "InMemoryIdempotencyStore": "store.idempotency",
    "InputsChangedError": "pipeline.interceptors",
    "Interceptor": "pipeline.interceptors",
    "InterceptorContext": "context.interception",
    "InvariantError": "core.errors",
    "ItemSequence": "runtime.sequence",
    "JitterStrategy": "pipeline.policies",
    "Lane": "core.kinds",
    "LaneClosedError": "core.errors",
    "LoggingInterceptor": "pipeline.interceptors",
    "Message": "context.snapshot",
    "MetricsInterceptor": "pipeline.interceptors",
    "NoProgressError": "core.errors",
    "NotShippableError": "core.errors",
    "OutputBag": "context.bags",
    "OutputConflictError": "core.errors",
    "PipelineBuilder": "pipeline.builder",
    "PipelineContext": "context.pipeline_context",
    "PipelineValidationError": "core.errors",
    "Plan": "pipeline.plan",
    "PolicyError": "pipeline.policies",
    "Rate": "pipeline.policies",
    "RateLimit": "pipeline.interceptors",
    "RemoteError": "core.failure",
    "ResourceError": "core.errors",
    "Resources": "pipeline.policies",
    "RetryConfig": "pipeline.policies",
    "RunHandle": "runtime.handles",
    "RunIdentity": "context.identity",
    "RunResult": "runtime.result",
    "SharedMemoryFullError": "core.errors",
    "SqliteIdempotencyStore": "store.sqlite",
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
    "StructuredTaskGroup": "context.taskgroup",
    "TimeoutInterceptor": "pipeline.interceptors",
    "TypedOutputConfig": "contracts.typed",
    "TypedStageOutput": "contracts.typed",
    "UndeclaredDependencyError": "core.errors",
    "WorkerDiedError": "core.errors",
    "WorkerStartError": "core.errors",
    "cleanup_on_cancel": "context.cleanup",
    "get_contract_suggestion": "contracts.suggestions",
    "map": "runtime.oneliner",
    "run_with_cleanup": "context.cleanup",
    "stage": "pipeline.decorator",
}

__all__ = sorted(_HOME)  # noqa: PLE0605
__version__ = "0.1.0"

if not TYPE_CHECKING:  # hidden from type checkers, or they would accept any name

    def __getattr__(name: str) -> object:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with uncollected():
            import_module(f"{__name__}.core.lean")
            value = getattr(import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
