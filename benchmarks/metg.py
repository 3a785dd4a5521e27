"""The minimum effective task granularity after Task Bench (Slaughter et al., SC20).

A pattern is a grid of `WIDTH` points over `STEPS` steps; a task burns a fixed amount of CPU and hands a small value to
the tasks of the next step that depend on it. Efficiency is the time that bare loops on all cores would take over the
time that the system takes; METG(50 %) is the task length, in seconds, at which it falls to one half. Shorter is better:
below it a system spends most of the machine on itself.

May not import: any peer at import time.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Final

from benchmarks.executors.bare_grid import bare_grid
from benchmarks.harness import Row, Scenario, Sides
from benchmarks.measures.common import engine_on_loop, enter, standard_pool
from benchmarks.peers import WORKERS, dask_here
from benchmarks.work import burn, loops_per_second
from stageflow import PipelineBuilder, StageKind

PATTERNS: Final = ("trivial", "no_comm", "stencil_1d", "fft", "tree", "random")
WIDTH: Final = 8
STEPS: Final = 8
#: task lengths tried, in seconds, longest first
GRAINS: Final = tuple(0.032 / 2**k for k in range(13))
#: least wall time of one measurement: shorter ones are repeated
LEAST_SECONDS: Final = 0.03

Grid = list[list[tuple[int, ...]]]


def grid(pattern: str, width: int = WIDTH, steps: int = STEPS) -> Grid:
    """For each step, for each point: the points of the step before that it depends on."""
    dice = random.Random(5)
    made: Grid = []
    for step in range(steps):
        here = min(width, 2**step) if pattern == "tree" else width
        before = len(made[-1]) if made else 0
        made.append([_deps(pattern, step, point, before, dice) for point in range(here)])
    return made


def _deps(pattern: str, step: int, point: int, before: int, dice: random.Random) -> tuple[int, ...]:
    if step == 0 or pattern == "trivial":
        return ()
    if pattern == "no_comm":
        return (point,)
    if pattern == "stencil_1d":
        return tuple(other for other in (point - 1, point, point + 1) if 0 <= other < before)
    if pattern == "fft":
        stride = 2 ** ((step - 1) % max(1, int(math.log2(before))))
        return tuple(other for other in (point - stride, point, point + stride) if 0 <= other < before)
    if pattern == "tree":
        return (point // 2,) if before < WIDTH else (point,)
    return tuple(sorted(dice.sample(range(before), dice.randint(1, min(3, before)))))


def task0(loops: int) -> int:
    """A task without dependencies."""
    return burn(loops) & 7


def task1(loops: int, a: int) -> int:
    """A task with one."""
    return (burn(loops) + a) & 7


def task2(loops: int, a: int, b: int) -> int:
    """A task with two."""
    return (burn(loops) + a + b) & 7


def task3(loops: int, a: int, b: int, c: int) -> int:
    """A task with three."""
    return (burn(loops) + a + b + c) & 7


TASKS: Final[tuple[Callable[..., int], ...]] = (task0, task1, task2, task3)


def engine_graph(cells: Grid) -> Any:
    """The grid as a graph of process stages, each in a hand-over of its own."""
    builder = PipelineBuilder("task bench", inputs={"loops": int})
    for step, points in enumerate(cells):
        for point, deps in enumerate(points):
            names = dict(zip("abc", (f"t{step - 1}_{dep}" for dep in deps), strict=False))
            builder.stage(
                f"t{step}_{point}",
                TASKS[len(deps)],
                inputs=names,
                kind=StageKind.TRANSFORM,
                executor="process",
                fuse=False,
            )
    return builder.build()


def on_futures(pool: ProcessPoolExecutor, cells: Grid, loops: int) -> None:
    """The grid on the standard pool, by hand: a task is submitted when the last of its dependencies is done."""
    values: dict[tuple[int, int], int] = {}
    left: dict[tuple[int, int], int] = {}
    dependents: dict[tuple[int, int], list[tuple[int, int]]] = {}
    ready: deque[tuple[int, int]] = deque()
    for step, points in enumerate(cells):
        for point, deps in enumerate(points):
            left[step, point] = len(deps)
            for dep in deps:
                dependents.setdefault((step - 1, dep), []).append((step, point))
            if not deps:
                ready.append((step, point))
    running: dict[Future[int], tuple[int, int]] = {}
    while ready or running:
        while ready:
            step, point = ready.popleft()
            deps = cells[step][point]
            given = [values[step - 1, dep] for dep in deps]
            running[pool.submit(TASKS[len(deps)], loops, *given)] = (step, point)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell = running.pop(future)
            values[cell] = future.result()
            for dependent in dependents.get(cell, ()):
                left[dependent] -= 1
                if left[dependent] == 0:
                    ready.append(dependent)


def on_dask(client: Any, cells: Grid, loops: int) -> None:
    """The grid on dask.distributed: futures as arguments."""
    before: list[Any] = []
    made: list[Any] = []
    for points in cells:
        here = [
            client.submit(TASKS[len(deps)], loops, *[before[dep] for dep in deps], pure=False, priority=0)
            for deps in points
        ]
        made.extend(here)
        before = here
    client.gather(made)


class Bench:
    """Efficiency of one system on one pattern at one task length."""

    def __init__(self, run: Callable[[Grid, int], None], cells: Grid, speed: float, workers: int = WORKERS) -> None:
        self.run = run
        self.cells = cells
        self.speed = speed
        self.tasks = sum(len(points) for points in cells)
        self.workers = workers
        self.curve: dict[float, list[float]] = {}
        self.found: float | None = None

    def ideal(self, grain: float) -> float:
        """Seconds on bare cores. A tree is narrower than the machine at its root."""
        return (
            sum(-(-len(points) // self.workers) * grain for points in self.cells)
            if self._narrow
            else (self.tasks * grain / self.workers)
        )

    @property
    def _narrow(self) -> bool:
        return any(len(points) < self.workers for points in self.cells)

    def efficiency(self, grain: float) -> float:
        """One measurement; kept in `curve`."""
        loops = max(1, int(grain * self.speed))
        spent, times = 0.0, []
        while spent < LEAST_SECONDS:
            began = time.perf_counter()
            self.run(self.cells, loops)
            times.append(time.perf_counter() - began)
            spent += times[-1]
        found = self.ideal(grain) / sorted(times)[len(times) // 2]
        self.curve.setdefault(grain, []).append(found)
        return found

    def metg(self) -> float:
        """Task length in seconds at which efficiency crosses one half. The first call sweeps all of GRAINS, for the
        curve; later ones look around where the last one found it."""
        if self.found is None:
            return self._sweep()
        near = min(range(len(GRAINS)), key=lambda i: abs(math.log(GRAINS[i] / (self.found or 1.0))))
        at = {near: self.efficiency(GRAINS[near])}
        step = -1 if at[near] < 0.5 else 1  # towards longer tasks, or shorter ones
        here = near
        while (at[here] < 0.5) == (step < 0) and 0 <= here + step < len(GRAINS):
            here += step
            at[here] = self.efficiency(GRAINS[here])
        self.found = _crossing([(GRAINS[i], at[i]) for i in at])
        return self.found

    def _sweep(self) -> float:
        points = []
        for grain in GRAINS:
            points.append((grain, self.efficiency(grain)))
            if points[-1][1] < 0.1 and len(points) > 2:
                break
        self.found = _crossing(points)
        return self.found


def _crossing(points: Sequence[tuple[float, float]]) -> float:
    """Where a curve of (seconds, efficiency) crosses one half, interpolated on the logarithm of the seconds.

    Beyond its ends, efficiency is taken to be proportional to the task length.
    """
    ordered = sorted(points, reverse=True)
    for (longer, high), (shorter, low) in pairwise(ordered):
        if high >= 0.5 > low:
            share = (high - 0.5) / (high - low)
            return math.exp(math.log(longer) + share * (math.log(shorter) - math.log(longer)))
    grain, share = ordered[-1] if ordered[-1][1] >= 0.5 else ordered[0]
    return grain * 0.5 / max(share, 1e-6)


@contextmanager
def _open(scale: float) -> Iterator[Sides]:
    sides = Sides()
    patterns = PATTERNS if scale >= 1 else ("stencil_1d",)
    with ExitStack() as stack:
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))
        graphs: dict[int, Any] = {}

        def on_engine(cells: Grid, loops: int) -> None:
            graph = graphs.get(id(cells))
            if graph is None:
                graph = graphs[id(cells)] = engine_graph(cells)
            result = runner.run(engine.execute(graph, {"loops": loops}))
            assert result.success, result.error

        pool = stack.enter_context(standard_pool())
        client = None
        if scale >= 1:
            lost = " ".join(f"{pattern}/dask" for pattern in patterns)
            client = enter(stack, sides, lost, dask_here())
        speed = _speed(pool)
        systems: dict[str, Callable[[Grid, int], None]] = {
            "stageflow": on_engine,
            "ppe": lambda cells, loops: on_futures(pool, cells, loops),
            "bare": stack.enter_context(bare_grid(runner, WORKERS)),
        }
        if client is not None:
            systems["dask"] = lambda cells, loops: on_dask(client, cells, loops)
        benches: dict[str, Bench] = {}
        for pattern in patterns:
            cells = grid(pattern)
            for system, run in systems.items():
                bench = benches[f"{pattern}/{system}"] = Bench(run, cells, speed)
                sides.add(f"{pattern}/{system}", bench.metg)

        def keep_curves() -> None:
            sides.notes["curves"] = {
                name: [[grain, sorted(found)[len(found) // 2]] for grain, found in sorted(bench.curve.items())]
                for name, bench in benches.items()
            }

        sides.at_end.append(keep_curves)
        yield sides


def _speed(pool: ProcessPoolExecutor) -> float:
    """Loops per second of one of as many bare loops as there are workers: what the machine attains right now."""
    guess = loops_per_second()
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        list(pool.map(burn, [int(guess * 0.1)] * WORKERS))
        best = max(best, int(guess * 0.1) / (time.perf_counter() - began))
    return best


SCENARIOS = (
    Scenario(
        name="metg",
        room="executors",
        open=_open,
        rounds=5,
        max_rounds=5,
        seconds=200.0,
        rows=tuple(
            Row(
                id="M1",
                what=f"METG(50 %), {pattern}",
                against=label,
                over=f"{pattern}/stageflow",
                under=f"{pattern}/{peer}",
                bar=bar,
            )
            for label, peer, bar in (("concurrent.futures", "ppe", 0.25), ("Dask", "dask", 0.02))
            for pattern in PATTERNS
        )
        + tuple(
            Row(
                id="M1",
                what=f"METG(50 %), {pattern}, bare frames, no engine (limit)",
                against=label,
                over=f"{pattern}/bare",
                under=f"{pattern}/{peer}",
            )
            for label, peer in (("concurrent.futures", "ppe"), ("Dask", "dask"))
            for pattern in PATTERNS
        ),
    ),
)
