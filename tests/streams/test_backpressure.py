"""Policies on views, the ladder on recorded traces, the monitor on folders, the watchdog on a loop that is held up."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.runtime import monitor
from stageflow.runtime.running import live_drivers
from stageflow.scheduler.backpressure import (
    Ladder,
    LadderState,
    Reading,
    View,
    admit,
    climb,
    countable,
    pull_bytes,
    pull_count,
    share,
    strictest,
)

MIB = 1 << 20


def view(**changes):
    fields = {
        "what": "start", "stage": "s", "limit": 100, "live": 0, "promised": 0, "need": 10, "waiting": 1,
        "running": 1, "level": 0, "depth": 0.0,
    }  # fmt: skip
    return View(**{**fields, **changes})


def test_a_task_waits_for_bytes_and_a_deeper_one_may_use_more():
    assert admit(view(live=55)) is None
    assert admit(view(live=66)) == "bytes"
    assert admit(view(live=66, depth=1.0)) is None
    assert admit(view(live=85, promised=6, depth=1.0)) == "bytes"
    assert admit(view(limit=0, live=10**12)) is None
    assert [share(d) for d in (0.0, 0.5, 1.0)] == pytest.approx([0.65, 0.725, 0.8])


def test_under_memory_pressure_only_what_adds_nothing_starts():
    assert admit(view(level=2)) == "memory"
    assert admit(view(level=2, need=0)) is None
    assert admit(view(level=1)) is None


def test_sources_are_asked_for_what_fits_into_half_of_the_limit():
    assert pull_bytes(1000, 300, 100) == 100
    assert pull_count(50, 10.0, 100, 1000) == (10, 100)
    assert pull_count(50, 0.0, 500, 1000) == (50, 125)
    assert pull_count(50, 10.0, 0, 1000) == (0, 0)
    assert pull_count(50, 600.0, 500, 1000) == (0, 0)
    assert pull_count(50, 10.0, -5, 0) == (50, 0)


def test_what_heaps_keep_is_left_out_of_the_budget():
    assert countable(0) == 0
    assert countable(4 * MIB) == 3 * MIB
    assert countable(128 * MIB) == 96 * MIB
    assert countable(1024 * MIB) == (1024 - 32) * MIB


def test_a_policy_of_ones_own_is_asked_after_ours():
    def picky(seen: View) -> str | None:
        return "full moon" if seen.stage == "s" else None

    assert strictest((picky,), view()) == "full moon"
    assert strictest((picky,), view(live=1000)) == "bytes"
    assert strictest((picky,), view(stage="t")) is None


def trace(*fractions, every=1.0, stalled=()):
    state, levels = LadderState(), []
    for i, fraction in enumerate(fractions):
        pressed = stalled[i] if i < len(stalled) else 0.0
        state = climb(state, Reading(at=i * every, used=int(fraction * 1000), total=1000, stalled=pressed), Ladder())
        levels.append(state.level)
    return levels


def test_the_ladder_goes_up_at_once_and_down_with_slack():
    assert trace(0.5, 0.81, 0.87, 0.91, 0.96) == [0, 1, 2, 3, 4]
    assert trace(0.91, 0.86, 0.84, 0.82, 0.76, 0.74) == [3, 3, 2, 2, 1, 0]


def test_a_wobble_around_a_step_does_not_flap():
    levels = trace(*[0.79, 0.81] * 15)
    assert levels == [0] + [1] * 29


def test_nothing_stays_paused_for_ever_and_the_rest_is_kept():
    levels = trace(*[0.88] * 45)
    assert levels[:31] == [2] * 31
    assert levels[31:36] == [0] * 5
    assert levels[40] == 2


def test_what_is_about_to_fail_ignores_the_rest():
    assert trace(*[0.88] * 33, 0.96)[-1] == 4


def test_stalls_count_before_memory_is_used_up():
    assert trace(0.5, 0.5, 0.5, 0.5, stalled=(0.0, 0.4, 0.2, 0.05)) == [0, 2, 2, 0]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def folders(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    700 kB\n")
    return monitor.Sources(cgroup=str(tmp_path / "cgroup"), proc=str(tmp_path / "proc"))


def test_without_a_container_the_machine_counts(folders):
    assert monitor.memory(folders) == (300 * 1024, 1000 * 1024)


def test_the_tightest_cgroup_above_us_counts_and_its_page_cache_does_not(folders, tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "cgroup/a/memory.max", "1000\n")
    write(tmp_path / "cgroup/a/memory.current", "900\n")
    write(tmp_path / "cgroup/a/memory.stat", "anon 5\ninactive_file 300\n")
    write(tmp_path / "cgroup/a/b/memory.max", "max\n")
    write(tmp_path / "cgroup/a/b/memory.current", "10\n")
    assert monitor.memory(folders) == (600, 1000)


def test_version_one_is_read_too(folders, tmp_path):
    write(tmp_path / "cgroup/memory/memory.limit_in_bytes", "1000\n")
    write(tmp_path / "cgroup/memory/memory.usage_in_bytes", "950\n")
    write(tmp_path / "cgroup/memory/memory.stat", "total_inactive_file 50\n")
    assert monitor.memory(folders) == (900, 1000)


def test_stalls_come_from_our_cgroup_first(folders, tmp_path):
    write(tmp_path / "proc/pressure/memory", "some avg10=9.00 avg60=0\nfull avg10=4.00 avg60=0 total=1\n")
    assert monitor.stalled(folders) == pytest.approx(0.04)
    write(tmp_path / "cgroup/memory.pressure", "full avg10=50.00 avg60=0 total=1\n")
    assert monitor.stalled(folders) == pytest.approx(0.5)


def test_the_victim_is_the_youngest_of_the_stage_most_over_its_estimate():
    listed = [
        monitor.Suspect(1, "a", 1.0, 500),
        monitor.Suspect(2, "b", 2.0, 900),
        monitor.Suspect(3, "b", 3.0, 100),
        monitor.Suspect(4, "a", 9.0, 0),
    ]
    assert monitor.victim(listed).pid == 3
    assert monitor.victim([]) is None


class Kept:
    wants_items = False

    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(event)


def endless(n: int):
    yield from range(n)


async def lingering(x: int) -> int:
    await asyncio.sleep(0.002)
    return x


def test_a_run_under_pressure_says_so_slows_down_and_still_ends(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 120 kB\n")
    sink = Kept()
    graph = PipelineBuilder("p").stage("src", endless).map("lingering", lingering, "src", concurrency=1).build()

    async def main():
        async with Engine(processes=1, event_sinks=(sink,)) as engine:
            engine._state()
            (watcher, *_) = next(d for d in live_drivers if d.engine is engine).watchers
            watcher.sources = monitor.Sources(cgroup=str(tmp_path / "no"), proc=str(tmp_path / "proc"))
            return await engine.execute(graph, {"n": 300})

    result = asyncio.run(main())
    assert result.success, result.error
    assert len(result.data("lingering")) == 300
    entered = [event for event in sink.events if event.type == "backpressure.entered"]
    assert entered
    assert entered[0].data == {"reason": "memory", "level": 2}
    assert [event.type for event in sink.events if event.type == "backpressure.left"] == []


async def holds(x: int) -> int:
    until = time.thread_time() + 1.0  # a wait for a core is nobody's fault
    while time.thread_time() < until:
        pass
    return x


def test_a_stage_that_holds_the_loop_is_named_with_its_stack(caplog):
    sink = Kept()
    graph = PipelineBuilder("w").stage("holds", holds).build()
    with Engine(processes=1, event_sinks=(sink,)) as engine:
        assert engine.run(graph, {"x": 1}).success
    found = [event for event in sink.events if event.type == "stage.blocked_loop"]
    assert [event.stage for event in found] == ["holds"]
    assert "time.thread_time() < until" in found[0].data["stack"]
    assert "has blocked the event loop" in caplog.text


def test_a_policy_given_to_the_engine_is_asked():
    asked = []

    def note(seen: View) -> str | None:
        asked.append((seen.what, seen.stage))
        return None

    graph = PipelineBuilder("p").stage("src", endless).map("lingering", lingering, "src").build()
    with Engine(processes=1, backpressure=(note,)) as engine:
        assert engine.run(graph, {"n": 20}).success
    assert ("pull", "src") in asked


def test_a_policy_that_always_says_wait_slows_down_and_cannot_stop_a_run():
    def never(seen: View) -> str | None:
        return "full moon"

    graph = PipelineBuilder("p").stage("src", endless).map("lingering", lingering, "src").build()
    with Engine(processes=1, backpressure=(never,)) as engine:
        result = engine.run(graph, {"n": 20})
    assert result.success
    assert len(result.data("lingering")) == 20


def test_the_reason_of_a_policy_is_where_the_stage_waited():
    def one_at_a_time(seen: View) -> str | None:
        return "full moon" if seen.what == "start" and seen.stage == "lingering" and seen.running else None

    graph = (
        PipelineBuilder("p")
        .stage("src", endless)
        .map("lingering", lingering, "src")
        .map("next", lingering, "lingering")
        .build()
    )
    with Engine(processes=1, backpressure=(one_at_a_time,)) as engine:
        result = engine.run(graph, {"n": 20})
    assert result.success
    assert result.stats["lingering"].wait["full moon"] > 0.0


def hoard(folder: str, megabytes: int, seconds: float, meminfo: str, times: int) -> int:
    """Holds that much, so that memory is short, for that long; a file for each time it was begun."""
    held = bytearray(b"x" * (megabytes * MIB))
    names = sorted(os.listdir(folder))
    with open(os.path.join(folder, f"{len(names)}-{os.getpid()}"), "w"):
        pass
    if len(names) < times:
        with open(meminfo, "w") as file:
            file.write("MemTotal: 1000 kB\nMemAvailable: 30 kB\n")
        time.sleep(seconds)
    return len(held)


@pytest.mark.parametrize("short_for", ["once", "ever"])
def test_a_task_is_ended_for_memory_once_and_the_second_time_fails_with_what_it_needed(
    short_for, tmp_path, monkeypatch
):
    monkeypatch.setattr(monitor, "BETWEEN_KILLS", 0.3)
    monkeypatch.setattr(monitor, "EVERY", 0.05)
    folder = tmp_path / "begun"
    folder.mkdir()
    meminfo = tmp_path / "proc/meminfo"
    write(meminfo, "MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    graph = PipelineBuilder("m").stage("hoard", hoard, kind="transform").build()

    class Relief(Kept):
        def emit(self, event):
            super().emit(event)
            if event.type == "worker.lost":
                write(meminfo, "MemTotal: 1000 kB\nMemAvailable: 900 kB\n")

    sink = Relief()

    async def main():
        async with Engine(processes=1, event_sinks=(sink,)) as engine:
            engine._state()
            (watcher, *_) = next(d for d in live_drivers if d.engine is engine).watchers
            watcher.sources = monitor.Sources(cgroup=str(tmp_path / "no"), proc=str(tmp_path / "proc"))
            given = {"folder": str(folder), "megabytes": 60, "seconds": 60.0, "meminfo": str(meminfo)}
            return await engine.execute(graph, {**given, "times": 1 if short_for == "once" else 2})

    result = asyncio.run(main())
    lost = [event for event in sink.events if event.type == "worker.lost"]
    assert len(os.listdir(folder)) == 2
    if short_for == "once":
        assert result.success, result.error
        assert len(lost) == 1
        return
    assert not result.success
    assert len(lost) == 2
    assert result.error_info.oom_killed
    assert result.error_info.rss_bytes > 60 * MIB
    assert (
        f"needs more memory than there is: alone in its worker it held {result.error_info.rss_bytes:,}" in result.error
    )
