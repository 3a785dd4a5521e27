"""Large values are laid into shared memory by two threads, and nobody sees a half of one."""

import asyncio
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.shm import copying


@pytest.mark.parametrize("nbytes", [1, 4095, 8192, 8193, 100_003])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_both_halves_arrive_and_nothing_beside_them_is_written(nbytes: int, kind: type) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    room = bytearray(b"\xaa" * (nbytes + 20))
    copying.copy_in_halves(memoryview(room)[7 : 7 + nbytes], kind(data))
    assert room == b"\xaa" * 7 + data + b"\xaa" * 13


def test_where_no_thread_can_be_started_one_copies_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    room = bytearray(10_000)
    copying.copy_in_halves(memoryview(room), b"x" * 10_000)
    assert room == b"x" * 10_000


def test_an_interrupt_is_raised_when_nobody_writes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block given back while half of it is still being written would show those bytes to its next owner."""
    real = threading.Thread.join
    joins = []

    def interrupted_once(thread: threading.Thread, timeout: float | None = None) -> None:
        joins.append(thread)
        if len(joins) == 1:
            raise KeyboardInterrupt
        real(thread, timeout)

    gate = threading.Event()
    copy = copying.ctypes.memmove

    def second_half_waits(target: int, source: int, nbytes: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(10)
        copy(target, source, nbytes)
        if threading.current_thread() is threading.main_thread():
            threading.Timer(0.02, gate.set).start()

    monkeypatch.setattr(threading.Thread, "join", interrupted_once)
    monkeypatch.setattr(copying.ctypes, "memmove", second_half_waits)
    room = bytearray(10_000)
    with pytest.raises(KeyboardInterrupt):
        copying.copy_in_halves(memoryview(room), b"x" * 10_000)
    assert room == b"x" * 10_000
    assert len(joins) == 2


def same(value: Any) -> Any:
    return value


async def test_large_values_of_each_path_cross_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    halves = []
    monkeypatch.setattr("stageflow_executors.processes.payload.HALVES_ABOVE", 100_000)
    monkeypatch.setattr("stageflow_executors.processes.payload.usable_cores", lambda: 2)
    monkeypatch.setattr(
        "stageflow_executors.processes.payload.copy_in_halves",
        lambda into, data: (halves.append(into.nbytes), copying.copy_in_halves(into, data)),
    )
    array = numpy.random.default_rng(1).random(50_001)
    async with ProcessExecutor(1) as lane:
        assert (await lane.submit(same, array) == array).all()
        nested = await lane.submit(same, {"a": array, "b": 1})
        assert (nested["a"] == array).all()
        assert await lane.submit(same, b"\x01\x02\x03" * 100_000) == b"\x01\x02\x03" * 100_000
        assert len(halves) == 3


def line_of(path: str) -> str:
    with open(path) as file:
        return file.readline()


async def test_a_worker_at_work_keeps_its_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves: list[int] = []
    monkeypatch.setattr("stageflow_executors.processes.payload.HALVES_ABOVE", 100_000)
    monkeypatch.setattr("stageflow_executors.processes.payload.usable_cores", lambda: 2)
    monkeypatch.setattr(
        "stageflow_executors.processes.payload.copy_in_halves", lambda into, data: halves.append(into.nbytes)
    )
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with ProcessExecutor(2) as lane:
        waiting = lane.submit(line_of, str(pipe))
        while lane.running_since(next(iter(lane._tasks))) is None:
            await asyncio.sleep(0.002)
        assert await lane.submit(same, b"x" * 200_000) == b"x" * 200_000
        assert not halves
        pipe.write_text("done\n")
        assert await waiting == "done\n"
