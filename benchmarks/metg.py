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
from asyncio import Runner
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from queue import SimpleQueue
from statistics import median, median_low
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
#: task lengths that may be tried, in seconds, longest first: two in each octave
GRAINS: Final = tuple(0.032 / 2 ** (k / 2) for k in range(25))
#: so many lengths on either side of what was found before are measured in a round, each in so many passes
AROUND: Final = 2
PASSES: Final = 3
DASK_PASSES: Final = 1  #: its runs take ten times as long
#: what the runs of one length and pass would take at half the ideal speed, and how many they are at most
LEAST_SECONDS: Final = 0.03
MOST_RUNS: Final = 16

Grid = list[list[tuple[int, ...]]]
#: runs a grid of tasks of so many loops, so many times; the wall seconds of each
System = Callable[[Grid, int, int], list[float]]


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
    """The grid on the standard pool, by hand: a task is submitted when the last of its dependencies is done, of which
    the pool's own callback tells (`wait` would look at all that are running each time)."""
    values: dict[tuple[int, int], int] = {}
    left: dict[tuple[int, int], int] = {}
    dependents: dict[tuple[int, int], list[tuple[int, int]]] = {}
    ready: list[tuple[int, int]] = []
    for step, points in enumerate(cells):
        for point, deps in enumerate(points):
            left[step, point] = len(deps)
            for dep in deps:
                dependents.setdefault((step - 1, dep), []).append((step, point))
            if not deps:
                ready.append((step, point))
    done: SimpleQueue[Future[int]] = SimpleQueue()
    running: dict[Future[int], tuple[int, int]] = {}

    def submit(step: int, point: int) -> None:
        deps = cells[step][point]
        future = pool.submit(TASKS[len(deps)], loops, *[values[step - 1, dep] for dep in deps])
        running[future] = (step, point)
        future.add_done_callback(done.put)

    for cell in ready:
        submit(*cell)
    while running:
        future = done.get()
        cell = running.pop(future)
        values[cell] = future.result()
        for dependent in dependents.get(cell, ()):
            left[dependent] -= 1
            if left[dependent] == 0:
                submit(*dependent)


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


def in_turn(run: Callable[[Grid, int], Any]) -> System:
    """A system that is called and has done it when it returns."""

    def many(cells: Grid, loops: int, times: int) -> list[float]:
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            run(cells, loops)
            taken.append(time.perf_counter() - began)
        return taken

    return many


def on_loop(runner: Runner, run: Callable[[Grid, int], Coroutine[Any, Any, Any]]) -> System:
    """A system that is awaited: by a program whose loop is running already, as any is that has something to await."""

    async def many(cells: Grid, loops: int, times: int) -> list[float]:
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            await run(cells, loops)
            taken.append(time.perf_counter() - began)
        return taken

    return lambda cells, loops, times: runner.run(many(cells, loops, times))


class Bench:
    """Efficiency of one system on one pattern by task length. `speed` gives the loops per second of a bare loop on each
    core, and is asked anew by every `metg`: what the cores attain changes from minute to minute."""

    def __init__(self, run: System, cells: Grid, speed: Callable[[], float], *, passes: int = PASSES) -> None:
        self.run = run
        self.cells = cells
        self.speed = speed
        self.passes = passes
        self.tasks = sum(len(points) for points in cells)
        self.workers = WORKERS
        self.curve: dict[float, list[float]] = {}
        self.found: list[float] = []

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

    def efficiencies(self, grains: Sequence[float], speed: float, passes: int) -> list[float]:
        """The efficiency at each length: of its runs' median. Each pass goes through all lengths, so that what happens
        meanwhile happens to all of them. Kept in `curve`."""
        times: list[list[float]] = [[] for _ in grains]
        for _ in range(passes):
            for grain, taken in zip(grains, times, strict=True):
                count = max(2, round(LEAST_SECONDS / (2.0 * self.ideal(grain))))
                taken += self.run(self.cells, max(1, int(grain * speed)), min(count, MOST_RUNS))
        found = [self.ideal(grain) / median_low(taken) for grain, taken in zip(grains, times, strict=True)]
        for grain, share in zip(grains, found, strict=True):
            self.curve.setdefault(grain, []).append(share)
        return found

    def metg(self) -> float:
        """Task length in seconds at which efficiency crosses one half. The first call sweeps every other of GRAINS, for
        the curve; later ones measure the lengths around what was found so far, and go on where it is not between."""
        speed = self.speed()
        if not self.found:
            swept: list[tuple[float, float]] = []
            for grain in GRAINS[::2]:
                swept += [(grain, *self.efficiencies([grain], speed, 1))]
                if swept[-1][1] < 0.1 and len(swept) > 2:
                    break
            self.found.append(crossing(swept))
            return self.found[-1]
        middle = math.log(median(self.found[1:] or self.found))
        near = min(range(len(GRAINS)), key=lambda at: abs(math.log(GRAINS[at]) - middle))
        first, last = max(0, near - AROUND), min(len(GRAINS) - 1, near + AROUND)
        grains = GRAINS[first : last + 1]
        points = list(zip(grains, self.efficiencies(grains, speed, self.passes), strict=True))
        while last + 1 < len(GRAINS) and rising(points)[0][1] >= 0.5:
            last += 1
            points += [(GRAINS[last], *self.efficiencies([GRAINS[last]], speed, self.passes))]
        while first and rising(points)[-1][1] < 0.5:
            first -= 1
            points += [(GRAINS[first], *self.efficiencies([GRAINS[first]], speed, self.passes))]
        self.found.append(crossing(points))
        return self.found[-1]


