"""What providers of language, speech-to-text and text-to-speech models answered, as data with telemetry attributes.

Frozen values only: no provider is called here. `otel_attributes()` gives the names of the OpenTelemetry semantic
conventions for generative AI (`gen_ai.*`) and, beside them, the short `llm.*`, `stt.*`, `tts.*` keys; absent values are
left out, because an attribute that is None is no attribute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

__all__ = ["LLMResponse", "STTResponse", "TTSResponse"]


def _set(shown: dict[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    shown.update((name, value) for name, value in attributes.items() if value is not None)
    return shown


class LLMResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer of a language model. `latency_ms` in milliseconds; token counts as the provider reported them.

    `input_tokens` counts cached ones too. `model` is the model that answered, `request_model` the one asked for where
    it differs.
    """

    content: str
    model: str
    provider: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    latency_ms: float | None = None
    finish_reason: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    cached_tokens: int | None = None
    cache_creation_tokens: int | None = None
    reasoning_tokens: int | None = None
    response_id: str | None = None
    request_model: str | None = None
    operation: str = "chat"
    conversation_id: str | None = None
    time_to_first_chunk_ms: float | None = None
    request: dict[str, Any] = {}
    metadata: dict[str, Any] = {}

    @property
    def total_tokens(self) -> int:
        """Input and output together; unknown counts as 0."""
        return (self.input_tokens or 0) + (self.output_tokens or 0)

    def otel_attributes(self) -> dict[str, Any]:
        """Attributes for a span of this call.

        Parameters of the request (`temperature`, `top_p`, `max_tokens`, `stop_sequences`, `seed`, ...) come from
        `request` as `gen_ai.request.<name>`. Content is never included: it is personal data.
        """
        first_chunk = self.time_to_first_chunk_ms
        shown: dict[str, Any] = {}
        _set(
            shown,
            {
                "gen_ai.operation.name": self.operation,
                "gen_ai.provider.name": self.provider,
                "gen_ai.request.model": self.request_model or self.model,
                "gen_ai.response.model": self.model,
                "gen_ai.response.id": self.response_id,
                "gen_ai.response.finish_reasons": None if self.finish_reason is None else (self.finish_reason,),
                "gen_ai.response.time_to_first_chunk": None if first_chunk is None else first_chunk / 1000,
                "gen_ai.output.type": "text",
                "gen_ai.usage.input_tokens": self.input_tokens,
                "gen_ai.usage.output_tokens": self.output_tokens,
                "gen_ai.usage.cache_read.input_tokens": self.cached_tokens,
                "gen_ai.usage.cache_creation.input_tokens": self.cache_creation_tokens,
                "gen_ai.usage.reasoning.output_tokens": self.reasoning_tokens,
                "gen_ai.conversation.id": self.conversation_id,
            },
        )
        for name, value in self.request.items():
            _set(shown, {f"gen_ai.request.{name}": _attribute(value)})
        return _set(
            shown,
            {
                "llm.model": self.model,
                "llm.provider": self.provider,
                "llm.input_tokens": self.input_tokens,
                "llm.output_tokens": self.output_tokens,
                "llm.total_tokens": self.total_tokens,
                "llm.cached_tokens": self.cached_tokens,
                "llm.latency_ms": self.latency_ms,
                "llm.finish_reason": self.finish_reason,
                "llm.tool_call_count": None if self.tool_calls is None else len(self.tool_calls),
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Content, model, provider and `total_tokens` always; the rest where set."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        shown["total_tokens"] = self.total_tokens
        return shown


class STTResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was heard. `confidence` 0 to 1, durations in milliseconds, `words` as the provider gave them."""

    text: str = ""
    confidence: float = 1.0
    language: str = "en"
    is_final: bool = True
    duration_ms: float | None = None
    latency_ms: float | None = None
    model: str | None = None
    provider: str | None = None
    words: tuple[dict[str, Any], ...] = ()
    metadata: dict[str, Any] = {}

    def otel_attributes(self) -> dict[str, Any]:
        """Attributes for a span of this call, without the text."""
        return _set(
            {"gen_ai.operation.name": "generate_content", "gen_ai.output.type": "text"},
            {
                "gen_ai.provider.name": self.provider,
                "gen_ai.request.model": self.model,
                "gen_ai.response.model": self.model,
                "stt.provider": self.provider,
                "stt.model": self.model,
                "stt.language": self.language,
                "stt.confidence": self.confidence,
                "stt.is_final": self.is_final,
                "stt.duration_ms": self.duration_ms,
                "stt.latency_ms": self.latency_ms,
                "stt.text_length": len(self.text),
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The four that have defaults always; the rest where set."""
        head = {
            "text": self.text,
            "confidence": self.confidence,
            "language": self.language,
            "is_final": self.is_final,
        }
        return {**head, **msgspec.to_builtins(self)}


class TTSResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was spoken. `audio` is raw and left out of `to_dict`; durations in milliseconds."""

    audio: bytes
    duration_ms: float
    sample_rate: int = 16_000
    format: str = "pcm16"
    channels: int = 1
    latency_ms: float | None = None
    model: str | None = None
    provider: str | None = None
    voice: str | None = None
    characters: int | None = None
    metadata: dict[str, Any] = {}

    @property
    def byte_count(self) -> int:
        """Size of the audio."""
        return len(self.audio)

    def otel_attributes(self) -> dict[str, Any]:
        """Attributes for a span of this call, without the audio."""
        return _set(
            {"gen_ai.operation.name": "generate_content", "gen_ai.output.type": "speech"},
            {
                "gen_ai.provider.name": self.provider,
                "gen_ai.request.model": self.model,
                "gen_ai.response.model": self.model,
                "tts.provider": self.provider,
                "tts.model": self.model,
                "tts.voice": self.voice,
                "tts.format": self.format,
                "tts.sample_rate": self.sample_rate,
                "tts.channels": self.channels,
                "tts.duration_ms": self.duration_ms,
                "tts.latency_ms": self.latency_ms,
                "tts.characters": self.characters,
                "tts.byte_count": self.byte_count,
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that is set but the audio, and `byte_count`."""
        shown: dict[str, Any] = {
            "duration_ms": self.duration_ms,
            "sample_rate": self.sample_rate,
            "format": self.format,
            "channels": self.channels,
            "byte_count": self.byte_count,
        }
        for name in ("latency_ms", "model", "provider", "voice", "characters"):
            _set(shown, {name: getattr(self, name)})
        if self.metadata:
            shown["metadata"] = dict(self.metadata)
        return shown


def _attribute(value: Any) -> Any:
    """A value OpenTelemetry takes: a scalar, or a sequence of one scalar type; anything else as text."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes) and len({type(item) for item in value}) <= 1:
        if all(isinstance(item, str | bool | int | float) for item in value):
            return tuple(value)
    return str(value)
