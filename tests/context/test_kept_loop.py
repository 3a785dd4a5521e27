"""The loop that a thread keeps for its coroutine stages is closed with the thread, whoever drops it last."""

import asyncio
import gc
import threading

import pytest

from stageflow.context.attempt import run_coroutine


def failure_of_another_thread():
    """An error whose traceback has outlived the thread, and with it the loop of the thread."""
    caught, loops = [], []

    async def fail():
        loops.append(asyncio.get_running_loop())
        raise ValueError("late")

    def work():
        try:
            run_coroutine(fail())
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return caught, loops[0]


@pytest.mark.filterwarnings("error")
async def test_it_is_closed_by_a_thread_that_runs_a_loop():
    caught, loop = failure_of_another_thread()
    caught.clear()
    gc.collect()
    assert loop.is_closed()


@pytest.mark.filterwarnings("error")
def test_it_is_closed_by_a_thread_that_runs_none():
    caught, loop = failure_of_another_thread()
    caught.clear()
    gc.collect()
    assert loop.is_closed()


def test_a_thread_keeps_one_loop():
    async def loop():
        return asyncio.get_running_loop()

    assert run_coroutine(loop()) is run_coroutine(loop())


def test_a_thread_at_its_end_is_not_taken_for_one_that_was_started_elsewhere():
    before = set(threading.enumerate())
    ended = []

    async def lingers():
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("cancelled")

    async def work():
        ended.append(asyncio.create_task(lingers()))
        await asyncio.to_thread(int)

    thread = threading.Thread(target=lambda: run_coroutine(work()))
    thread.start()
    thread.join()
    assert ended[1:] == ["cancelled"]
    assert [one.name for one in set(threading.enumerate()) - before if one.name.startswith("Dummy")] == []