def rising(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The nearest curve (least squares) that nowhere falls as tasks get longer, shortest first: where measured ones go
    up and down, that is noise, and the first of several crossings would be a matter of luck."""
    blocks: list[tuple[float, list[float]]] = []  # mean, grains
    for grain, share in sorted(points):
        mean, grains = share, [grain]
        while blocks and blocks[-1][0] >= mean:
            before, others = blocks.pop()
            mean = (before * len(others) + mean * len(grains)) / (len(others) + len(grains))
            grains = others + grains
        blocks.append((mean, grains))
    return [(grain, mean) for mean, grains in blocks for grain in grains]


def crossing(points: Sequence[tuple[float, float]]) -> float:
    """Where the rising curve through points of (seconds, efficiency) crosses one half, interpolated on the logarithm of
    the seconds.

    Beyond its ends, efficiency is taken to be proportional to the task length.
    """
    ordered = rising(points)
    for (shorter, low), (longer, high) in pairwise(ordered):
        if low < 0.5 <= high:
            share = (0.5 - low) / (high - low)
            return math.exp(math.log(shorter) + share * (math.log(longer) - math.log(shorter)))
    grain, share = ordered[0] if ordered[0][1] >= 0.5 else ordered[-1]
    return grain * 0.5 / max(share, 1e-6)


def _engine_system(runner: Runner, engine: Any) -> System:
    graphs: dict[int, Any] = {}

    async def execute(cells: Grid, loops: int) -> None:
        graph = graphs.get(id(cells))
        if graph is None:
            graph = graphs[id(cells)] = engine_graph(cells)
        result = await engine.execute(graph, {"loops": loops})
        assert result.success, result.error

    return on_loop(runner, execute)


def _add(sides: Sides, systems: Mapping[str, System], patterns: Sequence[str], pool: ProcessPoolExecutor) -> None:
    """A side for every system and pattern."""
    benches: dict[str, Bench] = {}
    for pattern in patterns:
        cells = grid(pattern)
        for system, run in systems.items():
            passes = DASK_PASSES if system == "dask" else PASSES
            bench = benches[f"{pattern}/{system}"] = Bench(run, cells, lambda: _speed(pool), passes=passes)
            sides.add(f"{pattern}/{system}", bench.metg)

    def keep_curves() -> None:
        sides.notes["curves"] = {
            name: [[grain, median(found)] for grain, found in sorted(bench.curve.items())]
            for name, bench in benches.items()
        }

    sides.at_end.append(keep_curves)


@contextmanager
def _open(scale: float) -> Iterator[Sides]:
    sides = Sides()
    patterns = PATTERNS if scale >= 1 else ("stencil_1d",)
    with ExitStack() as stack:
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))
        pool = stack.enter_context(standard_pool())
        bare = stack.enter_context(bare_grid(runner, WORKERS))
        systems = {
            "stageflow": _engine_system(runner, engine),
            "ppe": in_turn(lambda cells, loops: on_futures(pool, cells, loops)),
            "bare": on_loop(runner, bare.run),
        }
        _add(sides, systems, patterns, pool)
        yield sides


@contextmanager
def _open_dask(scale: float) -> Iterator[Sides]:
    """Apart from the others: its processes look round a hundred times a second also while they have nothing to do."""
    sides = Sides()
    with ExitStack() as stack:
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))
        pool = stack.enter_context(standard_pool())
        client = enter(stack, sides, " ".join(f"{pattern}/dask" for pattern in PATTERNS), dask_here())
        systems = {"stageflow": _engine_system(runner, engine)}
        if client is not None:
            systems["dask"] = in_turn(lambda cells, loops: on_dask(client, cells, loops))
            _add(sides, systems, PATTERNS, pool)
        yield sides


def _speed(pool: ProcessPoolExecutor) -> float:
    """Loops per second of one of as many bare loops as there are workers: what the machine attains right now."""
    loops = int(loops_per_second(1) * 0.03)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        list(pool.map(burn, [loops] * WORKERS))
        took.append(time.perf_counter() - began)
    return loops / median(took)


def _rows(peer: str, against: str, bar: float | None, system: str = "stageflow", more: str = "") -> tuple[Row, ...]:
    return tuple(
        Row(
            id="M1",
            what=f"METG(50 %), {pattern}{more}",
            against=against,
            over=f"{pattern}/{system}",
            under=f"{pattern}/{peer}",
            bar=bar,
        )
        for pattern in PATTERNS
    )


SCENARIOS = (
    Scenario(
        name="metg",
        room="executors",
        open=_open,
        rounds=8,
        max_rounds=8,
        seconds=160.0,
        rows=_rows("ppe", "concurrent.futures", 0.25)
        + _rows("ppe", "concurrent.futures", None, "bare", ", bare frames, no engine (limit)"),
    ),
    Scenario(
        name="metg-dask",
        room="executors",
        open=_open_dask,
        rounds=5,
        max_rounds=5,
        seconds=120.0,
        quick=False,
        rows=_rows("dask", "Dask", 0.02),
    ),
)
