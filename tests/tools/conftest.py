"""Clocks that move when a test says so, a record of what was emitted, and a context that needs no engine."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from stageflow.context.inputs import StageInputs
from stageflow.context.snapshot import ContextSnapshot


class ManualTime:
    """One time for every clock; `sleep` ends when `advance` passes it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, future))
        await future

    async def advance(self, seconds: float) -> None:
        await settle()
        self.now += seconds
        while self._sleepers and self._sleepers[0][0] <= self.now:
            future = heapq.heappop(self._sleepers)[2]
            if not future.done():
                future.set_result(None)
        await settle()


async def settle() -> None:
    """Let every ready task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


class Emitted:
    """An `emit` that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event_type: str, data: Mapping[str, Any] | None = None) -> None:
        self.events.append((event_type, dict(data or {})))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def last(self, name: str) -> dict[str, Any]:
        return [data for event, data in self.events if event == name][-1]


class BareContext:
    """The part of StageContext that this room uses."""

    def __init__(self, snapshot: ContextSnapshot, inputs: Mapping[str, Any], run_id: str, item: Any) -> None:
        self.snapshot = snapshot
        self.inputs = StageInputs(inputs, tuple(inputs), "approve")
        self.stage_name = "approve"
        self.run_id = run_id
        self.item = item
        self.emit = Emitted()
        self.waits: list[str] = []

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        self.waits.append(reason)
        yield


@pytest.fixture
def manual_time() -> ManualTime:
    return ManualTime()


@pytest.fixture
def emitted() -> Emitted:
    return Emitted()


@pytest.fixture
def bare_context() -> Callable[..., BareContext]:
    def make(
        inputs: Mapping[str, Any] | None = None,
        snapshot: ContextSnapshot | None = None,
        run_id: str = "run-1",
        item: tuple[int, ...] | None = None,
    ) -> BareContext:
        return BareContext(snapshot or ContextSnapshot(), inputs or {}, run_id, item)

    return make
