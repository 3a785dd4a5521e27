"""Every stage's time is split into running and what it waited for."""

from __future__ import annotations

import asyncio
import time

from stageflow import Engine, PipelineBuilder


def quick(n: int):
    yield from range(n)


def dawdling(n: int):
    for i in range(n):
        time.sleep(0.01)
        yield i


def same(x: int) -> int:
    return x


async def slow(x: int) -> int:
    await asyncio.sleep(0.01)
    return x


def waits(graph, **options):
    with Engine(processes=1, **options) as engine:
        engine.run(graph, {"n": 5})
        result = engine.run(graph, {"n": 60})
    assert result.success, result.error
    return {name: result.stats[name].wait for name in ("src", "m")}


def test_a_reader_of_a_slow_source_waits_for_upstream():
    graph = PipelineBuilder("u").stage("src", dawdling).map("m", same, "src", executor="thread").build()
    found = waits(graph)
    assert max(found["m"], key=found["m"].get) == "upstream"
    assert found["m"]["upstream"] > 0.3
    assert sum(found["src"].values()) < 0.2


def test_a_rate_is_named():
    graph = PipelineBuilder("r").stage("src", quick).map("m", same, "src", executor="thread", rate="200/s").build()
    assert waits(graph)["m"].get("rate", 0.0) > 0.1


def test_what_the_budget_holds_back_waits_for_bytes():
    def blobs(n: int):
        for _ in range(n):
            yield bytes(200_000)

    async def keep(x: bytes) -> int:
        await asyncio.sleep(0.005)
        return len(x)

    graph = PipelineBuilder("b").stage("src", blobs).map("m", keep, "src", concurrency=1).build()
    found = waits(graph, memory_limit="1MiB")
    assert found["src"].get("bytes", 0.0) + found["src"].get("downstream", 0.0) > 0.1
