"""Stand-ins for providers of language, speech, identity and tools: deterministic, counting, failing when told to.

Every mock draws from a generator seeded at construction, so equal calls in equal order give equal answers, latencies
and failures. Latency goes through an injectable `sleep`, so that a virtual clock makes it free.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict, TypeVar, Unpack

from stageflow.core.errors import DefinitionError, ResourceError
from stageflow.helpers.providers import LLMResponse, STTResponse, TTSResponse

__all__ = [
    "MockAuthProvider",
    "MockCall",
    "MockExpiredTokenError",
    "MockFailureError",
    "MockInvalidTokenError",
    "MockLLMProvider",
    "MockSTTProvider",
    "MockTTSProvider",
    "MockToolExecutor",
]

Sleep = Callable[[float], Awaitable[object]]
STT_BYTES_PER_SECOND: Final = 32_000  # 16 kHz, 16 bits, one channel
TOKEN_SHOWN: Final = 20
_Cut = TypeVar("_Cut", str, bytes)


class MockFailureError(ResourceError):
    """A failure that the mock was told to simulate."""

    code = "SF-MOCK-FAILURE"


class MockInvalidTokenError(ResourceError):
    """The token was never given out, or was revoked."""

    code = "SF-MOCK-INVALID-TOKEN"


class MockExpiredTokenError(ResourceError):
    """The token was good once."""

    code = "SF-MOCK-EXPIRED-TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class MockCall:
    """One recorded call: what was asked and what came of it (`error` where it failed)."""

    request: Any
    response: Any = None
    error: str | None = None
    latency_ms: float = 0.0


class Behaviour(TypedDict, total=False):
    """What every mock takes besides its own options; all have defaults."""

    latency_ms: float  #: of every call; 0
    latency_jitter: float  #: milliseconds by which it varies, up and down; 0
    fail_rate: float  #: share of calls that raise MockFailureError; 0
    seed: int  #: of everything that is drawn; 0
    sleep: Sleep  #: asyncio.sleep


class _Mock:
    """What all mocks share: a generator, latency, simulated failures, a history."""

    def __init__(
        self,
        *,
        latency_ms: float = 0.0,
        latency_jitter: float = 0.0,
        fail_rate: float = 0.0,
        seed: int = 0,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        if not 0 <= fail_rate <= 1:
            raise DefinitionError(f"fail_rate is between 0 and 1, not {fail_rate}", fail_rate=fail_rate)
        if latency_ms < 0 or latency_jitter < 0:
            raise DefinitionError("latency_ms and latency_jitter are 0 or more", latency_ms=latency_ms)
        self._latency_ms = latency_ms
        self._jitter_ms = latency_jitter
        self._fail_rate = fail_rate
        self._seed = seed
        self._sleep = sleep
        self._random = random.Random(seed)
        self._turn = 0
        self.history: list[MockCall] = []

    @property
    def call_count(self) -> int:
        """How many calls were made, failed ones included."""
        return len(self.history)

    def reset(self) -> None:
        """Forget the calls; the first answer and the first random draw come next."""
        self.history.clear()
        self._random = random.Random(self._seed)
        self._turn = 0

    def _next_of(self, answers: Sequence[str]) -> str:
        """The answers in turn."""
        answer = answers[self._turn % len(answers)]
        self._turn += 1
        return answer

    async def _in_pieces(self, whole: _Cut, size: int, pause_ms: float) -> AsyncIterator[_Cut]:
        """`whole` in pieces of `size`, with a pause between them."""
        for start in range(0, len(whole), size):
            if start and pause_ms > 0:
                await self._sleep(pause_ms / 1000)
            yield whole[start : start + size]

    async def _begin(self, request: Any) -> float:
        """Wait out this call's latency, then fail if its turn has come; returns the latency in milliseconds."""
        jitter = self._random.uniform(-self._jitter_ms, self._jitter_ms) if self._jitter_ms else 0.0
        latency = max(0.0, self._latency_ms + jitter)
        fails = self._fail_rate > 0 and self._random.random() < self._fail_rate
        if latency > 0:
            await self._sleep(latency / 1000)
        if fails:
            error = MockFailureError(f"{type(self).__name__} was told to fail", call=self.call_count)
            self.history.append(MockCall(request=request, error=str(error), latency_ms=latency))
            raise error
        return latency

    def _record(self, request: Any, response: Any, latency: float) -> None:
        self.history.append(MockCall(request=request, response=response, latency_ms=latency))


