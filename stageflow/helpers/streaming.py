"""Moves chunks (mostly audio) between a producer and a consumer on one event loop, bounded, and tells when they jam.

`ChunkQueue` hands over items, `StreamingBuffer` smooths raw 16-bit audio, `BackpressureMonitor` keeps the numbers.
Events go to an `emit(type, data)` callable; what that raises is swallowed. Clocks are arguments.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

from stageflow.core.errors import DefinitionError

__all__ = [
    "AudioChunk",
    "AudioFormat",
    "BackpressureMonitor",
    "BackpressureStats",
    "BufferStats",
    "ChunkQueue",
    "StreamingBuffer",
    "calculate_audio_duration_ms",
    "encode_audio_for_logging",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Emit = Callable[[str, Mapping[str, Any]], object]

BLOCKED_WORTH_TELLING_MS: Final = 1.0
OVERFLOW_STEP_MS: Final = 50
BYTES_PER_SAMPLE: Final = 2  # the buffer holds 16-bit samples


class AudioFormat(StrEnum):
    """How one sample is stored."""

    PCM16 = "pcm16"
    PCM32 = "pcm32"
    FLOAT32 = "float32"

    @property
    def bytes_per_sample(self) -> int:
        """2 for 16-bit samples, else 4."""
        return 2 if self is AudioFormat.PCM16 else 4


def calculate_audio_duration_ms(
    audio: bytes | int, sample_rate: int = 16_000, channels: int = 1, bytes_per_sample: int = 2
) -> float:
    """Milliseconds that the bytes (or that many of them) last.

    Raises:
        DefinitionError: a rate, channel count or sample size below 1.
    """
    if sample_rate < 1 or channels < 1 or bytes_per_sample < 1:
        raise DefinitionError(
            "sample_rate, channels and bytes_per_sample must be 1 or more",
            sample_rate=sample_rate,
            channels=channels,
            bytes_per_sample=bytes_per_sample,
        )
    count = audio if isinstance(audio, int) else len(audio)
    return count / (bytes_per_sample * channels) / sample_rate * 1000


def encode_audio_for_logging(audio: bytes, max_bytes: int = 48) -> str:
    """Base64 of a short clip, or of the first `max_bytes` of a long one, always with the total byte count."""
    if len(audio) <= max_bytes:
        return f"base64:{base64.b64encode(audio).decode()} ({len(audio)} bytes)"
    return f"base64:{base64.b64encode(audio[:max_bytes]).decode()}... ({len(audio)} bytes)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioChunk:
    """A piece of sound. `data` is raw samples (base64 in JSON), `timestamp_ms` its place in the stream."""

    data: bytes
    sample_rate: int = 16_000
    channels: int = 1
    format: AudioFormat = AudioFormat.PCM16
    timestamp_ms: float | None = None
    sequence: int = 0
    is_final: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sample_rate < 1 or self.channels < 1:
            raise DefinitionError("sample_rate and channels must be 1 or more", sample_rate=self.sample_rate)

    @property
    def duration_ms(self) -> float:
        """How long it lasts."""
        return calculate_audio_duration_ms(self.data, self.sample_rate, self.channels, self.format.bytes_per_sample)

    def to_dict(self) -> dict[str, Any]:
        """A JSON form with the samples as base64; the optional fields where set."""
        written: dict[str, Any] = {
            "data": base64.b64encode(self.data).decode(),
            "sample_rate": self.sample_rate,
            "channels": self.channels,
            "format": self.format.value,
            "sequence": self.sequence,
            "is_final": self.is_final,
        }
        if self.timestamp_ms is not None:
            written["timestamp_ms"] = self.timestamp_ms
        if self.metadata:
            written["metadata"] = dict(self.metadata)
        return written

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> AudioChunk:
        """Read the JSON form; what is missing is 16 kHz, one channel, 16-bit samples.

        Raises:
            DefinitionError: samples that are no base64, an unknown format, or a rate below 1.
        """
        data = written.get("data", b"")
        try:
            # Not bytes(data): of a number that would be so many zeros.
            raw = base64.b64decode(data, validate=True) if isinstance(data, str) else bytes(memoryview(data))
            sound = AudioFormat(written.get("format", AudioFormat.PCM16))
        except (ValueError, TypeError) as error:
            raise DefinitionError(f"no audio chunk: {error}") from error
        return cls(
            data=raw,
            sample_rate=written.get("sample_rate", 16_000),
            channels=written.get("channels", 1),
            format=sound,
            timestamp_ms=written.get("timestamp_ms"),
            sequence=written.get("sequence", 0),
            is_final=written.get("is_final", False),
            metadata=dict(written.get("metadata") or {}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackpressureStats:
    """Numbers of one queue so far; `fill_percentage` is 0 to 100 and as of the last change."""

    total_items: int = 0
    dropped_items: int = 0
    max_queue_size: int = 0
    fill_percentage: float = 0.0
    blocked_puts: int = 0
    total_blocked_ms: float = 0.0

    @property
    def drop_rate(self) -> float:
        """Dropped as a fraction of all items offered; 0 before the first."""
        return self.dropped_items / max(self.total_items, 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields and `drop_rate`."""
        return {
            "total_items": self.total_items,
            "dropped_items": self.dropped_items,
            "max_queue_size": self.max_queue_size,
            "fill_percentage": self.fill_percentage,
            "blocked_puts": self.blocked_puts,
            "total_blocked_ms": self.total_blocked_ms,
            "drop_rate": self.drop_rate,
        }


