"""Tokens, memory and cores shared by stages: all or nothing, in order, and at a cost that does not depend on how many
wait."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stageflow import Engine, PipelineBuilder, Resources
from stageflow.runtime.running import live_drivers
from stageflow.scheduler.admission import Admission


class Meter:
    """How many are inside at once, and in which order they came."""

    def __init__(self) -> None:
        self.inside: dict[str, float] = {}
        self.most = 0.0
        self.order: list[str] = []
        self._lock = threading.Lock()

    def stage(self, name: str, weight: float = 1.0, seconds: float = 0.002):
        async def work() -> str:
            self._enter(name, weight)
            await asyncio.sleep(seconds)
            self._leave(name)
            return name

        return work

    def _enter(self, name: str, weight: float) -> None:
        with self._lock:
            self.order.append(name)
            self.inside[name] = weight
            self.most = max(self.most, sum(self.inside.values()))

    def _leave(self, name: str) -> None:
        with self._lock:
            del self.inside[name]


def test_a_completion_costs_the_same_however_many_wait_for_the_token(monkeypatch):
    asked = []
    ask = Admission.ask

    def counted(self, *args):
        asked.append(1)
        return ask(self, *args)

    monkeypatch.setattr(Admission, "ask", counted)

    async def nothing() -> None:
        return None

    n = 2000
    builder = PipelineBuilder("shared")
    for i in range(n):
        builder.stage(f"s{i}", nothing, resources=Resources(tokens={"one": 1}))
    with Engine(processes=1, tokens={"one": 1}) as engine:
        assert engine.run(builder.build()).success
    assert n <= len(asked) <= 3 * n  # all of them asked again after each completion: two million


def test_who_needs_all_tokens_is_not_starved_by_those_who_need_one():
    meter = Meter()
    builder = PipelineBuilder("fair")
    for i in range(40):
        wants = 3 if i == 10 else 1
        builder.stage(f"s{i}", meter.stage(f"s{i}", wants), resources=Resources(tokens={"gpu": wants}))
    with Engine(processes=1, tokens={"gpu": 3}) as engine:
        assert engine.run(builder.build()).success
    assert meter.most == 3
    assert meter.order.index("s10") == 10


def test_a_higher_priority_goes_first_at_a_token():
    meter = Meter()
    builder = PipelineBuilder("urgent")
    for i in range(20):
        builder.stage(
            f"s{i}", meter.stage(f"s{i}"), resources=Resources(tokens={"gpu": 1}), priority=5 if i >= 15 else 0
        )
    with Engine(processes=1, tokens={"gpu": 1}) as engine:
        assert engine.run(builder.build()).success
    assert meter.order[:5] == [f"s{i}" for i in range(15, 20)]


def test_reserved_memory_stays_below_the_limit_and_more_than_all_of_it_runs_alone():
    meter = Meter()
    builder = PipelineBuilder("memory")
    for i in range(12):
        wants = 300 if i == 4 else 40
        builder.stage(f"s{i}", meter.stage(f"s{i}", wants), resources=Resources(memory=f"{wants}MB"))
    with Engine(processes=1, memory_limit="100MB") as engine:
        assert engine.run(builder.build()).success
        (machine,) = [driver.machine for driver in live_drivers if driver.engine is engine]
        assert (machine.promised, machine.admission.memory_used) == (0, 0)
    assert meter.most == 300  # alone
    assert meter.order.index("s4") <= 5


def test_cores_of_other_lanes_are_shared_out():
    meter = Meter()
    builder = PipelineBuilder("cores")
    for i in range(8):
        builder.stage(f"s{i}", meter.stage(f"s{i}", 0.5 + i % 2), resources=Resources(cpu=0.5 + i % 2))
    with Engine(processes=2) as engine:
        assert engine.run(builder.build()).success
    assert 1.5 <= meter.most <= 2.0


def spin(n: int) -> int:
    return sum(range(n))


def test_a_process_stage_takes_as_many_slots_as_cores():
    class Kept:
        wants_items = True

        def __init__(self):
            self.events = []

        def emit(self, event):
            self.events.append((event.type, event.stage))

    kept = Kept()
    builder = PipelineBuilder("wide", inputs={"n": int})
    for i in range(9):
        builder.stage(f"s{i}", spin, kind="transform", **({"resources": Resources(cpu=2)} if i % 3 == 1 else {}))
    with Engine(processes=2, event_sinks=(kept,)) as engine:
        result = engine.run(builder.build(), {"n": 200_000})
    assert result.success
    running: set[str] = set()
    for kind, stage in kept.events:
        if kind == "stage.started":
            running.add(stage)
        elif kind == "stage.completed":
            running.discard(stage)
        wide = [name for name in running if int(name[1:]) % 3 == 1]
        assert not wide or len(running) == 1


@pytest.mark.parametrize("stages", [30])
def test_many_runs_wait_for_one_rate_in_order(stages):
    meter = Meter()
    graph = PipelineBuilder("rate").stage("s", meter.stage("s", seconds=0.0), rate="500/s").build()

    async def main():
        async with Engine(processes=1) as engine:
            began = asyncio.get_running_loop().time()
            results = await asyncio.gather(*(engine.execute(graph) for _ in range(stages)))
            return results, asyncio.get_running_loop().time() - began

    results, took = asyncio.run(main())
    assert all(result.success for result in results)
    assert took >= (stages - 1) / 500
