"""The mock providers: same calls, same answers; every failure is one that was ordered."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.testing.mocks import (
    MockAuthProvider,
    MockExpiredTokenError,
    MockFailureError,
    MockInvalidTokenError,
    MockLLMProvider,
    MockSTTProvider,
    MockToolExecutor,
    MockTTSProvider,
)


class Slept:
    """A sleep that only adds up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


async def test_llm_selects_pattern_then_echo_then_cycle() -> None:
    model = MockLLMProvider(["a", "b"], patterns={"weather": "sunny", "WEA": "never"})
    answers = [(await model.complete(prompt)).content for prompt in ("x", "The WEATHER?", "y", "z")]
    assert answers == ["a", "sunny", "b", "a"]
    model.reset()
    assert (await model.complete("x")).content == "a"
    assert model.call_count == 1
    echo = MockLLMProvider(["a"], patterns={"p": "matched"}, echo=True)
    assert [(await echo.complete(text)).content for text in ("p", "else")] == ["matched", "else"]


async def test_llm_counts_and_reads_conversations() -> None:
    model = MockLLMProvider(["x" * 40])
    talk = [{"role": "user", "content": "first"}, {"role": "user", "content": "12345678"}, {"role": "assistant"}]
    response = await model.complete(talk, temperature=0.5)
    assert (response.input_tokens, response.output_tokens, response.finish_reason) == (2, 10, "stop")
    assert response.metadata["usage"] == {"prompt_tokens": 2, "completion_tokens": 10, "total_tokens": 12}
    assert response.otel_attributes()["gen_ai.request.temperature"] == 0.5
    assert model.history[0].request is talk
    assert model.history[0].response is response


async def test_llm_streams_fixed_chunks_with_pauses() -> None:
    slept = Slept()
    model = MockLLMProvider(["abcdefg"], chunk_size=3, chunk_delay_ms=20, sleep=slept)
    assert [chunk async for chunk in model.stream("x")] == ["abc", "def", "g"]
    assert slept.seconds == [0.02, 0.02]


async def test_latency_jitters_around_its_mean_and_repeats() -> None:
    runs = []
    for _ in range(2):
        slept = Slept()
        model = MockLLMProvider(latency_ms=100, latency_jitter=30, seed=7, sleep=slept)
        for _ in range(50):
            await model.complete("x")
        runs.append(slept.seconds)
        assert [call.latency_ms / 1000 for call in model.history] == slept.seconds
    assert runs[0] == runs[1]
    assert all(0.07 <= seconds <= 0.13 for seconds in runs[0])
    assert len(set(runs[0])) > 40


async def test_failures_come_at_their_rate_and_repeat() -> None:
    async def failed(seed: int) -> list[int]:
        model = MockLLMProvider(fail_rate=0.3, seed=seed)
        places = []
        for place in range(200):
            try:
                await model.complete("x")
            except MockFailureError:
                places.append(place)
        assert model.call_count == 200
        assert [n for n, call in enumerate(model.history) if call.error] == places
        return places

    first = await failed(1)
    assert first == await failed(1)
    assert first != await failed(2)
    assert 30 < len(first) < 90
    always = MockLLMProvider(fail_rate=1.0)
    with pytest.raises(MockFailureError):
        await always.complete("x")


async def test_stt_by_audio_then_in_turn() -> None:
    ears = MockSTTProvider(["one", "two"], by_audio={b"hello": "Hello!"})
    heard = [await ears.transcribe(audio) for audio in (b"x" * 32_000, b"hello", b"y", b"z")]
    assert [one.text for one in heard] == ["one", "Hello!", "two", "one"]
    assert heard[0].duration_ms == 1000.0
    assert all(0.85 <= one.confidence <= 0.99 for one in heard)
    again = MockSTTProvider(["one"])
    assert (await again.transcribe(b"x" * 32_000)).confidence == heard[0].confidence
    assert (await MockSTTProvider(random_confidence=False).transcribe(b"")).confidence == 0.95
    assert ears.history[1].request == MockSTTProvider.audio_hash(b"hello")


