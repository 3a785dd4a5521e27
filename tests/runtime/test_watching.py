"""What the engine tells whoever watches: readings of a run, events of workers, how a run began, and nothing unasked."""

import asyncio
import io
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stageflow import Engine, PipelineBuilder, PipelineContext, RetryConfig, RunIdentity
from stageflow.events import names
from stageflow.events.catalogue import typed
from stageflow.events.sinks import CollectingSink
from stageflow.observability.logs import LogSink
from stageflow.observability.stats import StatsFold
from stageflow.report.progress import ProgressSink
from stageflow.runtime import sampling


@pytest.fixture
def often(monkeypatch):
    """Readings every few milliseconds."""
    monkeypatch.setattr(sampling, "EVERY", 0.01)


def _numbers():
    yield from range(200)


def _many_numbers():
    yield from range(20_000)


def _pid(numbers):
    time.sleep(0.002)
    return os.getpid()


def _watched(lane):
    return PipelineBuilder("watched").stage("numbers", _numbers).map("pid", _pid, "numbers", executor=lane).build()


def test_a_run_that_is_watched_is_read_all_along(often):
    sink = CollectingSink()
    with Engine(processes=1, memory_limit="64MiB") as engine:
        result = engine.run(_watched("process"), event_sinks=[sink])
    samples = [event for event in sink.events() if event.type == "engine.sample"]
    assert result.success
    assert len(samples) > 5
    assert {event.run_id for event in samples} == {result.run_id}
    read = [typed(event) for event in samples]
    assert max(one.running.get("pid", 0) for one in read) > 0
    assert max(one.queued.get("pid", 0) for one in read) > 0
    assert {one.memory_limit for one in read} == {64 << 20}
    assert max(one.rss_bytes for one in read) > 1 << 20
    pids = set(result.data("pid"))
    assert pids & set().union(*(one.workers for one in read))
    # a single reading is as coarse as the kernel's ticks, and as late as the machine makes it
    assert sum(one.cpu_percent for one in read) / len(read) < 100 * (os.cpu_count() or 1) * 2


def test_readings_say_what_a_stage_waits_for(often):
    gate = threading.Event()
    seen = []

    class Sink:
        def emit(self, event):
            if event.type == "engine.sample" and not gate.is_set() and entered.is_set():
                seen.append(event.data)
                if len(seen) > 3:
                    gate.set()

    entered = threading.Event()

    def held(numbers):
        entered.set()
        assert gate.wait(20)
        return numbers

    def after(held):
        return held

    graph = (
        PipelineBuilder("waits")
        .stage("numbers", _many_numbers)
        .map("held", held, "numbers", executor="thread", concurrency=1)
        .map("after", after, "held", executor="thread")
        .build()
    )
    with Engine(processes=1, threads=4) as engine:
        assert engine.run(graph, event_sinks=[Sink()]).success
    first = seen[-1]
    assert list(first["running"]) == ["held"]
    assert first["waiting"]["held"] == "its concurrency limit"
    assert first["waiting"]["after"] == "items of held"
    assert first["waiting"].get("numbers", "held to catch up") == "held to catch up"  # or it has given all


def test_nobody_listens_and_nothing_is_read(often, monkeypatch):
    read = []
    monkeypatch.setattr(sampling, "readings", lambda *args: read.append(args) or {})
    with Engine(processes=1) as engine:
        assert engine.run(_watched("thread")).success
    assert read == []


def test_the_readings_end_with_the_run(often):
    async def main():
        sink = CollectingSink()
        async with Engine(processes=1) as engine:
            await engine.execute(_watched("thread"), event_sinks=[sink])
            driver = engine._state().driver
            assert driver.sampler._timer is None
            count = len(sink.events())
            assert sink.events()[-1].type == "run.completed"
            done = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.05, done.set_result, None)  # five readings would have come
            await done
            assert len(sink.events()) == count

    asyncio.run(main())


def test_the_start_names_the_limit_and_whom_the_run_is_for():
    sink = CollectingSink()
    ctx = PipelineContext(RunIdentity.new(), service="shop", topology="fast")

    async def main():
        async with Engine(processes=1, memory_limit=1 << 26) as engine:
            await engine.execute(_watched("thread"), ctx=ctx, event_sinks=[sink])

    asyncio.run(main())
    started = typed(sink.events()[0])
    assert (started.memory_limit, started.service, started.topology) == (1 << 26, "shop", "fast")


