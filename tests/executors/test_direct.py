"""Calls that come one at a time: the submitting thread talks to the worker, whatever happens meanwhile."""

import asyncio
import concurrent.futures as cf
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from stageflow_executors.direct import Direct
from stageflow_executors.futures import AbortedCallError, LostWorkerError, ProcessPoolExecutor
from stageflow_executors.processes import lookout
from stageflow_executors.processes.lookout import Lookout
from stageflow_executors.processes.pool import ProcessExecutor

WITHIN = 60.0


def act(what: Any, *more: Any, **named: Any) -> Any:
    """Short when asked for nothing much, and anything else when asked for it: one function, known as short."""
    if type(what) is not str:
        return (what, more, named) if more or named else what
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(more[0])
    if what == "say":
        print(more[0])
    if what == "raise":
        raise ValueError(more[0])
    if what == "large":
        return np.ones(more[0])
    return (what, more, named) if more or named else what


def talk_directly(pool: ProcessPoolExecutor) -> Direct:
    """Call until the pool has parted with a worker. On a loaded machine `act` may first seem long."""
    end = time.monotonic() + WITHIN
    while time.monotonic() < end:
        assert pool.submit(act, 1).result() == 1
        direct = pool._direct
        if direct is not None and direct._functions[id(act)].seconds < 0.001:
            return direct
    raise AssertionError("the pool never parted with a worker")


def directly(pool: ProcessPoolExecutor, *args: Any) -> cf.Future[Any]:
    """A call that certainly went that way."""
    end = time.monotonic() + WITHIN
    while time.monotonic() < end:
        direct = talk_directly(pool)
        future = pool.submit(act, *args)
        if getattr(future, "_direct", None) is direct:
            return future
        if args[0] not in ("die", "sleep"):
            future.result()
            continue
        raise AssertionError("it went the other way")  # cannot be asked for twice
    raise AssertionError("no call went directly")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """What happens to it in one test must not be felt in the next."""
    with ProcessPoolExecutor(2) as made:
        yield made


def test_lone_calls_go_directly_and_give_what_they_give(pool: ProcessPoolExecutor) -> None:
    talk_directly(pool)
    array = np.arange(128.0)
    for given in (1, None, "text", "\u00e4" * 40, b"x" * 5000, [1, "a"], {"k": 2.5}, (1, 2), 1 << 70, {1, 2}):
        assert pool.submit(act, given).result() == given
        assert type(pool.submit(act, given).result()) is type(given)
    back = pool.submit(act, array).result(timeout=30)
    assert np.array_equal(back, array)
    assert pool.submit(act, 1, 2, key="word").result() == (1, (2,), {"key": "word"})
    assert pool.submit(act, "large", 100_000).result().sum() == 100_000
    with pytest.raises(ValueError, match="told"):
        pool.submit(act, "raise", "told").result()
    end = time.monotonic() + WITHIN
    while talk_directly(pool).answers < 3:  # and it still does
        assert time.monotonic() < end
        assert np.array_equal(pool.submit(act, array).result(), array)


def test_a_large_argument_in_between_does_not_end_it(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(act, np.ones(100_000)).result().sum() == 100_000.0
    gc.collect()  # its memory is the parent's to use again, when it needs some
    assert directly(pool, 1).result() == 1


@pytest.mark.parametrize("ask", ["wait", "callback", "poll", "exception", "asyncio", "cancel", "short", "other thread"])
def test_an_answer_is_had_in_every_way(pool: ProcessPoolExecutor, ask: str) -> None:
    future = directly(pool, "sleep", 0.002)
    if ask == "wait":
        assert cf.wait([future], timeout=WITHIN).done == {future}
    elif ask == "callback":
        told = threading.Event()
        future.add_done_callback(lambda _: told.set())
        assert told.wait(WITHIN)
    elif ask == "poll":
        end = time.monotonic() + WITHIN
        while not future.done():
            assert time.monotonic() < end
            time.sleep(0.0005)
    elif ask == "exception":
        assert future.exception(WITHIN) is None
    elif ask == "asyncio":

        async def main() -> Any:
            return await asyncio.wrap_future(future)

        assert asyncio.run(main()) == ("sleep", (0.002,), {})
    elif ask == "cancel":
        assert not future.cancel()
    elif ask == "short":
        with pytest.raises(TimeoutError):
            future.result(0.0001)
    else:
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(future.result())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN)
        assert found == [("sleep", (0.002,), {})] * 4
    assert future.result(WITHIN) == ("sleep", (0.002,), {})
    assert pool.submit(act, 5).result() == 5


