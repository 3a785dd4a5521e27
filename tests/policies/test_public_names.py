"""The public face: every name resolves, and there is one of each thing that the reference had several of."""

import ast
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import stageflow
import stageflow.core.errors

PINNED = (
    "PipelineBuilder",
    "StageGraph",
    "stage",
    "Stage",
    "StageContext",
    "StageInputs",
    "StageOutput",
    "StageKind",
    "StageStatus",
    "StageArtifact",
    "StageEvent",
    "RunIdentity",
    "ContextSnapshot",
    "PipelineContext",
    "Engine",
    "EngineConfig",
    "RunResult",
    "RetryConfig",
    "BackoffStrategy",
    "JitterStrategy",
    "FailureMode",
    "Resources",
    "CancellationToken",
    "DROP",
    "IdempotencyConfig",
    "GuardRetryPolicy",
    "FailureSummary",
    "StageStats",
    "Plan",
    "EventSink",
    "ItemSequence",
)
BUILT_HERE = (
    "Abandoned",
    "FailureRecord",
    "FailureCollector",
    "RunHandle",
    "ContractRegistry",
    "CleanupRegistry",
    "StructuredTaskGroup",
    "IdempotencyStore",
    "InMemoryIdempotencyStore",
    "SqliteIdempotencyStore",
    "Interceptor",
    "TimeoutInterceptor",
    "CircuitBreaker",
    "RateLimit",
    "ConcurrencyLimit",
    "LoggingInterceptor",
    "MetricsInterceptor",
    "ImmutabilityCheck",
    "ContextSizeInterceptor",
)


@pytest.mark.parametrize("name", sorted({*stageflow.__all__, *PINNED, *BUILT_HERE}))
def test_every_public_name_resolves_and_is_documented(name):
    found = getattr(stageflow, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__doc__, f"{name} has no docstring"
    assert name in stageflow.__all__


def test_every_error_is_public():
    missing = [
        name
        for name, found in vars(stageflow.core.errors).items()
        if inspect.isclass(found) and issubclass(found, BaseException) and name not in stageflow.__all__
    ]
    assert missing == []


ROOMS = ("core", "events", "context", "contracts", "pipeline", "scheduler", "runtime", "store", "observability")


@functools.cache
def classes():
    found = []
    root = Path(stageflow.__file__).parent
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found.append((node.name, f"{room}/{path.name}"))
    return found


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("CancellationToken", {"CancellationToken"}),
        ("Token", {"CancellationToken"}),
        ("CleanupRegistry", {"CleanupRegistry"}),
        ("RetryConfig", {"RetryConfig"}),
        ("RetryPolicy", {"GuardRetryPolicy"}),
        ("Backoff", {"BackoffStrategy"}),
        ("Jitter", {"JitterStrategy"}),
        ("ContractErrorInfo", {"ContractErrorInfo"}),
        ("StageStatus", {"StageStatus"}),
        ("ValidationError", {"PipelineValidationError"}),
        ("SuggestionRegistry", {"SuggestionRegistry"}),
        ("FailureSummary", {"FailureSummary"}),
    ],
)
def test_there_is_one_of_each(word, allowed):
    found = [(name, where) for name, where in classes() if name.endswith(word) or name.startswith(word)]
    assert {name for name, _ in found} == allowed, found
    assert len(found) == len(allowed), found


def test_every_module_of_the_engine_says_what_it_is_for():
    for room in ROOMS:
        package = importlib.import_module(f"stageflow.{room}")
        for info in pkgutil.iter_modules(package.__path__):
            assert importlib.import_module(f"stageflow.{room}.{info.name}").__doc__, info.name


def test_the_calls_people_know_stay_valid():
    """The few lines that programs written for the older framework have in common."""
    assert stageflow.StageOutput.ok_empty().is_success
    assert stageflow.StageOutput.fail("broken").error == "broken"
    retry = stageflow.RetryConfig(max_attempts=5, base_delay_ms=1000)
    assert (retry.max_attempts, retry.base_delay_ms, retry.max_delay_ms) == (5, 1000, 30000)
    assert stageflow.RunIdentity().with_user_id("user-123").user_id == "user-123"