class BackpressureMonitor:
    """Counts what passes a queue and latches a throttle: on at `high_water_mark` percent full, off at `low_water_mark`.

    `max_queue_size` in its numbers is the largest size seen. Not thread-safe: it belongs to the loop of its queue.
    """

    def __init__(self, high_water_mark: float = 80.0, low_water_mark: float = 50.0) -> None:
        if not 0 <= low_water_mark < high_water_mark <= 100:
            raise DefinitionError(
                "water marks are percentages with 0 <= low < high <= 100",
                high_water_mark=high_water_mark,
                low_water_mark=low_water_mark,
            )
        self.high_water_mark = high_water_mark
        self.low_water_mark = low_water_mark
        self._total = 0
        self._dropped = 0
        self._largest = 0
        self._fill = 0.0
        self._blocked = 0
        self._blocked_ms = 0.0
        self._throttled = False

    @property
    def should_throttle(self) -> bool:
        """Whether the producer should hold back; stays on until the queue drained to the low mark."""
        return self._throttled

    @property
    def stats(self) -> BackpressureStats:
        """The numbers so far."""
        return BackpressureStats(
            total_items=self._total,
            dropped_items=self._dropped,
            max_queue_size=self._largest,
            fill_percentage=self._fill,
            blocked_puts=self._blocked,
            total_blocked_ms=self._blocked_ms,
        )

    def record_put(self, queue_size: int, max_size: int) -> None:
        """Count one accepted item; the sizes are those after it."""
        self._total += 1
        self._level(queue_size, max_size)

    def record_get(self, queue_size: int, max_size: int) -> None:
        """Note the sizes after one item left."""
        self._level(queue_size, max_size)

    def record_drop(self, *, refused: bool = False) -> None:
        """Count one lost item; `refused` when it never got in, so that it counts as offered too."""
        self._dropped += 1
        if refused:
            self._total += 1

    def record_blocked(self, blocked_ms: float) -> None:
        """Count one put that had to wait."""
        self._blocked += 1
        self._blocked_ms += blocked_ms

    def _level(self, queue_size: int, max_size: int) -> None:
        self._largest = max(self._largest, queue_size)
        self._fill = queue_size / max_size * 100 if max_size > 0 else 0.0
        if self._fill >= self.high_water_mark:
            self._throttled = True
        elif self._fill <= self.low_water_mark:
            self._throttled = False


