"""The watchdog blames a stage for a loop that it holds up, and nobody for a loop that gets no core."""

import asyncio
import threading

import pytest

from stageflow.runtime.watchdog import BLOCKED, Watchdog


def watched(schedstat=None):
    """Hold a watched loop up until it is reported or has had the time to be; what was reported."""
    reports = []
    told = threading.Event()

    def blocked(seconds, codes, stack):
        reports.append((seconds, stack))
        told.set()

    async def scene():
        watchdog = Watchdog(asyncio.get_running_loop(), blocked)
        if schedstat is not None:
            watchdog._scheduled = str(schedstat)
        watchdog.begin()
        try:
            await asyncio.sleep(0)
            told.wait(10 if schedstat is None else 6 * BLOCKED)
        finally:
            watchdog.close()

    asyncio.run(scene())
    return reports


def test_who_blocks_the_loop_is_named_once_with_the_stack():
    ((seconds, stack),) = watched()
    assert seconds > BLOCKED
    assert "told.wait" in stack


class Starved:
    """As the file of the kernel reads while the thread waits for a core: each read has waited for ten seconds more."""

    def __init__(self, monkeypatch):
        self.reads = 0
        monkeypatch.setattr(Watchdog, "_without_core", self.read)

    def read(self):
        self.reads += 1
        return 10.0 * self.reads


def test_a_loop_that_gets_no_core_is_nobodys_fault(monkeypatch, tmp_path):
    starved = Starved(monkeypatch)
    assert watched(tmp_path) == []
    assert starved.reads >= 2


@pytest.mark.parametrize("text", [None, "", "1 2", "1 x 3"])
def test_without_the_kernels_counters_every_delay_counts(tmp_path, text):
    counters = tmp_path / "schedstat"
    if text is not None:
        counters.write_text(text)
    assert len(watched(counters)) == 1


def test_the_kernels_counter_is_read_in_seconds(tmp_path):
    async def scene():
        watchdog = Watchdog(asyncio.get_running_loop(), print)
        watchdog._scheduled = str(counters)
        return watchdog._without_core()

    counters = tmp_path / "schedstat"
    counters.write_text("41482215 180072577 21\n")
    assert asyncio.run(scene()) == pytest.approx(0.180072577)
