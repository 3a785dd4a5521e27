"""Chunk queue, audio buffer, backpressure: order, bounds, and the events they owe."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow.core.errors import DefinitionError
from stageflow.helpers.streaming import (
    AudioChunk,
    AudioFormat,
    BackpressureMonitor,
    BackpressureStats,
    ChunkQueue,
    StreamingBuffer,
    calculate_audio_duration_ms,
    encode_audio_for_logging,
)


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event_type: str, data: Mapping[str, Any]) -> None:
        self.events.append((event_type, dict(data)))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [data for event_type, data in self.events if event_type == name]


async def settle() -> None:
    """Let every ready task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_audio_chunk_duration_and_json() -> None:
    chunk = AudioChunk(data=b"\0" * 3200, sequence=4, timestamp_ms=20.0, is_final=True, metadata={"k": 1})
    assert chunk.duration_ms == 100.0
    assert AudioChunk(data=b"\0" * 3200, format=AudioFormat.FLOAT32, channels=2).duration_ms == 25.0
    assert AudioChunk.from_dict(chunk.to_dict()) == chunk
    default = AudioChunk.from_dict({"data": "AAA="})
    assert (default.data, default.sample_rate, default.channels, default.format) == (
        b"\0\0",
        16_000,
        1,
        AudioFormat.PCM16,
    )


@pytest.mark.parametrize(
    "bad", [{"data": "###"}, {"data": 5}, {"data": ["x"]}, {"format": "mp3"}, {"sample_rate": 0}, {"channels": 0}]
)
def test_impossible_chunks_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError):
        AudioChunk.from_dict(bad)


def test_utilities() -> None:
    assert calculate_audio_duration_ms(32_000) == 1000.0
    assert calculate_audio_duration_ms(b"\0" * 320, 8000) == 20.0
    with pytest.raises(DefinitionError):
        calculate_audio_duration_ms(10, 0)
    assert encode_audio_for_logging(b"abc") == "base64:YWJj (3 bytes)"
    assert encode_audio_for_logging(b"abcdef", max_bytes=3) == "base64:YWJj... (6 bytes)"


def test_throttle_latches_between_the_marks() -> None:
    monitor = BackpressureMonitor(80, 50)
    seen = []
    for size in (7, 8, 7, 6, 5, 7, 8):
        monitor.record_put(size, 10)
        seen.append(monitor.should_throttle)
    assert seen == [False, True, True, True, False, False, True]
    monitor.record_drop()
    monitor.record_drop(refused=True)
    monitor.record_blocked(2.5)
    stats = monitor.stats
    assert (stats.total_items, stats.dropped_items, stats.max_queue_size, stats.fill_percentage) == (8, 2, 8, 80.0)
    assert (stats.blocked_puts, stats.total_blocked_ms, stats.drop_rate) == (1, 2.5, 0.25)
    assert stats.to_dict()["drop_rate"] == 0.25
    assert BackpressureStats().drop_rate == 0
    with pytest.raises(DefinitionError):
        BackpressureMonitor(50, 80)


def test_queue_blocks_then_flows_and_tells() -> None:
    async def scene() -> None:
        now = [0.0]
        told = Told()
        queue: ChunkQueue[int] = ChunkQueue(2, emit=told, clock=lambda: now[0])
        assert await queue.put(1)
        assert await queue.put(2)
        third = asyncio.create_task(queue.put(3))
        await settle()
        assert not third.done()
        now[0] += 0.25
        assert await queue.get() == 1
        assert await third is True
        assert told.named("stream.producer_blocked") == [{"blocked_ms": 250.0, "queue_size": 1}]
        assert queue.stats.blocked_puts == 1
        assert [await queue.get(), await queue.get()] == [2, 3]
        queue.close()
        assert await queue.get() is None
        assert await queue.put(9) is False
        assert len(told.named("stream.throttle_started")) >= 1
        assert len(told.named("stream.throttle_started")) == len(told.named("stream.throttle_ended"))
        assert told.named("stream.queue_closed")[0]["total_items"] == 3

    asyncio.run(scene())


