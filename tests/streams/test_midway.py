"""A full pipeline (source, thread map, fused process maps, flat-map, reduce and sink) that ends in the middle: whatever
ends it, the source is closed, nothing is left over, and every item that came in is counted by what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import stageflow
from stageflow import DROP, CancellationToken, Engine, PipelineBuilder
from stageflow.runtime.running import live_drivers
from stageflow.scheduler.audit import audit

ITEMS = 900
GUILTY = 503
#: who reads whose items
EDGES = (("source", "read"), ("read", "parse"), ("parse", "refine"), ("refine", "parts"), ("parts", "count"),
         ("parts", "store"))  # fmt: skip


class Watched:
    """The pipeline, and what its parent-side stages saw."""

    def __init__(self, fail_at: str = "", kill: str = "", at: int = 0, then=None):
        self.given = 0
        self.closed = 0
        self.stored = 0
        self.kill = kill
        watched = self

        def source(n: int):
            try:
                for i in range(n):
                    watched.given = i + 1
                    yield i
            finally:
                watched.closed += 1

        def read(x: int) -> int:
            return stumble("read", x)

        def stumble(stage: str, x: int) -> int:
            if stage == fail_at and x == GUILTY:
                raise ValueError("no further")
            return x

        def parse(x: int):
            if kill and x == GUILTY and not os.path.exists(kill):
                Path(kill).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return DROP if stumble_in_worker("parse", x) % 7 == 0 else x

        def stumble_in_worker(stage: str, x: int) -> int:
            if stage == fail_at and x == GUILTY:
                raise ValueError("no further")
            return x

        def refine(x: int) -> int:
            return stumble_in_worker("refine", x)

        def parts(x: int):
            for k in range(x % 4):
                yield stumble_in_worker("parts", x), k

        def count(total: int, part) -> int:
            stumble_in_worker("count", part[0])
            return total + 1

        def both(a: int, b: int) -> int:
            return a + b

        async def store(part) -> None:
            watched.stored += 1
            stumble("store", part[0])
            if at and watched.stored == at:
                then()
            await asyncio.sleep(0)

        # what runs in workers must not drag this object along
        self.graph = (
            PipelineBuilder("midway")
            .stage("source", source)
            .map("read", read, "source", executor="thread")
            .map("parse", parse, "read")
            .map("refine", refine, "parse")
            .map("parts", parts, "refine")
            .reduce("count", count, "parts", initial=0, combine=both, block=64)
            .sink("store", store, "parts")
            .build()
        )

    def check(self, result, engine) -> dict:
        """Every item is accounted for on every edge, the source is closed once, and nothing is left over."""
        stats = dict(result.stats)
        for name, one in stats.items():
            assert one.items_in == one.items_out + one.dropped + one.failed + one.cancelled, name
            assert one.cancelled >= 0, name
        for upstream, downstream in EDGES:
            assert stats[upstream].emitted == stats[downstream].items_in, (upstream, downstream)
        assert stats["source"].items_out <= self.given
        assert stats["store"].items_out <= self.stored
        assert self.closed == 1
        for driver in live_drivers:
            if driver.engine is engine:
                machine = driver.machine
                audit(machine)
                assert (machine.live_bytes, machine.promised, machine.spilling) == (0, 0, 0)
                assert (machine.runs, machine.tasks, driver.running, driver.jobs) == ({}, {}, {}, {})
                assert not any(lane.used for lane in machine.lanes.values())
        assert not [t for t in threading.enumerate() if t.name.startswith("stageflow-source")]
        return stats


def total(n: int) -> int:
    return sum(x % 4 for x in range(n) if x % 7)


def test_undisturbed_every_item_arrives(engine):
    watched = Watched()
    result = engine.run(watched.graph, {"n": ITEMS})
    stats = watched.check(result, engine)
    assert result.data("count") == watched.stored == stats["store"].items_out == total(ITEMS)
    assert (stats["parts"].emitted, stats["count"].emitted) == (total(ITEMS), 1)
    assert not any(one.cancelled for one in stats.values())
    assert engine.code(watched.graph).layout.regions == {2: (2, 3)}


@pytest.mark.parametrize("at", [1, 300])
def test_a_cancel_ends_it_and_what_was_done_is_counted(engine, at):
    token = CancellationToken()
    watched = Watched(at=at, then=lambda: token.cancel("enough"))
    result = engine.run(watched.graph, {"n": ITEMS}, token=token)
    stats = watched.check(result, engine)
    assert (result.status, result.cancel_reason) == ("cancelled", "enough")
    assert stats["store"].cancelled > 0
    assert stats["store"].status == "cancel"
    counts = result.outputs["parts"].metadata
    assert (counts["items"], counts["cancelled"]) == (stats["parts"].emitted, stats["parts"].cancelled)


@pytest.mark.parametrize("stage", ["read", "refine", "parts", "count", "store"])
@pytest.mark.parametrize("mode", ["fail_fast", "continue_on_failure"])
def test_a_stage_that_fails_ends_it_or_loses_the_item_alone(engine, stage, mode):
    watched = Watched(fail_at=stage)
    result = engine.run(watched.graph, {"n": ITEMS}, failure_mode=mode)
    stats = watched.check(result, engine)
    assert result.status == "failed"
    assert "no further" in result.error
    assert {one.stage for one in result.failures.failures} == {stage}
    if mode == "fail_fast":
        assert stats["count"].emitted == 0
        return
    lost = GUILTY % 4
    if stage == "count":  # a reduce fails as a whole
        assert stats["store"].items_out == total(ITEMS)
        assert stats["count"].cancelled + stats["count"].items_out == total(ITEMS)
    elif stage == "store":
        assert (stats["store"].failed, result.data("count")) == (lost, total(ITEMS))
    else:
        assert stats[stage].failed == 1
        assert result.data("count") == stats["store"].items_out == total(ITEMS) - lost
    assert sum(one.cancelled for name, one in stats.items() if name != "count") == 0


def test_a_killed_worker_costs_nothing_but_time(engine, tmp_path):
    watched = Watched(kill=str(tmp_path / "killed"))
    result = engine.run(watched.graph, {"n": ITEMS})
    stats = watched.check(result, engine)
    assert result.success, result.error
    assert os.path.exists(watched.kill)
    assert result.data("count") == stats["store"].items_out == total(ITEMS)


@pytest.mark.parametrize("force", [False, True])
async def test_a_caller_that_is_cancelled_ends_it(force):
    reached = asyncio.Event()
    watched = Watched(at=200, then=reached.set)
    async with Engine(processes=2, threads=8) as engine:
        token = CancellationToken()
        task = asyncio.create_task(engine.execute(watched.graph, {"n": ITEMS}, token=token))
        await reached.wait()
        task.cancel()
        if force:
            await asyncio.sleep(0)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert watched.closed == 1
        for driver in live_drivers:
            if driver.engine is engine:
                assert (driver.machine.runs, driver.machine.tasks, driver.jobs) == ({}, {}, {})


async def test_a_consumer_that_leaves_a_stream_of_runs_ends_those_in_flight():
    watched, results = Watched(), []
    async with Engine(processes=2, threads=8) as engine:
        stream = engine.stream(watched.graph, ({"n": ITEMS} for _ in range(9)), max_in_flight=2)
        async for result in stream:
            results.append(result)
            break
        await stream.aclose()
        assert results[0].data("count") == total(ITEMS)
        assert watched.closed in (2, 3)  # the first and those beside it; nothing begins behind the consumer's back
        for driver in live_drivers:
            if driver.engine is engine:
                audit(driver.machine)
                assert (driver.machine.runs, driver.jobs, driver.machine.live_bytes) == ({}, {}, 0)


def endless(closed):
    try:
        i = 0
        while True:
            yield i
            i += 1
    finally:
        closed.append(i)


def negative(x: int) -> int:
    return -x


def test_a_consumer_that_leaves_a_map_closes_its_source(engine):
    closed: list[int] = []
    results = stageflow.map(negative, endless(closed), engine=engine)
    assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
    results.close()
    assert len(closed) == 1
    assert list(stageflow.map(negative, range(100), engine=engine)) == [-i for i in range(100)]


INTERRUPTED = """
import asyncio, json, os, signal, sys, time
from stageflow import Engine, PipelineBuilder
closed = []
def source():
    i = 0
    try:
        while True:
            yield i
            i += 1
    finally:
        closed.append(i)