class ChunkQueue(Generic[T]):
    """A bounded queue of one event loop: a full one makes `put` wait, or drops its oldest item with `drop_on_overflow`.

    Events: `stream.chunk_dropped`, `stream.producer_blocked` (waits above 1 ms), `stream.throttle_started`,
    `stream.throttle_ended`, `stream.queue_closed`. Cancelling a waiting put or get loses no item.
    """

    def __init__(
        self,
        max_size: int = 100,
        drop_on_overflow: bool = False,
        *,
        monitor: BackpressureMonitor | None = None,
        emit: Emit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_size < 1:
            raise DefinitionError(f"max_size must be 1 or more, not {max_size}", max_size=max_size)
        self.max_size = max_size
        self.drop_on_overflow = drop_on_overflow
        self.monitor = monitor if monitor is not None else BackpressureMonitor()
        self._emit = emit
        self._clock = clock
        self._items: deque[T] = deque()
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._throttling = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        """Whether `close` was called; items may still be in it."""
        return self._closed

    @property
    def stats(self) -> BackpressureStats:
        """The monitor's numbers."""
        return self.monitor.stats

    async def put(self, item: T) -> bool:
        """Hand over one item, waiting for room unless the queue drops; False where it is (or gets) closed."""
        if self._closed:
            return False
        if len(self._items) >= self.max_size and not self.drop_on_overflow:
            began = self._clock()
            while len(self._items) >= self.max_size and not self._closed:
                await self._wait(self._putters)
            blocked_ms = (self._clock() - began) * 1000
            if blocked_ms > BLOCKED_WORTH_TELLING_MS:
                self.monitor.record_blocked(blocked_ms)
                self._tell("stream.producer_blocked", blocked_ms=blocked_ms, queue_size=len(self._items))
            if self.closed:
                return False
        self._accept(item)
        return True

    def put_nowait(self, item: T) -> bool:
        """Hand over one item without waiting; a full queue that does not drop refuses it, counted as `queue_full`."""
        if self._closed:
            return False
        if len(self._items) >= self.max_size and not self.drop_on_overflow:
            self.monitor.record_drop(refused=True)
            self._dropped("queue_full")
            return False
        self._accept(item)
        return True

    async def get(self) -> T | None:
        """Take the oldest item, waiting for one; None once the queue is closed and empty."""
        while not self._items:
            if self._closed:
                return None
            await self._wait(self._getters)
        item = self._items.popleft()
        self.monitor.record_get(len(self._items), self.max_size)
        self._throttle()
        self._wake(self._putters)
        return item

    def close(self) -> None:
        """Take no more; waiting puts return False, gets drain what is left and then return None."""
        if self._closed:
            return
        self._closed = True
        for waiters in (self._getters, self._putters):
            while waiters:
                self._wake(waiters)
        self._tell("stream.queue_closed", **self.monitor.stats.to_dict())

    async def __aiter__(self) -> AsyncIterator[T]:
        while (item := await self.get()) is not None:
            yield item

    def _accept(self, item: T) -> None:
        if item is None:
            raise DefinitionError("None cannot be queued: it is how the end of the queue reads")
        if len(self._items) >= self.max_size:
            self._items.popleft()
            self.monitor.record_drop()
            self._dropped("overflow")
        self._items.append(item)
        self.monitor.record_put(len(self._items), self.max_size)
        self._throttle()
        self._wake(self._getters)

    async def _wait(self, waiters: deque[asyncio.Future[None]]) -> None:
        waiter = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._wake(waiters)  # the wake-up was ours and we cannot use it: pass it on
            elif waiter in waiters:
                waiters.remove(waiter)
            raise

    @staticmethod
    def _wake(waiters: deque[asyncio.Future[None]]) -> None:
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _dropped(self, reason: str) -> None:
        self._tell("stream.chunk_dropped", queue_size=len(self._items), max_size=self.max_size, reason=reason)

    def _throttle(self) -> None:
        now = self.monitor.should_throttle
        if now != self._throttling:
            self._throttling = now
            self._tell(
                "stream.throttle_started" if now else "stream.throttle_ended",
                fill_percentage=self.monitor.stats.fill_percentage,
                queue_size=len(self._items),
            )

    def _tell(self, event_type: str, **data: Any) -> None:
        tell(self._emit, event_type, data)


def tell(emit: Emit | None, event_type: str, data: Mapping[str, Any]) -> None:
    """Emit one event; no listener is no work, and a failing listener is logged, never felt."""
    if emit is None:
        return
    try:
        emit(event_type, data)
    except Exception:
        logger.exception("event %s could not be emitted", event_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStats:
    """State of a streaming buffer. Totals are bytes."""

    duration_ms: float
    bytes_buffered: int
    total_received: int
    total_read: int
    total_dropped: int
    is_ready: bool
    underrun_active: bool


class StreamingBuffer:
    """Smooths 16-bit audio: fills to `target_duration_ms` before it is ready, holds at most `max_duration_ms`.

    Overflow drops the oldest sound in steps of 50 ms (`stream.buffer_overflow`). A read that gets less than it asked
    for starts an underrun (`stream.buffer_underrun`), ended when the buffer is ready again (`stream.buffer_recovered`).
    Reads and drops keep whole frames (one sample of each channel). Not thread-safe.
    """

    def __init__(
        self,
        max_duration_ms: float = 2000.0,
        sample_rate: int = 16_000,
        *,
        channels: int = 1,
        target_duration_ms: float = 200.0,
        emit: Emit | None = None,
    ) -> None:
        if not 0 <= target_duration_ms <= max_duration_ms or max_duration_ms <= 0:
            raise DefinitionError(
                "durations are milliseconds with 0 <= target <= max and max above 0",
                max_duration_ms=max_duration_ms,
                target_duration_ms=target_duration_ms,
            )
        calculate_audio_duration_ms(0, sample_rate, channels)  # refuses rates and channels below 1
        self.max_duration_ms = max_duration_ms
        self.target_duration_ms = target_duration_ms
        self.sample_rate = sample_rate
        self.channels = channels
        self._frame = BYTES_PER_SAMPLE * channels
        self._emit = emit
        self._bytes = bytearray()
        self._received = 0
        self._read = 0
        self._dropped = 0
        self._underrun = False

    @property
    def duration_ms(self) -> float:
        """How much sound is in it."""
        return calculate_audio_duration_ms(len(self._bytes), self.sample_rate, self.channels)

    @property
    def is_ready(self) -> bool:
        """Whether the target duration is reached."""
        return self.duration_ms >= self.target_duration_ms

    @property
    def stats(self) -> BufferStats:
        """All numbers at this moment."""
        return BufferStats(
            duration_ms=self.duration_ms,
            bytes_buffered=len(self._bytes),
            total_received=self._received,
            total_read=self._read,
            total_dropped=self._dropped,
            is_ready=self.is_ready,
            underrun_active=self._underrun,
        )

    def write(self, audio: bytes | AudioChunk) -> int:
        """Add sound (a chunk must have the buffer's rate, channels and 16 bits); returns the bytes dropped for it."""
        data = self._samples_of(audio) if isinstance(audio, AudioChunk) else audio
        self._bytes += data
        self._received += len(data)
        dropped = self._drop_overflow()
        if self._underrun and self.is_ready:
            self._underrun = False
            tell(self._emit, "stream.buffer_recovered", {"duration_ms": self.duration_ms})
        return dropped

    def read(self, duration_ms: float) -> bytes:
        """Take up to `duration_ms` of the oldest sound; less (even nothing) is an underrun."""
        wanted = self._bytes_for(duration_ms)
        taken = min(wanted, len(self._bytes) // self._frame * self._frame)
        sound = bytes(self._bytes[:taken])
        del self._bytes[:taken]
        self._read += taken
        if taken < wanted and not self._underrun:
            self._underrun = True
            tell(
                self._emit,
                "stream.buffer_underrun",
                {
                    "requested_ms": duration_ms,
                    "available_ms": calculate_audio_duration_ms(taken, self.sample_rate, self.channels),
                },
            )
        return sound

    def clear(self) -> None:
        """Forget the sound in it; totals stay."""
        self._bytes.clear()

    def _bytes_for(self, duration_ms: float) -> int:
        return max(0, int(duration_ms * self.sample_rate / 1000)) * self._frame

    def _drop_overflow(self) -> int:
        limit = max(self._bytes_for(self.max_duration_ms), self._frame)
        over = len(self._bytes) - limit
        if over <= 0:
            return 0
        step = max(self._bytes_for(OVERFLOW_STEP_MS), self._frame)
        whole = len(self._bytes) // self._frame * self._frame
        dropped = min(-(-over // step) * step, whole)
        del self._bytes[:dropped]
        self._dropped += dropped
        data = {
            "dropped_bytes": dropped,
            "dropped_ms": calculate_audio_duration_ms(dropped, self.sample_rate, self.channels),
            "duration_ms": self.duration_ms,
        }
        tell(self._emit, "stream.buffer_overflow", data)
        return dropped

    def _samples_of(self, chunk: AudioChunk) -> bytes:
        expected = (self.sample_rate, self.channels, AudioFormat.PCM16)
        if (chunk.sample_rate, chunk.channels, chunk.format) != expected:
            raise DefinitionError(
                f"chunk of {chunk.sample_rate} Hz, {chunk.channels} channel(s), {chunk.format} does not fit "
                f"a buffer of {self.sample_rate} Hz, {self.channels} channel(s), pcm16"
            )
        return chunk.data
