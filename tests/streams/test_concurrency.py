"""How many attempts a lane takes at once: the policy on recorded traces, the measurements on folders, and a run."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.runtime import monitor, switching
from stageflow.runtime.running import live_drivers
from stageflow.scheduler.concurrency import REST, Seen, Tuning, strain, tune


def play(lane: str, done_at, looks: int, *, most: int = 32, start: Tuning | None = None, **strained):
    """A lane that always has enough to do and does `done_at(slots)` a second; the sizes it took."""
    state, sizes = start or Tuning(slots=most), []
    for _ in range(looks):
        seen = Seen(done=done_at(state.slots), used=state.slots, waiting=True, **strained)
        state = tune(lane, state, seen, most)
        sizes.append(state.slots)
    return sizes, state


def test_nothing_is_lowered_while_nothing_is_strained():
    sizes, _ = play("thread", lambda slots: slots * 10.0, 100)
    assert set(sizes) == {32}


def test_threads_that_share_one_interpreter_become_few_when_few_do_as_much():
    sizes, state = play("thread", lambda slots: 100.0, 60, busy=1.0)
    assert sizes == sorted(sizes, reverse=True)
    assert state.slots == 2
    assert "one interpreter" in state.why


def test_a_step_down_that_does_less_is_taken_back_and_rests():
    sizes, state = play("thread", lambda slots: slots * 10.0, 20, busy=1.0)
    assert sizes[3:8] == [16, 16, 16, 16, 32]
    assert set(sizes[7:]) == {32}
    assert state.resting > REST - 20


def test_with_the_strain_gone_it_is_raised_for_as_long_as_that_brings_more():
    low = Tuning(slots=4)
    sizes, _ = play("async", lambda slots: min(slots, 16) * 10.0, 30, most=64, start=low)
    assert sizes[3] == 8
    assert max(sizes) == 32  # 32 did no more than 16
    assert sizes[-1] == 16
    back, _ = play("async", lambda slots: min(slots, 64) * 10.0, 60, most=64, start=low)
    assert back[-1] == 64


def test_what_was_left_as_no_better_is_tried_again_after_a_while():
    sizes, _ = play("async", lambda slots: 100.0, 3 * REST, most=64, start=Tuning(slots=16))
    assert sizes.count(32) >= 2


def test_noise_moves_nothing_down():
    noise = iter([90.0, 110.0, 95.0, 105.0] * 50)
    sizes, _ = play("async", lambda slots: next(noise), 100)
    assert set(sizes) == {32}


def test_descriptors_are_no_matter_for_proofs():
    sizes, state = play("async", lambda slots: 10.0 * slots, 3, most=1024, descriptors=0.95)
    assert sizes == [512, 256, 128]
    assert "descriptors" in state.why


def test_an_idle_lane_goes_back_to_what_it_may_have():
    state = Tuning(slots=4)
    for _ in range(3):
        state = tune("thread", state, Seen(done=1.0, used=1, waiting=False), 32)
    assert state.slots == 32


def test_every_strain_has_its_reason():
    def seen(**more):
        return Seen(done=1.0, used=4, waiting=True, **more)

    assert strain("async", seen(lag=0.3)) == "the event loop was 300 ms late"
    assert strain("thread", seen(lag=0.3)) == ""
    assert "CPU quota" in strain("thread", seen(throttled=0.5))
    assert strain("thread", seen(busy=1.9)) == ""  # they give the interpreter away
    assert strain("async", seen(busy=1.0)) == ""


def test_the_quota_is_read_from_both_versions(tmp_path):
    sources = monitor.Sources(cgroup=str(tmp_path / "cgroup"), proc=str(tmp_path / "proc"))
    assert monitor.throttled(sources) == 0.0
    one = tmp_path / "cgroup/cpu/cpu.stat"
    one.parent.mkdir(parents=True)
    one.write_text("nr_periods 10\nnr_throttled 3\nthrottled_time 2500000000\n")
    assert monitor.throttled(sources) == 2.5
    (tmp_path / "cgroup/cpu.stat").write_text("usage_usec 5\nnr_throttled 3\nthrottled_usec 1500000\n")
    assert monitor.throttled(sources) == 1.5


def spin(x: int) -> int:
    until = time.thread_time() + 0.004
    while time.thread_time() < until:
        pass
    return x


def endless(n: int):
    yield from range(n)


def run(monkeypatch, n: int, **options):
    """CPU-bound Python in threads, looked at often; the smallest number of slots, and those after the run."""
    monkeypatch.setattr("stageflow.scheduler.concurrency.ONE_INTERPRETER", (0.0, 99.0))  # also on a busy machine
    monkeypatch.setattr("stageflow.runtime.monitor.EVERY", 0.04)
    monkeypatch.setattr("stageflow.runtime.tuner.SHORTEST", 0.03)
    graph = (
        PipelineBuilder("busy").stage("src", endless).map("spin", spin, "src", executor="thread", kind="work").build()
    )
    slots = []

    async def main():
        async with Engine(processes=1, threads=16, **options) as engine:
            running = asyncio.ensure_future(engine.execute(graph, {"n": n}))
            while not running.done():
                await asyncio.wait([running], timeout=0.01)
                slots.extend(d.machine.lanes["thread"].slots for d in live_drivers if d.engine is engine)
            result = await running
            assert result.success
            assert len(result.data("spin")) == n
            return [d.machine.lanes["thread"].slots for d in live_drivers if d.engine is engine]

    after = asyncio.run(main())
    return min(slots), after


def test_a_run_lowers_its_threads_and_the_next_one_has_them_all(monkeypatch):
    least, after = run(monkeypatch, 500)
    assert least < 16
    assert after == [16]


def test_it_can_be_switched_off(monkeypatch):
    assert run(monkeypatch, 200, adaptive=False) == (16, [16])


def interval(x: int) -> float:
    return sys.getswitchinterval()


def broken(x: int) -> float:
    raise ValueError("no")


@pytest.fixture
def usual():
    before = sys.getswitchinterval()
    yield before
    sys.setswitchinterval(before)


@pytest.mark.parametrize("runner", [interval, broken])
def test_switches_are_quick_while_a_thread_stage_runs_and_as_before_after_it(usual, runner):
    graph = PipelineBuilder("w", inputs={"x": int}).stage("s", runner, executor="thread").build()
    with Engine(processes=1, switch_interval=0.001) as engine:
        result = engine.run(graph, {"x": 1})
        assert sys.getswitchinterval() == usual
    if runner is interval:
        assert result.data("s") == pytest.approx(0.001)
    else:
        assert not result.success


def test_the_shortest_of_two_runs_counts_and_a_setting_of_ones_own_stays(usual):
    switching.enter(0.002)
    switching.enter(0.001)
    assert sys.getswitchinterval() == pytest.approx(0.001)
    switching.leave(0.001)
    assert sys.getswitchinterval() == pytest.approx(0.002)
    sys.setswitchinterval(0.003)
    switching.leave(0.002)
    assert sys.getswitchinterval() == pytest.approx(0.003)


def test_switches_are_left_alone_without_thread_stages_and_where_told_so(usual):
    for lane, options in (("async", {}), ("thread", {"switch_interval": None})):
        graph = PipelineBuilder("w", inputs={"x": int}).stage("s", interval, executor=lane).build()
        with Engine(processes=1, **options) as engine:
            assert engine.run(graph, {"x": 1}).data("s") == usual