class MockLLMProvider(_Mock):
    """Answers prompts: by the first of `patterns` that is found, else with `echo` the prompt, else `responses` in turn.

    Patterns are case-insensitive regular expressions. Tokens are counted as characters // 4.
    """

    def __init__(
        self,
        responses: Sequence[str] = ("This is a mock response.",),
        *,
        patterns: Mapping[str, str] | None = None,
        echo: bool = False,
        model: str = "mock-model",
        chunk_size: int = 10,
        chunk_delay_ms: float = 0.0,
        **behaviour: Unpack[Behaviour],
    ) -> None:
        super().__init__(**behaviour)
        if not responses:
            raise DefinitionError("at least one response is needed")
        if chunk_size < 1:
            raise DefinitionError(f"chunk_size is 1 or more, not {chunk_size}", chunk_size=chunk_size)
        self._responses = tuple(responses)
        self._patterns = tuple((re.compile(pattern, re.IGNORECASE), text) for pattern, text in (patterns or {}).items())
        self._echo = echo
        self._model = model
        self._chunk_size = chunk_size
        self._chunk_delay_ms = chunk_delay_ms

    async def complete(self, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> LLMResponse:
        """Answer a prompt, or the last user message of a conversation."""
        text = _prompt_text(prompt)
        latency = await self._begin(prompt)
        content = self._answer(text)
        response = LLMResponse(
            content=content,
            model=self._model,
            provider="mock",
            input_tokens=len(text) // 4,
            output_tokens=len(content) // 4,
            latency_ms=latency,
            finish_reason="stop",
            request=options,
            metadata={"usage": self.usage(text, content)},
        )
        self._record(prompt, response, latency)
        return response

    async def stream(self, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> AsyncIterator[str]:
        """The same answer in pieces of `chunk_size` characters, with a pause of `chunk_delay_ms` between them."""
        content = (await self.complete(prompt, **options)).content
        async for piece in self._in_pieces(content, self._chunk_size, self._chunk_delay_ms):
            yield piece

    @staticmethod
    def usage(prompt: str, completion: str) -> dict[str, int]:
        """`prompt_tokens`, `completion_tokens`, `total_tokens`."""
        asked, answered = len(prompt) // 4, len(completion) // 4
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}

    def _answer(self, text: str) -> str:
        for pattern, response in self._patterns:
            if pattern.search(text):
                return response
        if self._echo:
            return text
        return self._next_of(self._responses)


def _prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((str(m.get("content", "")) for m in reversed(prompt) if m.get("role") == "user"), "")


class MockSTTProvider(_Mock):
    """Hears what it was told to: `by_audio` maps bytes to their text, else `transcriptions` come in turn.

    The confidence is drawn from 0.85 to 0.99, or 0.95 with `random_confidence=False`; bytes / 32,000 are seconds.
    """

    def __init__(
        self,
        transcriptions: Sequence[str] = ("This is a mock transcription.",),
        *,
        by_audio: Mapping[bytes, str] | None = None,
        random_confidence: bool = True,
        language: str = "en",
        **behaviour: Unpack[Behaviour],
    ) -> None:
        super().__init__(**behaviour)
        if not transcriptions:
            raise DefinitionError("at least one transcription is needed")
        self._transcriptions = tuple(transcriptions)
        self._by_hash = {self.audio_hash(audio): text for audio, text in (by_audio or {}).items()}
        self._random_confidence = random_confidence
        self._language = language

    @staticmethod
    def audio_hash(audio: bytes) -> str:
        """The key under which a clip is known."""
        return hashlib.sha256(audio).hexdigest()

    async def transcribe(self, audio: bytes) -> STTResponse:
        """Hear one clip; the history keeps its hash, not its bytes."""
        key = self.audio_hash(audio)
        latency = await self._begin(key)
        text = self._by_hash.get(key)
        if text is None:
            text = self._next_of(self._transcriptions)
        response = STTResponse(
            text=text,
            confidence=round(self._random.uniform(0.85, 0.99), 4) if self._random_confidence else 0.95,
            language=self._language,
            duration_ms=len(audio) / STT_BYTES_PER_SECOND * 1000,
            latency_ms=latency,
            model="mock-stt",
            provider="mock",
        )
        self._record(key, response, latency)
        return response


class MockTTSProvider(_Mock):
    """Speaks noise: `bytes_per_char` bytes for every character, the same for the same text, voice and seed."""

    def __init__(
        self,
        sample_rate: int = 16_000,
        *,
        bytes_per_char: int = 1000,
        voice: str = "mock-voice",
        chunk_duration_ms: float = 100.0,
        chunk_delay_ms: float = 0.0,
        **behaviour: Unpack[Behaviour],
    ) -> None:
        super().__init__(**behaviour)
        if sample_rate < 1 or bytes_per_char < 1 or chunk_duration_ms <= 0:
            raise DefinitionError("sample_rate, bytes_per_char and chunk_duration_ms must be above 0")
        self._sample_rate = sample_rate
        self._bytes_per_char = bytes_per_char
        self._voice = voice
        self._chunk_duration_ms = chunk_duration_ms
        self._chunk_delay_ms = chunk_delay_ms

    async def synthesize(self, text: str, voice: str | None = None) -> TTSResponse:
        """Speak the text as 16-bit samples of one channel."""
        latency = await self._begin(text)
        used = voice or self._voice
        noise = random.Random(f"{self._seed}:{used}:{text}")
        audio = noise.randbytes(len(text) * self._bytes_per_char)
        response = TTSResponse(
            audio=audio,
            duration_ms=len(audio) / (2 * self._sample_rate) * 1000,
            sample_rate=self._sample_rate,
            latency_ms=latency,
            model="mock-tts",
            provider="mock",
            voice=used,
            characters=len(text),
        )
        self._record(text, response, latency)
        return response

    async def stream(self, text: str, voice: str | None = None) -> AsyncIterator[bytes]:
        """The same audio in pieces of `chunk_duration_ms`, with a pause of `chunk_delay_ms` between them."""
        audio = (await self.synthesize(text, voice)).audio
        size = max(2, int(self._sample_rate * self._chunk_duration_ms / 1000) * 2)
        async for piece in self._in_pieces(audio, size, self._chunk_delay_ms):
            yield piece


class MockAuthProvider(_Mock):
    """Gives out tokens and knows them again until they expire. `clock` is seconds since 1970.

    With `accept_any` unknown tokens are good too. Expired, invalid and simulated failures are different errors; the
    history keeps only the first 20 characters of a token.
    """

    def __init__(
        self,
        accept_any: bool = False,
        *,
        token_ttl_seconds: float = 3600.0,
        clock: Callable[[], float] = time.time,
        **behaviour: Unpack[Behaviour],
    ) -> None:
        super().__init__(**behaviour)
        self._accept_any = accept_any
        self._ttl = token_ttl_seconds
        self._clock = clock
        self._tokens: dict[str, dict[str, Any]] = {}

    def create_token(
        self, user_id: str, *, ttl_seconds: float | None = None, **claims: Any
    ) -> tuple[str, dict[str, Any]]:
        """A new token and its claims: `sub`, `iat`, `exp` and the given ones."""
        now = self._clock()
        token = f"mock_{self._random.getrandbits(160):040x}"
        made = {**claims, "sub": user_id, "iat": now, "exp": now + (self._ttl if ttl_seconds is None else ttl_seconds)}
        self._tokens[token] = made
        return token, dict(made)

    def revoke(self, token: str) -> bool:
        """Make a token invalid; False where it was unknown."""
        return self._tokens.pop(token, None) is not None

    async def validate(self, token: str) -> dict[str, Any]:
        """The token's claims.

        Raises:
            MockInvalidTokenError, MockExpiredTokenError, MockFailureError: as their names say.
        """
        shown = token[:TOKEN_SHOWN]
        latency = await self._begin(shown)
        claims = self._tokens.get(token)
        if claims is None and self._accept_any and token:
            claims = {"sub": "mock-user", "iat": self._clock(), "exp": self._clock() + self._ttl}
        try:
            if claims is None:
                raise MockInvalidTokenError("the token is not known", token=shown)
            if claims["exp"] <= self._clock():
                raise MockExpiredTokenError("the token has expired", token=shown, expired_at=claims["exp"])
        except ResourceError as error:
            self.history.append(MockCall(request=shown, error=str(error), latency_ms=latency))
            raise
        self._record(shown, dict(claims), latency)
        return dict(claims)


class MockToolExecutor(_Mock):
    """Answers tool calls with handlers (sync or async) by name; unknown tools get `default_output`.

    An output is a mapping with `success`, and `data` or `error`; what a handler raises becomes `success=False` with its
    text.
    """

    def __init__(
        self,
        handlers: Mapping[str, Callable[..., Any]] | None = None,
        *,
        default_output: Any = None,
        **behaviour: Unpack[Behaviour],
    ) -> None:
        super().__init__(**behaviour)
        self._handlers = dict(handlers or {})
        self._default = default_output if default_output is not None else {"result": "mock"}

    def register(self, name: str, handler: Callable[..., Any]) -> None:
        """Answer `name` with `handler(arguments)` from now on."""
        self._handlers[name] = handler

    def calls_of(self, name: str) -> Iterable[dict[str, Any]]:
        """Arguments of every call of one tool, in order."""
        return [call.request["arguments"] for call in self.history if call.request["name"] == name]

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Answer one call."""
        request = {"name": name, "arguments": dict(arguments or {})}
        latency = await self._begin(request)
        handler = self._handlers.get(name)
        output: dict[str, Any]
        try:
            data = self._default if handler is None else handler(request["arguments"])
            output = {"success": True, "data": await data if inspect.isawaitable(data) else data}
        except Exception as error:
            output = {"success": False, "error": str(error) or type(error).__name__}
        self._record(request, output, latency)
        return output
