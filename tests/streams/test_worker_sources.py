"""A generator that computes, as a source of kind TRANSFORM: driven by a worker of its own, paced, closed, replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from stageflow import Engine, PipelineBuilder, RetryConfig, StageContext
from stageflow.pipeline.policies import SOURCE_AHEAD
from stageflow.testing.sinks import RecordingSink

AT_ONCE = RetryConfig(max_attempts=3, base_delay_ms=0)


def counted(n: int):
    for x in range(n):
        yield x, os.getpid()


def computed(source, *, kind="transform", **policies):
    return PipelineBuilder("w").stage("source", source, kind=kind, **policies)


@pytest.mark.parametrize("processes", [1, 2])
def test_it_runs_in_a_worker_beside_those_of_the_lane(processes):
    def tagged(source):
        return (*source, os.getpid())

    graph = computed(counted).map("tagged", tagged, "source").build()
    assert "driven by a worker of its own" in graph.plan().to_text()
    with Engine(processes=processes) as engine:
        for n in (0, 1, 20_000):
            result = engine.run(graph, {"n": n})
            assert result.success, result.error
            found = list(result.data("tagged"))
            assert [x for x, _, _ in found] == list(range(n))
        (pid,) = {pid for _, pid, _ in found}
        mapped = {pid for _, _, pid in found[:10_000]}  # while the source goes on: it is never so far ahead
        assert pid != os.getpid()
        assert pid not in mapped
        assert len(mapped) <= processes


def test_results_are_those_of_a_thread(engine):
    def blobs(n: int):
        for x in range(n):
            yield x.to_bytes(4, "little") * (50_000 if x % 7 == 0 else 10)

    def head(source: bytes) -> tuple[int, int]:
        return int.from_bytes(source[:4], "little"), len(source)

    seen = [
        list(engine.run(computed(blobs, kind=kind).map("head", head, "source").build(), {"n": 300}).data("head"))
        for kind in ("transform", "work")
    ]
    assert seen[0] == seen[1] == [(x, 200_000 if x % 7 == 0 else 40) for x in range(300)]


def test_it_is_suspended_where_nobody_wants_more(tmp_path):
    """A source of megabytes is no further ahead than the memory limit allows, one of numbers not more than is said."""
    gate = tmp_path / "open"

    def heavy(folder: str):
        for x in range(400):
            with open(f"{folder}/given", "w") as file:
                file.write(str(x + 1))
            yield bytes(1_000_000)

    def first(source: bytes) -> int:
        while not gate.exists():
            time.sleep(0.002)
        return len(source)

    graph = computed(heavy).sink("first", first, "source", kind="work").build()

    async def main(engine):
        handle = await engine.start(graph, {"folder": str(tmp_path)})
        given, still = -1, 0
        while still < 20:  # it gives nothing for a while: it stands
            await asyncio.sleep(0.02)
            now = int((tmp_path / "given").read_text() or 0) if (tmp_path / "given").exists() else 0
            still = still + 1 if now == given and now else 0
            given = now
        gate.touch()
        return given, await handle

    with Engine(processes=1, threads=2, memory_limit="64MiB") as engine:
        given, result = asyncio.run(main(engine))
        assert result.success, result.error
        assert 2 < given <= 64
        assert engine._supply.standing == 0
    assert SOURCE_AHEAD == 8192


@pytest.mark.parametrize("at", [0, 150])
def test_a_failure_is_its_own_and_the_generator_is_closed(engine, at, tmp_path):
    def failing(n: int, ctx: StageContext):
        ctx.defer((tmp_path / "deferred").touch)
        try:
            for x in range(n):
                if x == at:
                    raise KeyError("lost")
                yield x
        finally:
            (tmp_path / "closed").touch()

    graph = computed(failing).map("same", lambda source: source, "source").build()
    result = engine.run(graph, {"n": 300})
    assert result.status == "failed"
    assert result.error_info.type.endswith("KeyError")
    assert "in failing" in result.error_info.traceback
    assert (tmp_path / "closed").exists()
    assert (tmp_path / "deferred").exists()


@pytest.mark.parametrize("how", ["raises", "dies"])
@pytest.mark.parametrize("at", [0, 150])
def test_what_gives_the_same_again_goes_on_where_it_stopped(engine, how, at, tmp_path):
    mark = tmp_path / "mark"

    def once(n: int):
        for x in range(n):
            if x == at and not mark.exists():
                mark.touch()
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ConnectionError("lost")
            yield x

    policies = {"retry": AT_ONCE} if how == "raises" else {}
    graph = computed(once, replayable=True, **policies).map("same", lambda source: source, "source").build()
    result = engine.run(graph, {"n": 300})
    assert result.success, result.error
    assert list(result.data("same")) == list(range(300))


def test_one_that_kills_every_worker_is_given_up(engine):
    def deadly(n: int):
        os._exit(3)
        yield n

    result = engine.run(computed(deadly).map("same", lambda source: source, "source").build(), {"n": 3})
    assert result.status == "failed"
    assert result.error_info.type.endswith("WorkerDiedError")


@pytest.mark.parametrize("heeds", [True, False])
def test_a_cancel_closes_it_or_kills_it(heeds, tmp_path):
    pid_file, closed = tmp_path / "pid", tmp_path / "closed"

    def endless(n: int):
        pid_file.write_text(str(os.getpid()))
        try:
            for x in range(1 << 40):
                yield x
                while not heeds and x > 10:
                    time.sleep(0.01)
        finally:
            closed.touch()

    graph = computed(endless).sink("drop", lambda source: None, "source", kind="work").build()

    async def main(engine):
        handle = await engine.start(graph, {"n": 0})
        while not (pid_file.exists() and pid_file.read_text()):
            await asyncio.sleep(0.005)
        handle.cancel("enough")
        return await handle

    with Engine(processes=1, grace=0.3) as engine:
        result = asyncio.run(main(engine))
        assert (result.status, result.cancel_reason, result.abandoned) == ("cancelled", "enough", ())
        pid = int(pid_file.read_text())
        if heeds:
            assert closed.exists()
        else:
            while os.path.exists(f"/proc/{pid}"):  # killed, and on its way to be reaped
                time.sleep(0.005)


def test_it_tells_what_it_emits(engine):
    def telling(n: int, ctx: StageContext):
        for x in range(n):
            ctx.emit("mine", {"x": x})
            yield x

    sink = RecordingSink()
    graph = computed(telling).map("same", lambda source: source, "source").build()
    result = engine.run(graph, {"n": 3}, event_sinks=[sink])
    assert result.success, result.error
    assert [(event.stage, event.lane, event.data["x"]) for event in sink.of("mine")] == [
        ("source", "process", x) for x in range(3)
    ]


def test_what_cannot_be_sent_is_driven_by_a_thread(engine):
    def locked(lock, n: int):
        for x in range(n):
            yield x, threading.get_ident() != main

    main = threading.get_ident()
    graph = computed(locked).sink("drop", lambda source: None, "source", kind="work").build()
    result = engine.run(graph, {"lock": threading.Lock(), "n": 3})
    assert result.success, result.error
    assert result.stats["drop"].items_in == 3