async def test_tts_is_a_function_of_the_text() -> None:
    voice, other = MockTTSProvider(8000, bytes_per_char=16), MockTTSProvider(8000, bytes_per_char=16)
    spoken = await voice.synthesize("hello")
    assert spoken.byte_count == 80
    assert spoken.duration_ms == 5.0
    await other.synthesize("something before")
    assert (await other.synthesize("hello")).audio == spoken.audio
    assert (await voice.synthesize("hullo")).audio != spoken.audio
    assert (await voice.synthesize("hello", "other")).audio != spoken.audio
    slept = Slept()
    streamed = MockTTSProvider(8000, bytes_per_char=16, chunk_duration_ms=2, chunk_delay_ms=5, sleep=slept)
    chunks = [chunk async for chunk in streamed.stream("hello")]
    assert [len(chunk) for chunk in chunks] == [32, 32, 16]
    assert b"".join(chunks) == spoken.audio
    assert slept.seconds == [0.005, 0.005]


async def test_auth_tells_its_errors_apart() -> None:
    now = [1000.0]
    auth = MockAuthProvider(token_ttl_seconds=60, clock=lambda: now[0])
    token, claims = auth.create_token("ada", role="admin")
    assert claims == {"role": "admin", "sub": "ada", "iat": 1000.0, "exp": 1060.0}
    assert await auth.validate(token) == claims
    now[0] = 1060.0
    with pytest.raises(MockExpiredTokenError):
        await auth.validate(token)
    with pytest.raises(MockInvalidTokenError):
        await auth.validate("unknown")
    assert auth.revoke(token) is True
    assert auth.revoke(token) is False
    with pytest.raises(MockInvalidTokenError):
        await auth.validate(token)
    assert all(len(call.request) <= 20 for call in auth.history)
    assert token not in str(auth.history)
    assert [call.error is None for call in auth.history] == [True, False, False, False]
    with pytest.raises(MockFailureError):
        await MockAuthProvider(accept_any=True, fail_rate=1.0).validate("x")
    assert (await MockAuthProvider(accept_any=True).validate("whatever"))["sub"] == "mock-user"
    with pytest.raises(MockInvalidTokenError):
        await MockAuthProvider(accept_any=True).validate("")
    assert MockAuthProvider(seed=3).create_token("a")[0] == MockAuthProvider(seed=3).create_token("b")[0]


async def test_tool_executor_answers_and_remembers() -> None:
    async def slow(arguments: dict[str, Any]) -> int:
        return int(arguments["n"]) + 1

    def broken(arguments: dict[str, Any]) -> None:
        raise ValueError("bad n")

    tools = MockToolExecutor({"slow": slow}, default_output={"result": "default"})
    tools.register("broken", broken)
    assert await tools.execute("slow", {"n": 1}) == {"success": True, "data": 2}
    assert await tools.execute("broken", {"n": 2}) == {"success": False, "error": "bad n"}
    assert await tools.execute("unknown") == {"success": True, "data": {"result": "default"}}
    assert tools.call_count == 3
    assert tools.calls_of("slow") == [{"n": 1}]
    assert tools.history[1].response == {"success": False, "error": "bad n"}
    tools.reset()
    assert tools.history == []


def test_nonsense_is_refused() -> None:
    for make in (
        lambda: MockLLMProvider([]),
        lambda: MockLLMProvider(chunk_size=0),
        lambda: MockLLMProvider(fail_rate=2),
        lambda: MockLLMProvider(latency_ms=-1),
        lambda: MockSTTProvider([]),
        lambda: MockTTSProvider(0),
    ):
        with pytest.raises(DefinitionError):
            make()


def test_the_testing_room_does_not_bring_tools_or_helpers() -> None:
    code = (
        "import sys, stageflow.testing\n"
        "print([m for m in sys.modules if m.startswith(('stageflow.tools', 'stageflow.helpers'))])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
