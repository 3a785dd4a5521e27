"""Responses and the telemetry names they promise."""

from __future__ import annotations

import pytest

from stageflow.helpers.providers import LLMResponse, STTResponse, TTSResponse

gen_ai = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
KNOWN = {value for name, value in vars(gen_ai).items() if name.startswith("GEN_AI_") and isinstance(value, str)}

FULL = LLMResponse(
    content="secret words",
    model="gpt-x-2026",
    provider="openai",
    input_tokens=100,
    output_tokens=20,
    latency_ms=350.0,
    finish_reason="stop",
    tool_calls=({"id": "1"},),
    cached_tokens=80,
    cache_creation_tokens=5,
    reasoning_tokens=7,
    response_id="resp-1",
    request_model="gpt-x",
    conversation_id="c-1",
    time_to_first_chunk_ms=120.0,
    request={"temperature": 0.5, "stop_sequences": ["a", "b"], "seed": None, "odd": {"a": 1}},
)


def test_every_gen_ai_name_is_in_the_convention() -> None:
    shown = LLMResponse(
        content="", model="m", provider="p", request={"temperature": 1, "top_p": 1, "top_k": 1, "max_tokens": 5}
    ).otel_attributes()
    shown |= {name: 0 for name in FULL.otel_attributes() if "odd" not in name}
    shown |= STTResponse().otel_attributes() | TTSResponse(audio=b"", duration_ms=0).otel_attributes()
    used = {name for name in shown if name.startswith("gen_ai.")}
    assert used <= KNOWN
    assert len(used) >= 14


def test_llm_attributes() -> None:
    shown = FULL.otel_attributes()
    assert shown["gen_ai.operation.name"] == "chat"
    assert shown["gen_ai.provider.name"] == "openai"
    assert (shown["gen_ai.request.model"], shown["gen_ai.response.model"]) == ("gpt-x", "gpt-x-2026")
    assert shown["gen_ai.response.finish_reasons"] == ("stop",)
    assert shown["gen_ai.response.time_to_first_chunk"] == 0.12
    assert shown["gen_ai.usage.cache_read.input_tokens"] == 80
    assert shown["gen_ai.usage.reasoning.output_tokens"] == 7
    assert shown["gen_ai.request.stop_sequences"] == ("a", "b")
    assert shown["gen_ai.request.odd"] == "{'a': 1}"
    assert "gen_ai.request.seed" not in shown
    assert {name: value for name, value in shown.items() if name.startswith("llm.")} == {
        "llm.model": "gpt-x-2026",
        "llm.provider": "openai",
        "llm.input_tokens": 100,
        "llm.output_tokens": 20,
        "llm.total_tokens": 120,
        "llm.cached_tokens": 80,
        "llm.latency_ms": 350.0,
        "llm.finish_reason": "stop",
        "llm.tool_call_count": 1,
    }
    assert "secret" not in str(shown)


def test_absent_is_left_out_and_zero_is_kept() -> None:
    bare = LLMResponse(content="hi", model="m", provider="p", input_tokens=0)
    shown = bare.otel_attributes()
    assert None not in shown.values()
    assert shown["gen_ai.usage.input_tokens"] == 0
    assert "gen_ai.usage.output_tokens" not in shown
    assert bare.total_tokens == 0
    assert bare.to_dict() == {"content": "hi", "model": "m", "provider": "p", "input_tokens": 0, "total_tokens": 0}


def test_stt_defaults() -> None:
    heard = STTResponse()
    assert heard.to_dict() == {"text": "", "confidence": 1.0, "language": "en", "is_final": True}
    shown = STTResponse(text="hello", provider="x", model="m", duration_ms=20.0).otel_attributes()
    assert (shown["stt.text_length"], shown["stt.duration_ms"], shown["gen_ai.provider.name"]) == (5, 20.0, "x")
    assert "hello" not in shown.values()


def test_tts_keeps_the_audio_out() -> None:
    spoken = TTSResponse(audio=b"\0" * 320, duration_ms=10.0, voice="v", metadata={"k": 1})
    assert spoken.byte_count == 320
    assert spoken.to_dict() == {
        "duration_ms": 10.0,
        "sample_rate": 16_000,
        "format": "pcm16",
        "channels": 1,
        "byte_count": 320,
        "voice": "v",
        "metadata": {"k": 1},
    }
    shown = spoken.otel_attributes()
    assert (shown["tts.byte_count"], shown["gen_ai.output.type"]) == (320, "speech")