def test_short_waits_are_not_told() -> None:
    async def scene() -> None:
        told = Told()
        queue: ChunkQueue[int] = ChunkQueue(1, emit=told, clock=lambda: 0.0)
        await queue.put(1)
        second = asyncio.create_task(queue.put(2))
        await settle()
        await queue.get()
        await second
        assert told.named("stream.producer_blocked") == []

    asyncio.run(scene())


def test_drop_mode_loses_the_oldest() -> None:
    async def scene() -> None:
        told = Told()
        queue: ChunkQueue[int] = ChunkQueue(2, drop_on_overflow=True, emit=told)
        for n in range(5):
            assert await queue.put(n) is True
        assert told.named("stream.chunk_dropped") == [{"queue_size": 1, "max_size": 2, "reason": "overflow"}] * 3
        queue.close()
        assert [item async for item in queue] == [3, 4]
        assert queue.stats.drop_rate == 3 / 5

    asyncio.run(scene())


def test_put_nowait_counts_a_refusal() -> None:
    async def scene() -> None:
        told = Told()
        queue: ChunkQueue[int] = ChunkQueue(1, emit=told)
        assert queue.put_nowait(1) is True
        assert queue.put_nowait(2) is False
        assert told.named("stream.chunk_dropped")[0]["reason"] == "queue_full"
        assert queue.stats.drop_rate == 0.5
        queue.close()
        queue.close()
        assert queue.put_nowait(3) is False
        assert len(told.named("stream.queue_closed")) == 1

    asyncio.run(scene())


def test_close_wakes_everyone_who_waits() -> None:
    async def scene() -> None:
        empty: ChunkQueue[int] = ChunkQueue(1)
        getters = [asyncio.create_task(empty.get()) for _ in range(3)]
        full: ChunkQueue[int] = ChunkQueue(1)
        await full.put(1)
        putters = [asyncio.create_task(full.put(2)) for _ in range(3)]
        await settle()
        empty.close()
        full.close()
        assert await asyncio.gather(*getters) == [None] * 3
        assert await asyncio.gather(*putters) == [False] * 3
        assert len(full) == 1

    asyncio.run(scene())


def test_a_cancelled_waiter_passes_its_wake_up_on() -> None:
    async def scene() -> None:
        queue: ChunkQueue[int] = ChunkQueue(5)
        first = asyncio.create_task(queue.get())
        second = asyncio.create_task(queue.get())
        await settle()
        queue.put_nowait(1)  # wakes `first`, which is cancelled before it runs
        first.cancel()
        assert await asyncio.wait_for(second, 30) == 1
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(scene())


def test_a_broken_listener_is_not_felt() -> None:
    def broken(event_type: str, data: Mapping[str, Any]) -> None:
        raise RuntimeError(event_type)

    async def scene() -> None:
        queue: ChunkQueue[int] = ChunkQueue(1, drop_on_overflow=True, emit=broken)
        await queue.put(1)
        await queue.put(2)
        queue.close()
        assert await queue.get() == 2

    asyncio.run(scene())


def test_queue_refuses_none_and_nonsense() -> None:
    with pytest.raises(DefinitionError):
        ChunkQueue(0)
    with pytest.raises(DefinitionError):
        ChunkQueue[Any](1).put_nowait(None)


MS = 32  # bytes per millisecond at 16 kHz, one channel


def test_buffer_overflow_drops_the_oldest_in_steps() -> None:
    told = Told()
    buffer = StreamingBuffer(300, target_duration_ms=100, emit=told)
    assert buffer.write(b"a" * (200 * MS)) == 0
    assert buffer.is_ready
    assert buffer.write(b"b" * (101 * MS)) == 50 * MS
    assert buffer.duration_ms == 251.0
    assert told.named("stream.buffer_overflow") == [
        {"dropped_bytes": 50 * MS, "dropped_ms": 50.0, "duration_ms": 251.0}
    ]
    assert buffer.read(151) == b"a" * (150 * MS) + b"b" * MS
    stats = buffer.stats
    assert (stats.total_received, stats.total_read, stats.total_dropped) == (301 * MS, 151 * MS, 50 * MS)
    assert stats.bytes_buffered == 100 * MS
    buffer.clear()
    assert buffer.stats.bytes_buffered == 0