def _killed_once(numbers, flag):
    if numbers == 5 and not os.path.exists(flag):
        with open(flag, "w"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers


def test_a_runs_own_sinks_are_told_of_the_workers(tmp_path):
    sink, fold = CollectingSink(), StatsFold()
    graph = (
        PipelineBuilder("killed")
        .stage("numbers", _numbers)
        .map("killed", _killed_once, "numbers", executor="process", inputs={"flag": "flag"})
        .build()
    )
    with Engine(processes=1) as engine:
        result = engine.run(graph, {"flag": str(tmp_path / "flag")}, event_sinks=[sink])
    assert result.success, result.error
    types = [event.type for event in sink.events()]
    assert types.count("worker.lost") == 1
    assert types.count("worker.started") >= 1
    assert [event.seq for event in sink.events()] == sorted({event.seq for event in sink.events()})
    for event in sink.events():
        fold.add(event)
    assert fold.workers_lost == 1
    for name, stats in result.stats.items():
        told = fold.stats_of(name)
        assert (told.items_in, told.items_out, told.attempts, told.retried) == (
            stats.items_in, stats.items_out, stats.attempts, stats.retried,
        )  # fmt: skip


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_blocks_know_when_they_started(lane):
    sink = CollectingSink()
    before = time.monotonic()
    with Engine(processes=1) as engine:
        engine.run(_watched(lane), event_sinks=[sink])
    after = time.monotonic()
    blocks = [event.data for event in sink.events() if event.type == "stage.items" and event.stage == "pid"]
    assert blocks
    for data in blocks:
        assert before <= data["started"] <= after
        if lane == "process":  # blocks of several threads, which overlap, may be told as one
            assert data["started"] + data["seconds"] <= after + 0.001


_calls = {"flaky": 0}


def _flaky():
    _calls["flaky"] += 1
    time.sleep(0.02)
    if _calls["flaky"] < 3:
        raise ConnectionError("not yet")
    return 1


def _never(flaky):
    return flaky


@pytest.mark.parametrize("listen", [False, True])
def test_stats_hold_every_stage_in_order_and_all_attempts_whether_or_not_anybody_listens(listen):
    _calls["flaky"] = 0
    graph = (
        PipelineBuilder("stats")
        .stage("zero", lambda: 0, executor="async")
        .stage("flaky", _flaky, executor="thread", retry=RetryConfig(max_attempts=3, base_delay_ms=1))
        .stage("never", _never, when=lambda inputs: False)
        .build()
    )
    with Engine(processes=1) as engine:
        result = engine.run(graph, event_sinks=[CollectingSink()] if listen else [])
    assert list(result.stats) == ["zero", "flaky", "never"]
    flaky = result.stats["flaky"]
    assert (flaky.attempts, flaky.retried) == (3, 2)
    assert flaky.busy_seconds >= 0.06
    assert flaky.kind == str(graph.stage_spec("flaky").kind)
    assert result.stats["never"].lane == "thread"


def _speaks():
    print("to standard output")
    print("to standard error", file=sys.stderr)
    logging.getLogger("mine").warning("warned %s", 3)
    return 1


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_what_a_stage_prints_and_logs_comes_out_without_any_view(lane, capfd, caplog):
    graph = PipelineBuilder("speaks").stage("speaks", _speaks, executor=lane).build()
    with Engine(processes=1) as engine:
        assert engine.run(graph).success
    out, err = capfd.readouterr()
    assert (out, err) == ("to standard output\n", "to standard error\n")
    (record,) = [one for one in caplog.records if one.name == "mine"]
    assert (record.getMessage(), record.levelname) == ("warned 3", "WARNING")


def test_what_a_view_shows_does_not_come_out_twice(capfd, caplog):
    shown = io.StringIO()
    graph = PipelineBuilder("speaks").stage("speaks", _speaks, executor="process").build()
    with Engine(processes=1) as engine:
        assert engine.run(graph, event_sinks=[ProgressSink(shown, "lines"), LogSink()]).success
    assert capfd.readouterr() == ("", "")
    assert "[speaks] to standard output\n" in shown.getvalue()
    assert [one.getMessage() for one in caplog.records if one.name == "mine"] == ["warned 3"]


def counted():
    yield from range(40)


def first(counted):
    print("first", counted)
    return counted


def second(first, ctx):
    print("second", first)
    ctx.log.warning("logged %d", first)
    ctx.emit("told", {"n": first})
    return first


def several(second):
    print("several", second)
    yield second


def batched(several):
    print("batched", several[0])
    return several


def test_what_a_block_prints_and_logs_is_tagged_with_stage_and_item(capsys):
    sink = CollectingSink()
    graph = (
        PipelineBuilder("p")
        .stage("counted", counted)
        .map("first", first, over="counted")
        .map("second", second, over="first")
        .map("several", several, over="second")
        .map("batched", batched, over="several", batch=4)
        .build()
    )
    with Engine(processes=2) as engine:
        graph.run({}, engine=engine, event_sinks=[sink]).raise_for_failure()
    prints = [
        (event.stage, event.item, event.data["text"]) for event in sink.events() if event.type == names.STAGE_PRINT
    ]
    wanted = [(name, (n,), f"{name} {n}\n") for name in ("first", "second", "several") for n in range(40)]
    assert sorted(p for p in prints if p[0] != "batched") == wanted
    assert sorted(p for p in prints if p[0] == "batched") == [
        ("batched", (n,), f"batched {n}\n") for n in range(0, 40, 4)
    ]
    logs = [
        (event.stage, event.item, event.data["message"]) for event in sink.events() if event.type == names.STAGE_LOG
    ]
    assert sorted(logs) == sorted(("second", (n,), f"logged {n}") for n in range(40))
    told = [(event.stage, event.item, event.data["n"]) for event in sink.events() if event.type == "told"]
    assert sorted(told) == [("second", (n,), n) for n in range(40)]
    assert sorted(capsys.readouterr().out.split()) == sorted(" ".join(p[2] for p in prints).split())


async def steps(folder, ctx):
    for number in (1, 2):
        ctx.progress(number, 2)
        await wait_for(Path(folder, str(number)).exists)


def blocking_steps(folder, ctx):
    asyncio.run(steps(folder, ctx))


async def wait_for(condition):
    until = time.monotonic() + 40
    while not condition() and time.monotonic() < until:
        await asyncio.sleep(0.005)


class Seen(CollectingSink):
    """Leaves a file for each progress that it was told."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def emit(self, event):
        super().emit(event)
        if event.type == names.STAGE_PROGRESS:
            (self.folder / f"{event.data['done']:g}").touch()


@pytest.mark.parametrize(
    ("lane", "runner"), [("process", blocking_steps), ("thread", blocking_steps), ("async", steps)]
)
def test_progress_is_seen_while_an_attempt_runs_though_nobody_sends_it(lane, runner, tmp_path):
    sink = Seen(tmp_path)
    with Engine(processes=1) as engine:
        graph = PipelineBuilder("p").stage("steps", runner, executor=lane).build()
        graph.run({"folder": str(tmp_path)}, engine=engine, event_sinks=[sink]).raise_for_failure()
    told = [(event.data["done"], event.data["total"]) for event in sink.events() if event.type == names.STAGE_PROGRESS]
    assert told == [(1, 2), (2, 2)], "each state once, however often it was looked at"


def noted(given, ctx):
    for number in range(10_000):
        ctx.progress(number, 10_000, f"row {number}")


def test_notes_of_progress_are_told_a_few_times_a_second():
    sink = CollectingSink()
    with Engine(processes=1) as engine:
        graph = PipelineBuilder("p").stage("noted", noted, executor="process").build()
        graph.run({"given": 1}, engine=engine, event_sinks=[sink]).raise_for_failure()
    notes = [event.data["note"] for event in sink.events() if event.type == names.STAGE_PROGRESS]
    assert notes[0] == "row 0"
    assert len(notes) < 2_000


def logs_much(given):
    log = logging.getLogger("of.the.user")
    try:
        raise KeyError("lost?")
    except KeyError:
        log.exception("went wrong", extra={"user": 5, "big": 1 << 80, "thing": ValueError("x")})


def test_a_record_of_a_worker_keeps_its_traceback_its_line_and_its_fields(caplog):
    before = time.time()
    with Engine(processes=1) as engine:
        graph = PipelineBuilder("p").stage("logs", logs_much, executor="process").build()
        graph.run({"given": 1}, engine=engine).raise_for_failure()
    (record,) = [one for one in caplog.records if one.name == "of.the.user"]
    assert "KeyError: 'lost?'" in record.exc_text
    assert "in logs_much" in record.exc_text
    assert (record.filename, record.funcName) == ("test_watching.py", "logs_much")
    assert record.lineno > 0
    assert (record.user, record.big, record.thing) == (5, str(1 << 80), "x")
    assert (record.stage, record.attempt, record.levelno) == ("logs", 1, logging.ERROR)
    assert record.process != os.getpid()
    assert before <= record.created <= time.time()


@pytest.mark.parametrize("lane", ["process", "thread", "async", "inline"])
def test_what_ctx_log_says_is_tagged_in_every_lane(lane, caplog):
    def speaks(value, ctx):
        ctx.log.warning("heard")

    with Engine(processes=1) as engine:
        graph = (
            PipelineBuilder("p").map("speaks", speaks, over="values", inputs={"value": "values"}, executor=lane).build()
        )
        result = graph.run({"values": [7]}, engine=engine)
        result.raise_for_failure()
    (record,) = [one for one in caplog.records if one.message == "heard"]
    assert (record.run_id, record.stage, record.item, record.attempt) == (result.run_id, "speaks", (0,), 1)


def test_a_worker_that_is_new_has_not_spent_its_whole_life_since_the_last_reading(monkeypatch):
    pids, spent = [], {11: 5.0, 12: 70.0}
    supply = SimpleNamespace(idle_pids=lambda: pids)
    driver = SimpleNamespace(
        engine=SimpleNamespace(_supply=supply), machine=SimpleNamespace(live_bytes=0), memory_limit=1
    )
    monkeypatch.setattr(sampling, "cpu_seconds", spent.__getitem__)
    monkeypatch.setattr(sampling, "os", SimpleNamespace(times=lambda: (1.0, 1.0)))
    clock = iter([100.0, 101.0, 102.0])
    monkeypatch.setattr(sampling, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    sampler = sampling.Sampler(driver)
    found = []
    for up in ([11], [11, 12], [11, 12]):
        pids[:] = up
        found.append(sampler._machine_now()["cpu_percent"])
        spent[11] += 0.5
        spent[12] += 0.25
    assert found == [0.0, 50.0, 75.0]
