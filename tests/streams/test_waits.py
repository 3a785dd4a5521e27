"""Every stage's time is split into running and what it waited for. Virtual seconds: no load of the machine adds any."""

from __future__ import annotations

import pytest

from stageflow import Engine, PipelineBuilder, Resources, RetryConfig
from stageflow.testing.clock import VirtualClock


def quick(n: int):
    yield from range(n)


def same(x: int) -> int:
    return x


@pytest.fixture
def clock():
    return VirtualClock()


def waits(graph, clock, **options):
    with Engine(processes=1, clock=clock, **options) as engine:
        result = engine.run(graph, {"n": 60})
    assert result.success, result.error
    return {name: result.stats[name].wait for name in ("src", "m")}


def test_a_reader_of_a_slow_source_waits_for_upstream(clock):
    def dawdling(n: int):
        for i in range(n):
            clock.block(0.01)
            yield i

    graph = PipelineBuilder("u").stage("src", dawdling).map("m", same, "src", executor="thread").build()
    found = waits(graph, clock)
    assert found["m"] == pytest.approx({"upstream": 0.6, "slot": 0.0})
    assert sum(found["src"].values()) == 0.0


def test_a_rate_is_named(clock):
    graph = PipelineBuilder("r").stage("src", quick).map("m", same, "src", executor="thread", rate="200/s").build()
    assert waits(graph, clock)["m"]["rate"] == pytest.approx(59 / 200, abs=0.02)


def test_what_the_budget_holds_back_waits_for_bytes(clock):
    def blobs(n: int):
        for _ in range(n):
            yield bytes(200_000)

    async def keep(x: bytes) -> int:
        await clock.sleep(1)
        return len(x)

    graph = PipelineBuilder("b").stage("src", blobs).map("m", keep, "src", concurrency=1).build()
    found = waits(graph, clock, memory_limit="1MiB")
    assert 40 < found["src"].get("bytes", 0.0) + found["src"].get("downstream", 0.0) <= 60


# ---------------------------------------------------------------- stages that are no streams


class Deaf:
    """A sink that listens to everything and keeps nothing."""

    def emit(self, event) -> None:
        pass


def naps_of(clock):
    async def nap(seconds: float) -> float:
        await clock.sleep(seconds)
        return seconds

    def hold(seconds: float) -> float:
        clock.block(seconds)
        return seconds

    return nap, hold


def plain_waits(graph, seconds: int, clock, *, listened: bool, **options):
    """Tens of seconds by stage and reason. Lanes measure real time: what a stage naps counts as a wait for its slot."""
    with Engine(processes=1, clock=clock, event_sinks=(Deaf(),) if listened else (), **options) as engine:
        result = engine.run(graph, {"seconds": seconds})
    assert result.success, result.error
    return {name: {why: round(s, -1) for why, s in one.wait.items() if s > 5} for name, one in result.stats.items()}


@pytest.mark.parametrize("listened", [False, True])
def test_a_plain_stage_waits_for_upstream_and_for_a_slot(clock, listened):
    nap, hold = naps_of(clock)
    graph = (
        PipelineBuilder("p")
        .stage("first", nap)
        .stage("a", hold, ["first"])
        .stage("b", hold, ["first"])
        .stage("last", nap, ["a", "b"])
        .build()
    )
    found = plain_waits(graph, 20, clock, listened=listened, threads=1)
    assert found["first"] == {"slot": 20}
    assert sorted(found[name]["slot"] for name in ("a", "b")) == [20, 40]
    assert found["a"]["upstream"] == found["b"]["upstream"] == 20
    assert found["last"] == {"upstream": 60, "slot": 20}


@pytest.mark.parametrize("listened", [False, True])
def test_a_plain_stage_names_the_limit_at_which_it_waits(clock, listened):
    _, hold = naps_of(clock)
    graph = (
        PipelineBuilder("p")
        .stage("a", hold, resources=Resources(tokens={"gpu": 1}))
        .stage("b", hold, resources=Resources(tokens={"gpu": 1}))
        .build()
    )
    found = plain_waits(graph, 20, clock, listened=listened, tokens={"gpu": 1})
    assert sorted(found.values(), key=len) == [{"slot": 20}, {"slot": 20, "token": 20}]


@pytest.mark.parametrize("listened", [False, True])
def test_a_plain_stage_that_is_tried_again_waits_for_its_delay(clock, listened):
    tries = []

    async def flaky() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("once")
        return 1

    nap, _ = naps_of(clock)
    retry = RetryConfig(max_attempts=2, base_delay_ms=20_000, jitter="none", backoff="constant")
    graph = PipelineBuilder("p").stage("first", nap).stage("flaky", flaky, ["first"], retry=retry).build()
    assert plain_waits(graph, 10, clock, listened=listened)["flaky"] == {"retry": 20, "upstream": 10}