def test_nobody_asks_and_it_is_heard_all_the_same(
    pool: ProcessPoolExecutor, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = talk_directly(pool)
    future = pool.submit(act, "say", "aloud")
    end = time.monotonic() + WITHIN
    said = ""
    while "aloud" not in said:
        assert time.monotonic() < end
        said += capfd.readouterr().out
    assert future.result() == ("say", ("aloud",), {})
    # and a worker nobody talks to goes back to its lane
    direct = talk_directly(pool)
    while pool._direct is direct:
        assert time.monotonic() < end


def test_a_call_that_takes_longer_than_it_used_to(pool: ProcessPoolExecutor) -> None:
    assert directly(pool, "sleep", 0.1).result(WITHIN) == ("sleep", (0.1,), {})
    assert pool.submit(act, 3).result() == 3


def test_a_worker_that_dies_costs_the_call_under_way(pool: ProcessPoolExecutor) -> None:
    for _ in range(2):
        with pytest.raises(LostWorkerError) as caught:
            directly(pool, "die").result(WITHIN)
        assert caught.value.signal == signal.SIGKILL
    assert pool.submit(act, 4).result(WITHIN) == 4


def test_a_worker_that_is_killed_between_two_calls_costs_nothing(pool: ProcessPoolExecutor) -> None:
    direct = talk_directly(pool)
    os.kill(direct._lent.handle.pid, signal.SIGKILL)
    for number in range(50):
        try:
            assert pool.submit(act, number).result(WITHIN) == number
        except LostWorkerError:
            pytest.fail("a call was lost that had not begun")


def test_abort_and_shutdown_take_over() -> None:
    pool = ProcessPoolExecutor(1)
    aborted = directly(pool, "sleep", 600.0)
    threading.Timer(0.02, lambda: pool.abort([aborted])).start()
    with pytest.raises(AbortedCallError):
        aborted.result(WITHIN)
    last = directly(pool, "sleep", 0.05)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(last.result(WITHIN)))
    waiting.start()
    pool.shutdown(wait=True)
    waiting.join(WITHIN)
    assert found == [("sleep", (0.05,), {})]
    with pytest.raises(RuntimeError):
        pool.submit(act, 1)


def test_a_second_call_has_the_other_worker(pool: ProcessPoolExecutor) -> None:
    list(pool.map(time.sleep, [0.1, 0.1]))  # both are up
    first = directly(pool, "sleep", 0.6)
    other = pool.submit(act, 2).result(WITHIN)
    assert other == 2
    assert not first.done()
    assert first.result(WITHIN) == ("sleep", (0.6,), {})


def test_a_users_fork_leaves_the_worker_to_the_parent(pool: ProcessPoolExecutor) -> None:
    talk_directly(pool)
    child = os.fork()
    if not child:
        code = 1
        try:
            direct = pool._direct
            from stageflow_executors.futures import _new_future, _Work

            if direct is None or not direct.submit(pool, _Work(_new_future(), act, (9,), {})):
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for number in range(100):
        assert pool.submit(act, number).result(WITHIN) == number


def test_a_dropped_executor_ends_though_its_future_is_kept() -> None:
    pool = ProcessPoolExecutor(1)
    future = directly(pool, 7)
    assert future.result() == 7
    thread, there = pool._thread, weakref.ref(pool)
    late = directly(pool, "sleep", 0.02)
    del pool
    assert late.result(WITHIN) == ("sleep", (0.02,), {})
    gc.collect()
    assert thread is not None
    thread.join(WITHIN)
    assert not thread.is_alive()
    assert there() is None


def test_threads_that_come_and_go_get_each_their_answers(pool: ProcessPoolExecutor) -> None:
    wrong: list[Any] = []
    ways: set[bool] = set()

    def one_after_another(seed: int) -> None:
        dice = random.Random(seed)
        for number in range(120):
            value = seed * 1000 + number
            future = pool.submit(act, value)
            ways.add(getattr(future, "_direct", None) is not None)
            if dice.random() < 0.1:
                time.sleep(dice.random() * 0.004)
            if (found := future.result(WITHIN)) != value:
                wrong.append((found, value))

    for together in (1, 3, 1, 2, 1):
        threads = [threading.Thread(target=one_after_another, args=(n,)) for n in range(together)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN)
            assert not thread.is_alive()
    assert not wrong
    assert ways == {True, False}


def test_answers_survive_deaths_while_threads_ask(pool: ProcessPoolExecutor) -> None:
    stop = threading.Event()

    def kill_some() -> None:
        dice = random.Random(3)
        while not stop.wait(0.01 + dice.random() * 0.03):
            for worker in list(pool._supply.workers.values()):
                if worker.ready and worker.pid and dice.random() < 0.5:
                    worker.kill()

    killer = threading.Thread(target=kill_some)
    killer.start()
    ended = lost = 0
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until or not ended:
            try:
                assert pool.submit(act, ended).result(WITHIN) == ended
            except LostWorkerError:
                lost += 1
            ended += 1
    finally:
        stop.set()
        killer.join()
    assert ended > lost
    assert pool.submit(act, 1).result(WITHIN) == 1