def test_underrun_and_recovery_are_told_on_transitions() -> None:
    told = Told()
    buffer = StreamingBuffer(1000, target_duration_ms=100, emit=told)
    buffer.write(b"a" * (20 * MS))
    assert buffer.read(20) == b"a" * (20 * MS)
    assert told.events == []
    assert buffer.read(20) == b""
    assert buffer.read(20) == b""
    assert buffer.stats.underrun_active
    buffer.write(b"b" * (99 * MS))
    assert buffer.stats.underrun_active
    buffer.write(b"b" * MS)
    assert not buffer.stats.underrun_active
    assert [name for name, _ in told.events] == ["stream.buffer_underrun", "stream.buffer_recovered"]
    assert told.events[0][1] == {"requested_ms": 20, "available_ms": 0.0}


def test_buffer_takes_only_chunks_that_fit() -> None:
    buffer = StreamingBuffer(1000, 8000)
    assert buffer.write(AudioChunk(data=b"\0" * 160, sample_rate=8000)) == 0
    assert buffer.duration_ms == 10.0
    with pytest.raises(DefinitionError):
        buffer.write(AudioChunk(data=b"\0" * 160, sample_rate=16_000))
    with pytest.raises(DefinitionError):
        StreamingBuffer(100, target_duration_ms=200)
    with pytest.raises(DefinitionError):
        StreamingBuffer(1000, 0)


@settings(deadline=None)  # a loaded machine is no failure
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 700)), max_size=60))
def test_no_byte_is_lost_unaccounted(steps: list[tuple[bool, int]]) -> None:
    buffer = StreamingBuffer(20, 8000, channels=2, target_duration_ms=5)
    for writes, amount in steps:
        if writes:
            buffer.write(b"x" * amount)
        else:
            assert len(buffer.read(amount / 10)) % 4 == 0
        stats = buffer.stats
        assert stats.total_received == stats.total_read + stats.total_dropped + stats.bytes_buffered
        assert stats.bytes_buffered <= 20 * 32 + 3


@settings(deadline=None)  # a loaded machine is no failure
@given(st.integers(1, 4), st.lists(st.sampled_from(["put", "get", "cancel", "turn"]), max_size=80))
def test_whatever_is_cancelled_no_item_is_lost_or_doubled(max_size: int, steps: list[str]) -> None:
    async def scene() -> None:
        queue: ChunkQueue[int] = ChunkQueue(max_size)
        puts: list[tuple[int, asyncio.Task[bool]]] = []
        gets: list[asyncio.Task[int | None]] = []
        for step in steps:
            if step == "put":
                puts.append((len(puts) + 1, asyncio.create_task(queue.put(len(puts) + 1))))
            elif step == "get":
                gets.append(asyncio.create_task(queue.get()))
            elif step == "cancel":
                waiting = [task for task in (*gets, *(task for _, task in puts)) if not task.done()]
                if waiting:
                    waiting[len(waiting) // 2].cancel()
            else:
                await asyncio.sleep(0)
            assert len(queue) <= max_size
        await settle()
        # Nobody may wait for what is there.
        assert not (len(queue) and any(not task.done() for task in gets))
        assert not (len(queue) < max_size and any(not task.done() for _, task in puts))
        queue.close()
        await settle()
        got = [task.result() for task in gets if not task.cancelled() and task.result() is not None]
        got += [item async for item in queue]
        taken = [number for number, task in puts if not task.cancelled() and task.result()]
        assert sorted(got) == taken

    asyncio.run(scene())
