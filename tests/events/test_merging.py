"""Blocks that follow each other within milliseconds become one event; nothing is lost, late or out of order."""

import asyncio
import random

from stageflow.events.catalogue import StageItems, typed
from stageflow.events.event import Event
from stageflow.events.fanout import FanOut, items_of
from stageflow.events.merging import BlockMerger
from stageflow.events.sinks import CollectingSink, RedactingSink

MS = 1_000_000


def block(seq: int, at_ms: float, lo: int, hi: int, pid: int = 1, stage: str = "a", **more: object) -> Event:
    data = {
        "lo": lo,
        "hi": hi,
        "ok": hi - lo,
        "dropped": 0,
        "failed": 0,
        "seconds": 0.001 * (hi - lo),
        "worker_pid": pid,
        "started": 1.0 + at_ms / 1000,
        **more,
    }
    return Event("stage.items", int(at_ms * MS), seq, "r", stage, None, 1, "process", data)


def test_a_block_after_a_quiet_time_is_passed_on_at_once() -> None:
    merger = BlockMerger()
    first, later = block(1, 100, 0, 4), block(2, 150, 4, 8)
    assert merger.add(first) == [first]
    assert merger.add(later) == [later]
    assert not merger.holds


def test_neighbours_of_one_worker_become_one() -> None:
    merger = BlockMerger()
    merger.add(block(1, 100, 0, 1))
    for n in range(1, 6):
        assert merger.add(block(n + 1, 100 + n, n, n + 1, seconds=0.001 * n, emitted=2)) is None
    (one,) = merger.take()
    data = one.data
    assert (data["lo"], data["hi"], data["ok"], data["emitted"], one.seq) == (1, 6, 5, 10, 6)
    assert data["max_seconds"] == 0.005
    assert round(data["seconds"], 6) == 0.015
    assert one.time_unix_ns == 105 * MS


def test_nothing_is_held_for_long() -> None:
    merger = BlockMerger()
    merger.add(block(1, 100, 0, 1))
    passed = [merger.add(block(n, 100 + 4 * n, n, n + 1)) for n in range(1, 60)]
    assert any(passed)


def test_sums_ranges_and_order_survive_any_interleaving() -> None:
    rng = random.Random(3)
    merger, out = BlockMerger(), []
    at = 100.0
    given = []
    for n in range(2_000):
        at += rng.choice([0.01, 0.5, 3.0, 20.0])
        more = {"items": [[n, 0]]} if rng.random() < 0.05 else {}
        given.append(block(n + 1, at, n, n + 1, rng.choice([1, 2]), rng.choice("ab"), **more))
        out += merger.add(given[-1]) or []
    out += merger.take()
    assert len(out) < len(given)
    assert sum(e.data["ok"] for e in out) == 2_000
    assert [e.seq for e in out] == sorted({e.seq for e in out})
    for stage in "ab":
        told = [path for e in out if e.stage == stage and "items" not in e.data for path in items_of(e)]
        indices = sorted(one.item[0] for one in told if one.item)
        assert indices == [e.data["lo"] for e in given if e.stage == stage and "items" not in e.data]


def test_workers_that_take_turns_at_one_stage_give_one_event_each() -> None:
    merger = BlockMerger()
    merger.add(block(1, 100, 0, 1))
    for n in range(1, 9):
        assert merger.add(block(n + 1, 100 + n, 2 * n, 2 * n + 2, pid=1 + n % 2, seconds=0.001 * n)) is None
    one, two = merger.take()
    assert (one.data["lo"], one.data["hi"], one.data["ranges"]) == (2, 16, [[2, 4], [6, 8], [10, 12], [14, 16]])
    assert two.data["ranges"] == [[4, 6], [8, 10], [12, 14], [16, 18]]
    assert (two.data["longest"], two.data["max_seconds"]) == ([16, 18], 0.004)
    assert [path.item for path in items_of(one)] == [(n,) for n in (2, 3, 6, 7, 10, 11, 14, 15)]
    shown = typed(one)
    assert isinstance(shown, StageItems)
    assert shown.ranges == [[2, 4], [6, 8], [10, 12], [14, 16]]


async def test_held_blocks_come_before_anything_else_and_after_a_moment_by_themselves() -> None:
    kept = CollectingSink()
    fan = FanOut([kept])
    for n in range(5):
        fan.emit(block(n, 100 + n, n, n + 1))
    assert len(kept) == 1
    fan.emit(Event("stage.completed", 200 * MS, 9, "r", "a"))
    assert [e.type for e in kept.events()] == ["stage.items", "stage.items", "stage.completed"]
    fan.emit(block(10, 201, 5, 6))
    fan.emit(block(11, 202, 6, 7))
    while len(kept) < 5:
        await asyncio.sleep(0.005)
    assert sum(e.data["ok"] for e in kept.of_type("stage.items")) == 7
    fan.emit(block(12, 203, 7, 8))
    await fan.drain()
    assert sum(e.data["ok"] for e in kept.of_type("stage.items")) == 8


def test_without_a_loop_nothing_is_held() -> None:
    kept = CollectingSink()
    fan = FanOut([kept])
    for n in range(5):
        fan.emit(block(n, 100 + n, n, n + 1))
    assert len(kept) == 5


async def test_a_sink_that_wants_blocks_gets_each_once_as_it_comes_and_others_get_them_merged() -> None:
    class Each(CollectingSink):
        wants_blocks = True

    each, merged = Each(), CollectingSink()
    fan = FanOut([each, RedactingSink(Each(), lambda event: event), merged])
    for n in range(5):
        fan.emit(block(n, 100 + n, n, n + 1))
    assert (len(each), len(merged)) == (5, 1)
    fan.emit(Event("stage.completed", 200 * MS, 9, "r", "a"))
    assert [e.seq for e in each.events()] == [0, 1, 2, 3, 4, 9]
    assert [e.data.get("ok") for e in merged.events()] == [1, 4, None]
    assert [e.seq for e in fan.sinks[1].downstream.events()] == [0, 1, 2, 3, 4, 9]  # type: ignore[attr-defined]