INTERRUPTED = """
import random, signal, sys, time
from stageflow_executors.futures import ProcessPoolExecutor
import operator

class Pressed(BaseException): pass

def press(*_):
    raise Pressed

signal.signal(signal.SIGALRM, press)
dice = random.Random(5)
pool = ProcessPoolExecutor(1)
for _ in range(20):
    pool.submit(abs, -1).result()
done = pressed = direct = 0
until = time.monotonic() + float(sys.argv[1])
number = 0
while time.monotonic() < until:
    number += 1
    future = None
    try:
        signal.setitimer(signal.ITIMER_REAL, dice.random() * 0.0004 + 0.00001)
        for number in range(number, number + 20):
            future = None
            future = pool.submit(abs, -number)
            direct += getattr(future, "_direct", None) is not None
            assert future.result() == number, (future.result(), number)
            done += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    except (Pressed, RuntimeError) as error:
        # The standard's own condition, interrupted in its `wait`, fails to let go of a lock that it has not.
        assert type(error) is Pressed or "un-acquired lock" in str(error), error
        pressed += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    if future is not None:
        assert future.result(30) == number, (future.result(), number)
assert pool.submit(abs, -3).result(30) == 3
pool.shutdown()
print("done", done, pressed, direct)
"""


def test_interrupting_the_main_thread_anywhere_loses_nothing(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    found = subprocess.run([sys.executable, script, "0.6"], capture_output=True, text=True, timeout=WITHIN)
    assert found.returncode == 0, found.stderr
    _, done, pressed, direct = found.stdout.split()
    assert min(int(done), int(pressed), int(direct)) > 10


def test_a_script_ends_while_a_worker_is_apart(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text(
        "from stageflow_executors.futures import ProcessPoolExecutor\n"
        "pool = ProcessPoolExecutor(1)\n"
        "for n in range(30): assert pool.submit(abs, -n).result() == n\n"
        "last = pool.submit(print, 'the last')\n"
    )
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=WITHIN)
    assert (found.returncode, found.stdout, found.stderr) == (0, "the last\n", "")


# ---------------------------------------------------------------- looking before sleeping


def test_looking_rests_where_it_did_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0

    def clock() -> int:
        nonlocal now
        now += 2_000
        return now

    monkeypatch.setattr(lookout, "_clock", clock)
    one = Lookout()
    looks = 0

    def nothing() -> None:
        nonlocal looks
        looks += 1

    assert one.worth()
    assert one.look(nothing) is None
    assert looks == lookout.LOOK_NS // 2_000
    rests = []
    for _ in range(9):
        rested = 0
        while not one.worth():
            rested += 1
        rests.append(rested)
        assert one.look(nothing) is None
    assert rests == [8, 24, 56, 120, 248, 504, 1016, 1024, 1024]
    while not one.worth():
        pass
    answers = iter([None, None, "frame"])
    assert one.look(lambda: next(answers)) == "frame"
    assert one.worth()

    def crowded() -> None:
        nonlocal now, looks
        looks += 1
        now += lookout.CROWDED_NS

    looks = 0
    assert one.look(crowded) is None
    assert looks == 1  # somebody else needs the core


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.SelectorEventLoop])
def test_answers_found_by_looking_leave_the_books_in_order(new_loop: Any) -> None:
    async def main() -> int:
        found = 0
        async with ProcessExecutor(1) as lane:
            lane._cores = 2  # whatever this machine has
            for number in range(300):
                lane._lookout.rest = 0
                assert await lane.submit(abs, -number) == number
                found += lane._looked_for is not None
                assert len(lane._idle) == len(set(map(id, lane._idle))) <= 1
                assert not lane._tasks
                (lent,) = lane._lent.values()
                assert (lent.tasks, lent.frames) == ({}, 0)
        return found

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def test_workers_look_only_while_there_are_cores_for_all() -> None:
    async with ProcessExecutor(2) as lane:
        lane._cores = 2
        await asyncio.gather(*(lane.submit(time.sleep, 0.05) for _ in range(2)))
        both = [lent.handle.page.words[lookout_word()] for lent in lane._lent.values()]
        assert both == [0, 0]
        while len(lane._lent) > 1:  # idle ones go back
            await asyncio.sleep(0.01)
            await lane.submit(abs, 1)
        (lent,) = lane._lent.values()
        assert lent.handle.page.words[lookout_word()] == 1


def lookout_word() -> int:
    from stageflow_executors.processes import status

    return status.SPARE
