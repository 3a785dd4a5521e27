"""The machine on paper: it keeps its books, and the scheduler on it meets bounds that can be computed."""

import asyncio
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


def test_metg_is_where_efficiency_crosses_one_half(monkeypatch):
    bench = metg.Bench(lambda cells, loops: None, metg.grid("trivial"), speed=1e7)
    overhead = 0.0007
    monkeypatch.setattr(bench, "efficiency", lambda grain: grain / (grain + overhead))
    assert bench.metg() == pytest.approx(overhead, rel=0.1)  # by a sweep
    assert bench.metg() == pytest.approx(overhead, rel=0.1)  # from there
    overhead = 0.005
    assert bench.metg() == pytest.approx(overhead, rel=0.1)  # it has moved
    overhead = 1e-7
    assert bench.metg() < metg.GRAINS[-1]


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
    with asyncio.Runner() as runner, bare_grid(runner, 2) as run:
        assert run(cells, 9) == expected
        assert run(cells, 9) == expected