def read(x: int) -> int:
    return x
def parse(x: int) -> int:
    return x + 1
def refine(x: int) -> int:
    return x - 1
def parts(x: int):
    for k in range(x % 4):
        yield x, k
def count(total: int, part) -> int:
    return total + 1
def both(a: int, b: int) -> int:
    return a + b
stored = 0
async def store(part) -> None:
    global stored
    stored += 1
    if stored in {signals}:
        os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep({rest})
graph = (PipelineBuilder("p").stage("source", source).map("read", read, "source", executor="thread")
    .map("parse", parse, "read").map("refine", refine, "parse").map("parts", parts, "refine")
    .reduce("count", count, "parts", initial=0, combine=both).sink("store", store, "parts").build())
with Engine(processes=2, threads=4, grace=2.0) as engine:
    pids = []
    try:
        engine.run(graph)
    except KeyboardInterrupt as stop:
        stats = {{name: [one.items_in, one.items_out, one.dropped, one.failed, one.cancelled, one.emitted]
                 for name, one in stop.result.stats.items()}}
        print(json.dumps({{"status": stop.result.status, "closed": closed, "stored": stored, "stats": stats}}))
sys.exit(130)
"""


@pytest.mark.parametrize("signals", ["(300,)", "(300, 301)"])
def test_ctrl_c_ends_it_and_what_was_done_is_counted(tmp_path, signals):
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(INTERRUPTED.format(signals=signals, rest=0)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 130, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == "cancelled"
    assert len(told["closed"]) == 1 or signals != "(300,)"  # the second signal waits for nobody's `close`
    stats = told["stats"]
    for name, (came, out, dropped, failed, cancelled, _) in stats.items():
        assert came == out + dropped + failed + cancelled, name
    for upstream, downstream in EDGES:
        assert stats[upstream][5] == stats[downstream][0], (upstream, downstream)
    assert stats["store"][1] <= told["stored"]
    if told["closed"]:
        assert stats["source"][5] <= told["closed"][0] + 1
