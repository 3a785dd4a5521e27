"""The machine on paper: it keeps its books, and the scheduler on it meets bounds that can be computed."""

import asyncio
import random
from concurrent.futures import Future
from itertools import pairwise

import pytest

from benchmarks import metg, scale, shapes, svg
from benchmarks.executors.bare_grid import bare_grid
from benchmarks.simulated import Simulation, layout_of, lower_bound, stream_layout


@pytest.mark.parametrize("cores", [1, 3, 64])
def test_independent_tasks_of_one_length_fill_every_core(cores):
    run = Simulation(layout_of([[] for _ in range(192)]), cores, lambda stage: 0.5).run()
    assert run.finished == "completed"
    assert run.now == pytest.approx(192 / cores * 0.5)


def test_a_chain_takes_as_long_as_its_parts():
    run = Simulation(layout_of([[i - 1] if i else [] for i in range(50)]), 8, lambda stage: 0.1).run()
    assert run.now == pytest.approx(5.0)
    assert run.signals == 51


@pytest.mark.parametrize("charge", [False, True])
def test_a_stream_is_done_item_by_item(charge):
    run = Simulation(stream_layout(), 16, lambda stage: 1e-4, items=20_000, charge=charge, ahead=2).run()
    assert run.finished == "completed"
    assert run.done_items == 20_000
    assert run.work == pytest.approx(2.0)
    assert run.now >= 2.0 / 16


def test_charging_the_schedulers_own_time_makes_it_the_limit():
    free = Simulation(stream_layout(), 1024, lambda stage: 1e-5, items=20_000).run()
    charged = Simulation(stream_layout(), 1024, lambda stage: 1e-5, items=20_000, charge=True).run()
    assert charged.now >= charged.own_seconds * 0.99
    assert charged.now > free.now


def test_no_schedule_is_shorter_than_its_bound_nor_longer_than_twice():
    _, found = shapes.workflows(200, own=True)
    assert set(found) == set(shapes.NAMES)
    for deps, seconds in found.values():
        for cores in (4, 32):
            run = Simulation(layout_of(deps), cores, seconds.__getitem__).run()
            bound = lower_bound(deps, seconds, cores)
            assert bound * 0.999 <= run.now <= 2 * bound  # Graham's bound for any schedule that leaves no core idle


def test_the_whole_simulation_at_a_small_scale():
    found = scale.measure(0.01)
    assert [row.cores for row in found.tasks] == list(scale.CORES)
    assert all(0 < row.rate <= row.ideal * 1.01 for row in found.streams)
    assert all(row.over_bound >= 0.999 for row in found.shapes)
    assert scale.as_dict(found)["source"] == found.source


@pytest.mark.parametrize("pattern", metg.PATTERNS)
def test_a_pattern_depends_on_points_that_exist(pattern):
    cells = metg.grid(pattern)
    assert len(cells) == metg.STEPS
    for before, here in pairwise(cells):
        for deps in here:
            assert len(deps) <= 3
            assert all(0 <= dep < len(before) for dep in deps)
    if pattern == "trivial":
        assert not any(deps for points in cells for deps in points)
    else:
        assert all(deps for points in cells[1:] for deps in points)
    assert len(metg.engine_graph(cells)) == sum(len(points) for points in cells)


class _Simulated:
    """A system on paper: every task costs the core an overhead, and now and then a run takes much longer."""

    def __init__(self) -> None:
        self.overhead = 0.0
        self.dice = random.Random(3)
        self.lengths: set[int] = set()

    def __call__(self, cells: metg.Grid, loops: int, times: int) -> list[float]:
        self.lengths.add(loops)
        tasks = sum(len(points) for points in cells)
        took = tasks * (loops / 1e7 + self.overhead) / metg.WORKERS
        return [took * self.dice.choice((0.95, 0.97, 0.98, 1.0, 1.0, 1.0, 1.02, 1.03, 1.05, 2.0)) for _ in range(times)]


def test_metg_is_where_efficiency_crosses_one_half():
    system = _Simulated()
    bench = metg.Bench(system, metg.grid("trivial"), lambda: 1e7)
    system.overhead = 0.0007
    assert 0.0002 < bench.metg() < 0.003  # by a sweep with few runs each
    assert bench.metg() == pytest.approx(0.0007, rel=0.1)  # from there
    system.lengths.clear()
    assert bench.metg() == pytest.approx(0.0007, rel=0.1)
    assert len(system.lengths) <= 2 * metg.AROUND + 3  # and nowhere else
    system.overhead = 0.005
    assert bench.metg() == pytest.approx(0.005, rel=0.1)  # it has moved
    system.overhead = 1e-7
    assert bench.metg() < metg.GRAINS[-1]
    assert all(0 < share <= 1.1 for shares in bench.curve.values() for share in shares)


def test_a_curve_that_goes_up_and_down_crosses_one_half_once():
    noisy = [(1e-4, 0.30), (2e-4, 0.52), (4e-4, 0.44), (8e-4, 0.62), (16e-4, 0.60)]
    assert metg.rising(noisy) == [
        (1e-4, 0.30),
        (2e-4, pytest.approx(0.48)),
        (4e-4, pytest.approx(0.48)),
        (8e-4, pytest.approx(0.61)),
        (16e-4, pytest.approx(0.61)),
    ]
    assert 4e-4 < metg.crossing(noisy) < 5e-4
    assert metg.crossing(noisy) == metg.crossing(noisy[::-1])
    assert metg.crossing([(1e-4, 0.8), (2e-4, 0.9)]) == pytest.approx(1e-4 * 0.5 / 0.8)
    assert metg.crossing([(1e-4, 0.2), (2e-4, 0.25)]) == pytest.approx(4e-4)


@pytest.mark.parametrize("pattern", metg.PATTERNS)
def test_the_standard_pool_is_driven_in_the_order_of_the_grid(pattern):
    cells = metg.grid(pattern)
    log: list[tuple[int, ...]] = []

    class Pool:
        def submit(self, function, loops, *given):
            log.append(given)
            future: Future[int] = Future()
            future.set_result(function(loops, *given))
            return future

    metg.on_futures(Pool(), cells, 9)
    assert len(log) == sum(len(points) for points in cells)
    assert sorted(map(len, log)) == sorted(len(deps) for points in cells for deps in points)


def test_the_plot_has_a_line_for_every_system():
    text = svg.curves({"fft": {"ours": [(1e-4, 0.2), (1e-2, 0.9)], "peer": [(1e-3, 0.1)]}}, title="a < b")
    assert text.count("<polyline") == 2
    assert "a &lt; b" in text


def test_bare_frames_carry_the_values_that_the_tasks_give():
    cells = metg.grid("stencil_1d")
    before: list[int] = []
    expected: list[int] = []
    for points in cells:
        before = [metg.TASKS[len(deps)](9, *(before[dep] for dep in deps)) for deps in points]
        expected += before
    with asyncio.Runner() as runner, bare_grid(runner, 2) as bare:
        assert runner.run(bare.run(cells, 9)) == expected
        assert runner.run(bare.run(cells, 9)) == expected
