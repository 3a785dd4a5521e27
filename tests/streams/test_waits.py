"""Every stage's time is split into running and what it waited for."""

from __future__ import annotations

import asyncio
import time

import pytest

from stageflow import Engine, PipelineBuilder, Resources, RetryConfig


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


# ---------------------------------------------------------------- stages that are no streams


class Deaf:
    """A sink that listens to everything and keeps nothing."""

    def emit(self, event) -> None:
        pass


async def nap(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


def hold(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def plain_waits(graph, inputs, *, listened: bool, **options):
    with Engine(processes=1, event_sinks=(Deaf(),) if listened else (), **options) as engine:
        result = engine.run(graph, inputs)
    assert result.success, result.error
    return {name: one.wait for name, one in result.stats.items()}


@pytest.mark.parametrize("listened", [False, True])
def test_a_plain_stage_waits_for_upstream_and_for_a_slot(listened):
    graph = (
        PipelineBuilder("p")
        .stage("first", nap)
        .stage("a", hold, ["first"])
        .stage("b", hold, ["first"])
        .stage("last", nap, ["a", "b"])
        .build()
    )
    found = plain_waits(graph, {"seconds": 0.2}, listened=listened, threads=1)
    assert found["first"].get("upstream", 0.0) < 0.1
    assert found["a"]["upstream"] > 0.19
    assert max(found[name].get("slot", 0.0) for name in ("a", "b")) > 0.19
    assert found["last"]["upstream"] > 0.59
    assert found["last"].get("slot", 0.0) < 0.15


@pytest.mark.parametrize("listened", [False, True])
def test_a_plain_stage_names_the_limit_at_which_it_waits(listened):
    graph = (
        PipelineBuilder("p")
        .stage("a", hold, resources=Resources(tokens={"gpu": 1}))
        .stage("b", hold, resources=Resources(tokens={"gpu": 1}))
        .build()
    )
    found = plain_waits(graph, {"seconds": 0.2}, listened=listened, tokens={"gpu": 1})
    assert sorted(one.get("token", 0.0) > 0.15 for one in found.values()) == [False, True]
    assert max(one.get("slot", 0.0) for one in found.values()) < 0.15


@pytest.mark.parametrize("listened", [False, True])
def test_a_plain_stage_that_is_tried_again_waits_for_its_delay(listened):
    tries = []

    async def flaky() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("once")
        return 1

    retry = RetryConfig(max_attempts=2, base_delay_ms=200, jitter="none", backoff="constant")
    graph = PipelineBuilder("p").stage("first", nap).stage("flaky", flaky, ["first"], retry=retry).build()
    found = plain_waits(graph, {"seconds": 0.1}, listened=listened)["flaky"]
    assert found["retry"] > 0.19
    assert 0.09 < found["upstream"] < 0.19
