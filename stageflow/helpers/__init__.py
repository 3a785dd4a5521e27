"""Ready-made stages and small recipes on top of the public surface.

Stands on the runtime. May not import: `stageflow.tools`, `stageflow.websearch`, testing, report, cli, demo.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stageflow.helpers.analytics import (
        AnalyticsEvent as AnalyticsEvent,
    )
    from stageflow.helpers.analytics import (
        AnalyticsSink as AnalyticsSink,
    )
    from stageflow.helpers.analytics import (
        BufferedExporter as BufferedExporter,
    )
    from stageflow.helpers.analytics import (
        CompositeExporter as CompositeExporter,
    )
    from stageflow.helpers.analytics import (
        ConsoleExporter as ConsoleExporter,
    )
    from stageflow.helpers.analytics import (
        Exporter as Exporter,
    )
    from stageflow.helpers.analytics import (
        JSONFileExporter as JSONFileExporter,
    )
    from stageflow.helpers.guardrails import (
        ContentFilter as ContentFilter,
    )
    from stageflow.helpers.guardrails import (
        ContentLengthCheck as ContentLengthCheck,
    )
    from stageflow.helpers.guardrails import (
        GuardrailCheck as GuardrailCheck,
    )
    from stageflow.helpers.guardrails import (
        GuardrailResult as GuardrailResult,
    )
    from stageflow.helpers.guardrails import (
        GuardrailStage as GuardrailStage,
    )
    from stageflow.helpers.guardrails import (
        InjectionDetector as InjectionDetector,
    )
    from stageflow.helpers.guardrails import (
        PIIDetector as PIIDetector,
    )
    from stageflow.helpers.guardrails import (
        PolicyViolation as PolicyViolation,
    )
    from stageflow.helpers.guardrails import (
        ViolationType as ViolationType,
    )
    from stageflow.helpers.memory import (
        InMemoryStore as InMemoryStore,
    )
    from stageflow.helpers.memory import (
        MemoryConfig as MemoryConfig,
    )
    from stageflow.helpers.memory import (
        MemoryEntry as MemoryEntry,
    )
    from stageflow.helpers.memory import (
        MemoryFetchStage as MemoryFetchStage,
    )
    from stageflow.helpers.memory import (
        MemoryStore as MemoryStore,
    )
    from stageflow.helpers.memory import (
        MemoryWriteStage as MemoryWriteStage,
    )
    from stageflow.helpers.memory import (
        SQLiteMemoryStore as SQLiteMemoryStore,
    )
    from stageflow.helpers.memory import (
        estimate_tokens as estimate_tokens,
    )
    from stageflow.helpers.memory import (
        select_entries as select_entries,
    )
    from stageflow.helpers.providers import (
        LLMResponse as LLMResponse,
    )
    from stageflow.helpers.providers import (
        STTResponse as STTResponse,
    )
    from stageflow.helpers.providers import (
        TTSResponse as TTSResponse,
    )
    from stageflow.helpers.runtime import (
        Err as Err,
    )
    from stageflow.helpers.runtime import (
        MemorySample as MemorySample,
    )
    from stageflow.helpers.runtime import (
        MemoryTracker as MemoryTracker,
    )
    from stageflow.helpers.runtime import (
        Ok as Ok,
    )
    from stageflow.helpers.runtime import (
        TimedResult as TimedResult,
    )
    from stageflow.helpers.runtime import (
        Timeout as Timeout,
    )
    from stageflow.helpers.runtime import (
        run_cleanup_with_timeout as run_cleanup_with_timeout,
    )
    from stageflow.helpers.runtime import (
        run_with_timeout as run_with_timeout,
    )
    from stageflow.helpers.streaming import (
        AudioChunk as AudioChunk,
    )
    from stageflow.helpers.streaming import (
        AudioFormat as AudioFormat,
    )
    from stageflow.helpers.streaming import (
        BackpressureMonitor as BackpressureMonitor,
    )
    from stageflow.helpers.streaming import (
        BackpressureStats as BackpressureStats,
    )
    from stageflow.helpers.streaming import (
        BufferStats as BufferStats,
    )
    from stageflow.helpers.streaming import (
        ChunkQueue as ChunkQueue,
    )
    from stageflow.helpers.streaming import (
        StreamingBuffer as StreamingBuffer,
    )
    from stageflow.helpers.streaming import (
        calculate_audio_duration_ms as calculate_audio_duration_ms,
    )
    from stageflow.helpers.streaming import (
        encode_audio_for_logging as encode_audio_for_logging,
    )
    from stageflow.helpers.timestamps import (
        TimestampParseError as TimestampParseError,
    )
    from stageflow.helpers.timestamps import (
        UnixPrecision as UnixPrecision,
    )
    from stageflow.helpers.timestamps import (
        detect_unix_precision as detect_unix_precision,
    )
    from stageflow.helpers.timestamps import (
        format_iso8601 as format_iso8601,
    )
    from stageflow.helpers.timestamps import (
        from_unix as from_unix,
    )
    from stageflow.helpers.timestamps import (
        iso_timestamp as iso_timestamp,
    )
    from stageflow.helpers.timestamps import (
        normalize_to_utc as normalize_to_utc,
    )
    from stageflow.helpers.timestamps import (
        now_utc as now_utc,
    )
    from stageflow.helpers.timestamps import (
        parse_timestamp as parse_timestamp,
    )
    from stageflow.helpers.uuids import (
        ClockSkewDetector as ClockSkewDetector,
    )
    from stageflow.helpers.uuids import (
        UuidCollisionMonitor as UuidCollisionMonitor,
    )
    from stageflow.helpers.uuids import (
        UuidEvent as UuidEvent,
    )
    from stageflow.helpers.uuids import (
        UuidFactory as UuidFactory,
    )
    from stageflow.helpers.uuids import (
        generate_uuid as generate_uuid,
    )
    from stageflow.helpers.uuids import (
        generate_uuid4 as generate_uuid4,
    )
    from stageflow.helpers.uuids import (
        generate_uuid7 as generate_uuid7,
    )
    from stageflow.helpers.uuids import (
        uuid7_time_ms as uuid7_time_ms,
    )

_HOME = {
    **dict.fromkeys(
        (
            "AnalyticsEvent",
            "AnalyticsSink",
            "BufferedExporter",
            "CompositeExporter",
            "ConsoleExporter",
            "Exporter",
            "JSONFileExporter",
        ),
        "stageflow.helpers.analytics",
    ),
    **dict.fromkeys(
        (
            "ContentFilter",
            "ContentLengthCheck",
            "GuardrailCheck",
            "GuardrailResult",
            "GuardrailStage",
            "InjectionDetector",
            "PIIDetector",
            "PolicyViolation",
            "ViolationType",
        ),
        "stageflow.helpers.guardrails",
    ),
    **dict.fromkeys(
        (
            "InMemoryStore",
            "MemoryConfig",
            "MemoryEntry",
            "MemoryFetchStage",
            "MemoryStore",
            "MemoryWriteStage",
            "SQLiteMemoryStore",
            "estimate_tokens",
            "select_entries",
        ),
        "stageflow.helpers.memory",
    ),
    **dict.fromkeys(
        (
            "LLMResponse",
            "STTResponse",
            "TTSResponse",
        ),
        "stageflow.helpers.providers",
    ),
    **dict.fromkeys(
        (
            "Err",
            "MemorySample",
            "MemoryTracker",
            "Ok",
            "TimedResult",
            "Timeout",
            "run_cleanup_with_timeout",
            "run_with_timeout",
        ),
        "stageflow.helpers.runtime",
    ),
    **dict.fromkeys(
        (
            "AudioChunk",
            "AudioFormat",
            "BackpressureMonitor",
            "BackpressureStats",
            "BufferStats",
            "ChunkQueue",
            "StreamingBuffer",
            "calculate_audio_duration_ms",
            "encode_audio_for_logging",
        ),
        "stageflow.helpers.streaming",
    ),
    **dict.fromkeys(
        (
            "TimestampParseError",
            "UnixPrecision",
            "detect_unix_precision",
            "format_iso8601",
            "from_unix",
            "iso_timestamp",
            "normalize_to_utc",
            "now_utc",
            "parse_timestamp",
        ),
        "stageflow.helpers.timestamps",
    ),
    **dict.fromkeys(
        (
            "ClockSkewDetector",
            "UuidCollisionMonitor",
            "UuidEvent",
            "UuidFactory",
            "generate_uuid",
            "generate_uuid4",
            "generate_uuid7",
            "uuid7_time_ms",
        ),
        "stageflow.helpers.uuids",
    ),
}

__all__ = [
    "AnalyticsEvent",
    "AnalyticsSink",
    "AudioChunk",
    "AudioFormat",
    "BackpressureMonitor",
    "BackpressureStats",
    "BufferStats",
    "BufferedExporter",
    "ChunkQueue",
    "ClockSkewDetector",
    "CompositeExporter",
    "ConsoleExporter",
    "ContentFilter",
    "ContentLengthCheck",
    "Err",
    "Exporter",
    "GuardrailCheck",
    "GuardrailResult",
    "GuardrailStage",
    "InMemoryStore",
    "InjectionDetector",
    "JSONFileExporter",
    "LLMResponse",
    "MemoryConfig",
    "MemoryEntry",
    "MemoryFetchStage",
    "MemorySample",
    "MemoryStore",
    "MemoryTracker",
    "MemoryWriteStage",
    "Ok",
    "PIIDetector",
    "PolicyViolation",
    "SQLiteMemoryStore",
    "STTResponse",
    "StreamingBuffer",
    "TTSResponse",
    "TimedResult",
    "Timeout",
    "TimestampParseError",
    "UnixPrecision",
    "UuidCollisionMonitor",
    "UuidEvent",
    "UuidFactory",
    "ViolationType",
    "calculate_audio_duration_ms",
    "detect_unix_precision",
    "encode_audio_for_logging",
    "estimate_tokens",
    "format_iso8601",
    "from_unix",
    "generate_uuid",
    "generate_uuid4",
    "generate_uuid7",
    "iso_timestamp",
    "normalize_to_utc",
    "now_utc",
    "parse_timestamp",
    "run_cleanup_with_timeout",
    "run_with_timeout",
    "select_entries",
    "uuid7_time_ms",
]

if not TYPE_CHECKING:  # hidden from checkers, or they would accept any name

    def __getattr__(name: str) -> object:
        """Import the module that holds `name` when it is first asked for."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)

    def __dir__() -> list[str]:
        return sorted((*globals(), *__all__))
