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
def test_every_piece_arrives_and_nothing_beside_it_is_written(
    nbytes: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "PIECE", 4096)
    data = random.Random(nbytes).randbytes(nbytes)
    room = bytearray(b"\xaa" * (nbytes + 20))
    copying.copy_by_two(memoryview(room)[7 : 7 + nbytes], kind(data))
    assert room == b"\xaa" * 7 + data + b"\xaa" * 13


def test_where_no_thread_can_be_started_one_copies_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copying._thread, "start_new_thread", refused)
    room = bytearray(10_000)
    copying.copy_by_two(memoryview(room), b"x" * 10_000)
    assert room == b"x" * 10_000


@pytest.mark.parametrize("late", ["helper", "caller"])
def test_who_has_the_core_does_the_rest(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    """One of the two gets no further than its first piece until all others are done."""
    monkeypatch.setattr(copying, "PIECE", 100)
    copy, caller = copying.ctypes.memmove, threading.current_thread()
    others_done, began = threading.Event(), threading.Event()
    copied: list[bool] = []

    def one_is_late(target: int, source: int, nbytes: int) -> None:
        by_caller = threading.current_thread() is caller
        if by_caller == (late == "caller"):
            began.set()
            assert others_done.wait(30)
        else:
            assert began.wait(30)
        copy(target, source, nbytes)
        copied.append(by_caller)
        if len(copied) == 99:
            others_done.set()

    monkeypatch.setattr(copying.ctypes, "memmove", one_is_late)
    room, data = bytearray(10_000), random.Random(1).randbytes(10_000)
    copying.copy_by_two(memoryview(room), data)
    assert room == data
    assert copied.count(late == "caller") == 1


def test_an_interrupt_is_raised_when_nobody_writes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block given back while half of it is still being written would show those bytes to its next owner."""
    monkeypatch.setattr(copying, "PIECE", 100)
    copy, caller = copying.ctypes.memmove, threading.current_thread()
    began, writing = threading.Event(), threading.Event()
    copied: list[bool] = []

    def interrupted_at_once(target: int, source: int, nbytes: int) -> None:
        if threading.current_thread() is caller:
            assert began.wait(30)
            threading.Timer(0.02, writing.set).start()
            raise KeyboardInterrupt
        began.set()
        assert writing.wait(30)
        copy(target, source, nbytes)
        copied.append(True)

    monkeypatch.setattr(copying.ctypes, "memmove", interrupted_at_once)
    room = bytearray(10_000)
    with pytest.raises(KeyboardInterrupt):
        copying.copy_by_two(memoryview(room), b"x" * 10_000)
    assert copied == [True]  # the piece it was at, and none after it
    assert room.count(b"x") == 100


def same(value: Any) -> Any:
    return value


async def test_large_values_of_each_path_cross_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    halves = []
    monkeypatch.setattr("stageflow_executors.processes.payload.SHARED_ABOVE", 100_000)
    monkeypatch.setattr("stageflow_executors.processes.payload.usable_cores", lambda: 2)
    monkeypatch.setattr(
        "stageflow_executors.processes.payload.copy_by_two",
        lambda into, data: (halves.append(into.nbytes), copying.copy_by_two(into, data)),
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
    monkeypatch.setattr("stageflow_executors.processes.payload.SHARED_ABOVE", 100_000)
    monkeypatch.setattr("stageflow_executors.processes.payload.usable_cores", lambda: 2)
    monkeypatch.setattr(
        "stageflow_executors.processes.payload.copy_by_two", lambda into, data: halves.append(into.nbytes)
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
