"""Identifiers: order and layout of v7, skew, collisions and their windows."""

from __future__ import annotations

import threading
import uuid

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.helpers.uuids import (
    ClockSkewDetector,
    UuidCollisionMonitor,
    UuidEvent,
    UuidFactory,
    generate_uuid,
    generate_uuid4,
    generate_uuid7,
    uuid7_time_ms,
)


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_versions() -> None:
    assert generate_uuid4().version == 4
    assert generate_uuid().version == 4
    value = generate_uuid7()
    assert value.version == 7
    assert value.variant == uuid.RFC_4122


def test_v7_carries_the_time_and_sorts_inside_one_millisecond() -> None:
    make = UuidFactory(clock_ms=lambda: 1_700_000_000_123)
    values = [make() for _ in range(3000)]
    assert values == sorted(values)
    assert len(set(values)) == 3000
    assert uuid7_time_ms(values[0]) == 1_700_000_000_123
    assert uuid7_time_ms(str(values[0])) == 1_700_000_000_123


def test_v7_keeps_order_when_the_counter_runs_over_and_the_clock_goes_back() -> None:
    now = [5000]
    make = UuidFactory(clock_ms=lambda: now[0], random_bytes=lambda n: b"\xff" * n)
    values = [make() for _ in range(5000)]
    now[0] = 10
    values.append(make())
    assert values == sorted(values)
    assert len(set(values)) == 5001
    assert all(value.version == 7 and value.variant == uuid.RFC_4122 for value in values)


def test_v7_from_many_threads_is_unique() -> None:
    make = UuidFactory(clock_ms=lambda: 77)
    made: list[list[uuid.UUID]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda mine=mine: mine.extend(make() for _ in range(500))) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({value for mine in made for value in mine}) == 2000
    assert all(mine == sorted(mine) for mine in made)


def test_skew_only_of_v7_and_only_above_the_limit() -> None:
    now = [1_000_000]
    detector = ClockSkewDetector(5000, clock_ms=lambda: now[0])
    value = UuidFactory(clock_ms=lambda: 1_000_000)()
    assert detector.check(value) is None
    now[0] = 1_005_000
    assert detector.check(value) is None
    now[0] = 1_005_001
    assert detector.check(str(value)) == 5001
    now[0] = 990_000
    assert detector.check(value) == 10_000
    assert detector.check(generate_uuid4()) is None
    assert detector.check("no uuid") is None
    with pytest.raises(DefinitionError):
        ClockSkewDetector(-1)


def test_seen_again_within_the_window() -> None:
    clock = Clock()
    monitor = UuidCollisionMonitor(60, 100, clock=clock)
    assert monitor.observe("a") is False
    clock.now += 59.9
    assert monitor.observe("a") is True
    clock.now += 59.9
    # The first sighting has expired, the second has not.
    assert monitor.observe("a") is True
    clock.now += 60
    assert monitor.observe("a") is False


def test_fractional_ttl_is_kept() -> None:
    clock = Clock()
    monitor = UuidCollisionMonitor(1.5, clock=clock)
    monitor.observe("a")
    clock.now += 1.25
    assert monitor.observe("a") is True
    clock.now += 1.5
    assert monitor.window_size == 0


def test_the_one_seen_longest_ago_is_evicted() -> None:
    monitor = UuidCollisionMonitor(60, 3)
    for value in ("a", "b", "c", "a", "d"):
        monitor.observe(value)
    assert monitor.window_size == 3
    assert monitor.observe("a") is True
    assert monitor.observe("b") is False
    monitor.clear()
    assert monitor.window_size == 0


@pytest.mark.parametrize(("ttl", "entries"), [(0.5, 10), (float("nan"), 10), (60, 0)])
def test_impossible_windows_are_refused(ttl: float, entries: int) -> None:
    with pytest.raises(DefinitionError):
        UuidCollisionMonitor(ttl, entries)


def test_listeners_hear_may_observe_and_may_fail() -> None:
    clock = Clock(5.0)
    skew = ClockSkewDetector(10, clock_ms=lambda: 100_000)
    monitor = UuidCollisionMonitor(60, 10, "runs", skew=skew, clock=clock)
    heard: list[UuidEvent] = []

    def reentrant(event: UuidEvent) -> None:
        heard.append(event)
        if event.value == "first":
            monitor.observe("second")

    def broken(event: UuidEvent) -> None:
        raise RuntimeError("broken")

    monitor.add_listener(broken)
    monitor.add_listener(reentrant)
    monitor.observe("first")
    old = UuidFactory(clock_ms=lambda: 40_000)()
    monitor.observe(old)
    monitor.observe(old)
    assert [(event.value, event.collision, event.skew_ms) for event in heard] == [
        ("first", False, None),
        ("second", False, None),
        (str(old), False, 60_000),
        (str(old), True, 60_000),
    ]
    assert heard[0].category == "runs"
    assert heard[0].observed_at == 5.0
    assert monitor.remove_listener(reentrant) is True
    assert monitor.remove_listener(reentrant) is False


def test_check_and_insert_are_one_step() -> None:
    monitor = UuidCollisionMonitor(60, 10_000)
    barrier = threading.Barrier(4)
    fresh = [0] * 4

    def observe(index: int) -> None:
        barrier.wait()
        fresh[index] = sum(not monitor.observe(str(n)) for n in range(2000))

    threads = [threading.Thread(target=observe, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(fresh) == 2000
