"""One item of a map stopped by hand, in every lane, alone in its call or in the middle of a block."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from stageflow import DefinitionError, Engine, PipelineBuilder, RetryConfig
from stageflow.testing.sinks import RecordingSink

ITEMS = list(range(8))
LANES = ("async", "thread", "process")


def touch(folder, name):
    Path(folder, name).touch()


def seen(folder, start):
    return {name for name in os.listdir(folder) if name.startswith(start)}


def heeds(x, ctx, folder):
    touch(folder, f"began-{x}-{os.getpid()}")
    ctx.defer(touch, folder, f"cleaned-{x}")
    if x == 3:
        ctx.emit("ready", {})
        while not ctx.token.cancelled:
            time.sleep(0.001)
        ctx.raise_if_cancelled()
    return x


async def heeds_async(x, ctx, folder):
    touch(folder, f"began-{x}-{os.getpid()}")
    ctx.defer(touch, folder, f"cleaned-{x}")
    if x == 3:
        ctx.emit("ready", {})
        await asyncio.sleep(60)
    return x


def answers_anyway(x, ctx, folder):
    if x == 3:
        ctx.emit("ready", {})
        while not ctx.token.cancelled:
            time.sleep(0.001)
    return x


def deaf(x, ctx, folder):
    ctx.defer(touch, folder, f"survived-{x}", survive=True)
    if x == 3:
        ctx.emit("ready", {})
        time.sleep(60 if ctx.lane == "process" else 1.0)
    return x


def neighbour(x, ctx, folder):
    """Item 2 runs while item 3, behind it in the block, is stopped: it must not notice."""
    touch(folder, f"began-{x}")
    if x == 2:
        ctx.emit("ready", {})
        for _ in range(100):
            ctx.raise_if_cancelled()
            time.sleep(0.001)
    return x


async def neighbour_async(x, ctx, folder):
    touch(folder, f"began-{x}")
    if x == 2:
        ctx.emit("ready", {})
        for _ in range(100):
            ctx.raise_if_cancelled()
            await asyncio.sleep(0.001)
    return x


def whole_batch(xs, ctx, folder):
    touch(folder, f"batch-{'-'.join(map(str, xs))}")
    if 3 in xs:
        ctx.emit("ready", {})
        while True:
            ctx.raise_if_cancelled()
            time.sleep(0.001)
    return xs


class StopsWhenReady(RecordingSink):
    """Stops an item once its stage says that it is there."""

    def __init__(self, item, stage="m"):
        super().__init__()
        self.handle = None
        self.what = {"stage": stage, "item": item}

    def emit(self, event):
        super().emit(event)
        if event.type == "ready":
            self.handle.cancel("enough", **self.what)


async def run(graph, inputs, sink, *, gate=None, grace=20.0, threads=2, **options):
    """Run it; with a gate, stop the item before the elements come through that."""
    async with Engine(processes=1, threads=threads, grace=grace) as engine:
        handle = sink.handle = await engine.start(graph, inputs, event_sinks=[sink], **options)
        if gate is not None:
            handle.cancel("enough", **sink.what)
            for _ in range(5):  # the loop takes the word before what the gate lets through
                await asyncio.sleep(0)
            gate.set()
        return await asyncio.wait_for(asyncio.shield(handle._task), 25)


def one_map(function, lane, **policies):
    return PipelineBuilder("p").map("m", function, over="xs", executor=lane, **policies).build()


def check(result, sink, gone=3):
    """Everything but the item came through, and its end is in every view."""
    assert list(result.data("m")) == [x for x in ITEMS if x != gone]
    assert (result.status, result.success) == ("failed", False)
    (failure,) = result.failures
    assert (failure.stage, failure.item, failure.error_info.code) == ("m", (gone,), "SF-CANCELLED")
    assert "enough" in failure.error
    assert (result.failures.cancelled_items, result.failures.failed_items) == (1, 0)
    stats = result.stats["m"]
    assert (stats.items_in, stats.items_out, stats.failed, stats.cancelled) == (8, 7, 0, 1)
    assert str(result.outputs["m"].status) == "ok"
    assert result.outputs["m"].metadata["cancelled"] == 1
    (event,) = [event for event in sink.of("stage.cancelled") if event.item is not None]
    assert (event.item, event.data) == ((gone,), {"reason": "enough"})


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("kind", "mode"), [("enrich", "best_effort"), ("transform", "fail_fast")])
async def test_an_item_that_heeds_it_ends_with_its_cleanup(lane, kind, mode, tmp_path):
    sink = StopsWhenReady(3)
    function = heeds_async if lane == "async" else heeds
    graph = one_map(function, lane, kind=kind, retry=RetryConfig(max_attempts=3, base_delay_ms=0))
    result = await run(graph, {"xs": ITEMS, "folder": str(tmp_path)}, sink, failure_mode=mode)
    check(result, sink)
    assert seen(tmp_path, "cleaned-") == {f"cleaned-{x}" for x in ITEMS}
    assert result.abandoned == ()
    assert not sink.of("stage.retrying")


@pytest.mark.parametrize("kind", ["enrich", "transform"])
@pytest.mark.parametrize("lane", ["thread", "process"])
async def test_a_coroutine_off_the_loop_is_interrupted(lane, kind, tmp_path):
    sink = StopsWhenReady(3)
    result = await run(one_map(heeds_async, lane, kind=kind), {"xs": ITEMS, "folder": str(tmp_path)}, sink)
    check(result, sink)
    assert len(seen(tmp_path, "cleaned-")) == 8


@pytest.mark.parametrize("lane", ["thread", "process"])
@pytest.mark.parametrize("kind", ["enrich", "transform"])
async def test_what_it_answers_in_the_end_counts_for_nothing(lane, kind, tmp_path):
    sink = StopsWhenReady(3)
    check(await run(one_map(answers_anyway, lane, kind=kind), {"xs": ITEMS, "folder": str(tmp_path)}, sink), sink)


@pytest.mark.parametrize("lane", ["thread", "process"])
@pytest.mark.parametrize("kind", ["enrich", "transform"])
async def test_one_that_heeds_nothing_is_stopped_by_force_after_the_grace(lane, kind, tmp_path):
    """But for an item of a block that may not run twice, on a thread: it is waited for."""
    sink = StopsWhenReady(3)
    result = await run(one_map(deaf, lane, kind=kind), {"xs": ITEMS, "folder": str(tmp_path)}, sink, grace=0.1)
    check(result, sink)
    if (lane, kind) == ("thread", "transform"):
        assert [one.stage for one in result.abandoned] == ["m"]
    elif lane == "process":
        assert result.abandoned == ()
    if lane == "process":
        assert seen(tmp_path, "survived-3")


@pytest.mark.parametrize("lane", [*LANES, "inline"])
@pytest.mark.parametrize("kind", ["enrich", "transform"])
async def test_one_that_has_not_begun_never_does(lane, kind, tmp_path):
    sink, gate = StopsWhenReady(7), threading.Event()
    result = await run(behind(gate, heeds_not, lane, kind=kind), {"folder": str(tmp_path)}, sink, gate=gate)
    check(result, sink, gone=7)
    assert not seen(tmp_path, "began-7")


def behind(gate, function, lane, **policies):
    """A map over elements that come once the gate is open."""

    def xs():
        gate.wait(30)
        return ITEMS

    builder = PipelineBuilder("p").stage("xs", xs, executor="thread")
    return builder.map("m", function, over="xs", executor=lane, **policies).build()


def heeds_not(x, folder):
    touch(folder, f"began-{x}")
    return x


@pytest.mark.parametrize("lane", LANES)
async def test_a_neighbour_in_its_block_does_not_notice(lane, tmp_path, monkeypatch):
    sink = StopsWhenReady(3)
    function = neighbour_async if lane == "async" else neighbour
    graph = (
        PipelineBuilder("p")
        .stage("xs", lambda: ITEMS, executor="inline")
        .map("m", function, over="xs", executor=lane, kind="transform")
        .build()
    )
    monkeypatch.setattr("stageflow.runtime.engine.ASYNC_SLOTS", 1)  # so that the loop's lane has blocks at once, too
    result = await run(graph, {"folder": str(tmp_path)}, sink, threads=1)
    check(result, sink)
    assert not seen(tmp_path, "began-3")


@pytest.mark.parametrize("lane", ["thread", "process"])
async def test_a_batch_runs_again_without_the_item(lane, tmp_path):
    sink = StopsWhenReady(3)
    result = await run(one_map(whole_batch, lane, batch=4), {"xs": ITEMS, "folder": str(tmp_path)}, sink)
    check(result, sink)
    assert seen(tmp_path, "") == {"batch-0-1-2-3", "batch-0-1-2", "batch-4-5-6-7"}


def pairs(n):
    yield n
    yield n + 100


def second(pairs, ctx, folder):
    return heeds(pairs if pairs != 103 else 3, ctx, folder) if pairs != 3 else pairs


@pytest.mark.parametrize("lane", ["thread", "process"])
@pytest.mark.parametrize("when", ["waiting", "running"])
async def test_behind_a_flat_map_it_is_known_by_its_path(lane, when, tmp_path):
    sink, gate = StopsWhenReady((2, 1)), threading.Event()

    def xs():
        gate.wait(30)
        return [1, 2, 3, 4]

    graph = (
        PipelineBuilder("p")
        .stage("xs", xs, executor="thread")
        .map("pairs", pairs, over="xs", executor="thread")
        .map("m", second, over="pairs", executor=lane, kind="enrich")
        .build()
    )
    if when == "running":
        gate.set()
    result = await run(graph, {"folder": str(tmp_path)}, sink, gate=gate if when == "waiting" else None)
    assert list(result.data("m")) == [1, 101, 2, 102, 3, 4, 104]
    assert [failure.item for failure in result.failures] == [(2, 1)]


@pytest.mark.parametrize("stage", ["m", "last"])
async def test_in_a_region_it_ends_at_the_stage_that_was_named(stage):
    sink, gate = StopsWhenReady(3, stage), threading.Event()
    builder = behind_region(gate)
    result = await run(builder.build(), {}, sink, gate=gate)
    assert list(result.data("last")) == [x + 1 for x in ITEMS if x != 3]
    assert [(failure.stage, failure.item) for failure in result.failures] == [(stage, (3,))]
    assert result.stats["m"].items_out == (7 if stage == "m" else 8)


async def test_in_a_region_it_is_stopped_while_it_runs():
    sink, gate = StopsWhenReady(3, "last"), threading.Event()
    gate.set()
    result = await run(behind_region(gate).build(), {}, sink)
    assert list(result.data("last")) == [x + 1 for x in ITEMS if x != 3]
    assert [(failure.stage, failure.item) for failure in result.failures] == [("last", (3,))]
    assert (result.stats["m"].items_out, result.stats["last"].items_out) == (8, 7)


def behind_region(gate):
    def xs():
        gate.wait(30)
        return ITEMS

    return (
        PipelineBuilder("p")
        .stage("xs", xs, executor="thread")
        .map("m", plus_one, over="xs", executor="process")
        .map("last", waits_at_four, over="m", executor="process")
    )


def plus_one(x):
    return x + 1


def waits_at_four(m, ctx):
    if m == 4:
        ctx.emit("ready", {})
        while True:
            ctx.raise_if_cancelled()
            time.sleep(0.001)
    return m


async def test_what_has_no_items_to_stop_is_refused():
    graph = PipelineBuilder("p").map("m", heeds_not, over="xs").reduce("r", lambda a, b: a, over="m", initial=0).build()
    async with Engine(processes=1) as engine:
        handle = await engine.start(graph, {"xs": [], "folder": ""})
        for wrong in ({"item": 1}, {"stage": "r", "item": 1}, {"stage": "m", "item": (1, 2)}):
            with pytest.raises(DefinitionError):
                handle.cancel("x", **wrong)
        assert (await handle).success


async def test_a_run_that_is_cancelled_after_its_item_stops_the_neighbours_too(tmp_path):
    class Both(StopsWhenReady):
        def emit(self, event):
            super().emit(event)
            if event.type == "ready":
                self.handle.cancel("all of it")

    sink = Both(3)
    graph = one_map(until_told, "thread", kind="transform")
    result = await run(graph, {"xs": ITEMS, "folder": str(tmp_path)}, sink, grace=20)
    assert (result.status, result.cancel_reason, result.abandoned) == ("cancelled", "all of it", ())


def until_told(x, ctx):
    if x == 2:
        ctx.emit("ready", {})
        while not ctx.token.cancelled:
            time.sleep(0.001)
    return x
