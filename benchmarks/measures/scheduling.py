"""What a stage costs in the scheduler and the driver: S1, S2, S3, S4.

S1 to S3 are in CPU seconds of the process that runs the loop: nothing leaves it, and a neighbour on the machine does
not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

from benchmarks.graphs import CountingSink, chain, fan_out, floor, layered
from benchmarks.harness import Row, Scenario, Sides
from benchmarks.measures.common import cpu_timed, engine_on_loop, enter
from benchmarks.peers import HERE, ROOT, Service, stageflow_core

SHAPES = ("chain 1,000", "fan-out 1,000", "layered 100x100")


@lru_cache(maxsize=8)
def graph_of(shape: str) -> Any:
    """A graph by the name of its shape."""
    kind, _, size = shape.replace(",", "").partition(" ")
    if kind == "layered":
        width, _, depth = size.partition("x")
        return layered(int(width), int(depth))
    return (chain if kind == "chain" else fan_out)(int(size))


def _runs(runner: Any, engine: Any, graph: Any, sinks: Callable[[], tuple[Any, ...]]) -> Callable[[], None]:
    def once() -> None:
        result = runner.run(engine.execute(graph, event_sinks=sinks()))
        assert result.success, result.error

    return once


def _floor(runner: Any, graph: Any) -> None:
    runner.run(floor(graph.deps, graph.dependents))


def _ask_core(service: Service, asked: dict[str, Any]) -> float:
    return float(service.ask(**asked)["seconds"])


def _nobody() -> tuple[Any, ...]:
    return ()


def _counter() -> tuple[Any, ...]:
    return (CountingSink(),)


@contextmanager
def _stages(scale: float) -> Iterator[Sides]:
    sides = Sides()
    with ExitStack() as stack:
        runner, engine = stack.enter_context(engine_on_loop(processes=1))
        for shape in SHAPES:
            graph = graph_of(shape)
            repeat = 9 if len(graph) <= 1000 else 1
            sides.add(f"{shape} ours", cpu_timed(_runs(runner, engine, graph, _nobody), repeat=repeat))
            sides.add(f"{shape} sink", cpu_timed(_runs(runner, engine, graph, _counter), repeat=repeat))
            sides.add(f"{shape} floor", cpu_timed(partial(_floor, runner, graph), repeat=repeat))
            sides.notes[f"{shape} stages"] = len(graph)
        yield sides


def _large(sizes: tuple[str, str]) -> Callable[[float], Any]:
    @contextmanager
    def opened(scale: float) -> Iterator[Sides]:
        sides = Sides()
        with ExitStack() as stack:
            runner, engine = stack.enter_context(engine_on_loop(processes=1))
            for shape in sizes:
                graph = graph_of(shape)
                repeat = 15 if len(graph) <= 1000 else 1
                sides.add(f"{shape} ours", cpu_timed(_runs(runner, engine, graph, _nobody), repeat=repeat))
                sides.add(f"{shape} floor", cpu_timed(partial(_floor, runner, graph), repeat=repeat))
            yield sides

    return opened


def _growth(big: str, small: str) -> Callable[[Any], float]:
    """Cost per stage over the floor at the big size, over the same at the small one."""
    return lambda values: (
        values[f"{big} ours"] / values[f"{big} floor"] / (values[f"{small} ours"] / values[f"{small} floor"])
    )


def _core(shapes: tuple[str, ...]) -> Callable[[float], Any]:
    """The same graphs in stageflow-core, which lives in an interpreter of its own."""

    @contextmanager
    def opened(scale: float) -> Iterator[Sides]:
        sides = Sides()
        with ExitStack() as stack:
            runner, engine = stack.enter_context(engine_on_loop(processes=1))
            service = enter(stack, sides, " ".join(_side(shape, "core") for shape in shapes), stageflow_core())
            for shape in shapes:
                graph = graph_of(shape)
                sides.add(_side(shape, "ours"), cpu_timed(_runs(runner, engine, graph, _nobody), repeat=5))
                sides.add(_side(shape, "floor"), cpu_timed(partial(_floor, runner, graph), repeat=5))
                if service is not None:
                    kind = shape.partition(" ")[0]
                    asked = {"shape": kind, "size": len(graph), "width": 100}
                    sides.add(_side(shape, "core"), partial(_ask_core, service, asked))
            yield sides

    return opened


def _side(shape: str, who: str) -> str:
    return f"{shape} {who}".replace(" ", "_")


@contextmanager
def _memory(scale: float) -> Iterator[Sides]:
    """Peak resident bytes per stage, built, run, result held, over the same interpreter before the graph was built."""
    size = int(1_000_000 * scale)
    sides = Sides()

    def side(shape: str) -> Callable[[], float]:
        def ask() -> float:
            command = [sys.executable, str(HERE / "scripts" / "stage_memory.py"), shape, str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, cwd=ROOT)
            told = json.loads(done.stdout)
            sides.notes[shape] = told
            return float(told["bytes_per_stage"])

        return ask

    for shape in ("chain", "fan-out"):
        sides.add(shape, side(shape))
    yield sides


SCENARIOS = (
    Scenario(
        name="stages",
        room="scheduler",
        open=_stages,
        rounds=7,
        rows=tuple(
            Row(
                id="S1",
                what=f"{shape} stages, {what}",
                against="asyncio floor",
                over=f"{shape} {side}",
                under=f"{shape} floor",
                bar=bar,
                gate=True,
            )
            for shape in SHAPES
            for what, side, bar in (("no sink", "ours", 3.5), ("one counting sink", "sink", 4.5))
        ),
    ),
    *(
        Scenario(
            name=f"growth-{short}-{kind}",
            room="scheduler",
            open=_large((f"{kind} {size}", f"{kind} 1,000")),
            max_rounds=5,
            seconds=seconds,
            quick=False,
            rows=(
                Row(
                    id="S2",
                    what=f"{size} stages, {kind}, per stage",
                    against="ours at 1,000, each over its floor",
                    formula=_growth(f"{kind} {size}", f"{kind} 1,000"),
                    bar=1.3,
                ),
            ),
        )
        for short, size, seconds in (("100k", "100,000", 30.0), ("1M", "1,000,000", 120.0))
        for kind in ("chain", "fan-out")
    ),
    *(
        Scenario(
            name=name,
            room="scheduler",
            open=_core(shapes),
            max_rounds=rounds,
            seconds=seconds,
            quick=False,
            rows=tuple(
                Row(
                    id="S3",
                    what=f"{shape} stages{what}",
                    against="stageflow-core",
                    over=_side(shape, "core"),
                    under=_side(shape, side),
                    bar=bar,
                    at_most=False,
                )
                for shape in shapes
                for what, side, bar in (("", "ours", 15.0), (", asyncio floor (limit)", "floor", None))
            ),
        )
        for name, shapes, rounds, seconds in (
            ("stageflow-core", SHAPES[:2], 11, 40.0),
            ("stageflow-core-layered", SHAPES[2:], 5, 120.0),  # a run takes it a quarter of a minute
        )
    ),
    Scenario(
        name="stage-memory",
        room="scheduler",
        open=_memory,
        rounds=1,
        max_rounds=1,
        seconds=120.0,
        quick=False,
        rows=tuple(
            Row(
                id="S4",
                what=f"peak memory per stage, {shape} of 1,000,000",
                against="-",
                formula=itemgetter(shape),
                bar=1536.0,
                unit="bytes",
            )
            for shape in ("chain", "fan-out")
        ),
    ),
)
