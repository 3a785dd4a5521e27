"""The drop-in executors behave as the standard's where the standard says how."""

import asyncio
import concurrent.futures as cf
import functools
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stageflow.core.errors import NotShippableError, WorkerDiedError
from stageflow_executors.futures import AbortedCallError, ProcessPoolExecutor, ThreadPoolExecutor

KINDS = [ProcessPoolExecutor, ThreadPoolExecutor]
STATE: list[int] = []


def square(n: int) -> int:
    return n * n


def sleepy(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def wait_for_file(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.002)
    return path


def fail(n: int) -> int:
    if n % 3 == 1:
        raise ValueError(n)
    return n


def die_at(n: int) -> int:
    if n == 37:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def remember(n: int) -> None:
    STATE.append(n)


def remembered() -> list[int]:
    return STATE


def grow(into: list[int]) -> list[int]:
    into.append(len(into))
    return into


def pid_and(n: int) -> tuple[int, int]:
    return os.getpid(), n


@pytest.mark.parametrize("kind", KINDS)
def test_submit_map_and_errors(kind: Any) -> None:
    with kind(2) as pool:
        assert pool.submit(square, 5).result() == 25
        assert pool.submit(pow, 2, 5).result() == 32
        assert list(pool.map(square, range(500))) == [n * n for n in range(500)]
        assert list(pool.map(pow, range(50), range(50), chunksize=7)) == [n**n for n in range(50)]
        futures = [pool.submit(fail, n) for n in range(200)]
        for n, future in enumerate(futures):
            if n % 3 == 1:
                assert isinstance(future.exception(), ValueError)
                with pytest.raises(ValueError, match=str(n)):
                    future.result()
            else:
                assert future.result() == n
        with pytest.raises(ValueError, match="1"):
            list(pool.map(fail, range(5)))
        done, pending = cf.wait([pool.submit(square, n) for n in range(10)])
        assert len(done) == 10
        assert not pending
        assert sorted(f.result() for f in cf.as_completed([pool.submit(square, n) for n in range(5)])) == [
            0,
            1,
            4,
            9,
            16,
        ]
    with pytest.raises(RuntimeError):
        pool.submit(square, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_timeouts_cancel_and_shutdown(kind: Any, tmp_path: Path) -> None:
    pool, gate = kind(1), str(tmp_path / "gate")
    first = pool.submit(wait_for_file, gate)
    with pytest.raises(cf.TimeoutError):
        list(pool.map(wait_for_file, [gate, gate], timeout=0.05))
    rest = [pool.submit(wait_for_file, gate) for _ in range(20)]
    assert rest[-1].cancel()
    assert rest[-1].cancelled()
    pool.shutdown(wait=False, cancel_futures=True)
    (tmp_path / "gate").touch()
    pool.shutdown(wait=True)
    assert first.result() == gate
    assert sum(f.cancelled() for f in rest) >= 15
    assert all(f.done() for f in rest)
    pool.shutdown()
    kind(1).shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_shutdown_without_waiting_finishes_what_was_submitted(kind: Any) -> None:
    pool = kind(2)
    futures = [pool.submit(square, n) for n in range(100)]
    pool.shutdown(wait=False)
    assert [f.result(20) for f in futures] == [n * n for n in range(100)]
    pool.shutdown(wait=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"max_workers": 0}, ValueError), ({"max_workers": -1}, ValueError), ({"initializer": 5}, TypeError)],
)
def test_wrong_arguments(kind: Any, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        kind(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_initializer_runs_once_per_worker(kind: Any) -> None:
    STATE.clear()
    with kind(1, initializer=remember, initargs=(7,)) as pool:
        assert pool.submit(remembered).result() == [7]
        assert pool.submit(remembered).result() == [7]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_initializer_breaks_the_pool(kind: Any) -> None:
    with kind(1, initializer=os.stat, initargs=("/does/not/exist",)) as pool:
        with pytest.raises(cf.BrokenExecutor):
            pool.submit(square, 1).result(30)


@pytest.mark.parametrize("kind", KINDS)
async def test_run_in_executor(kind: Any) -> None:
    with kind(2) as pool:
        loop = asyncio.get_running_loop()
        assert await asyncio.gather(*[loop.run_in_executor(pool, square, n) for n in range(20)]) == [
            n * n for n in range(20)
        ]


def test_a_lost_worker_costs_one_future() -> None:
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(die_at, range(30)))  # warm: short calls now travel in chunks
        futures = [pool.submit(die_at, n) for n in range(100)]
        for n, future in enumerate(futures):
            if n == 37:
                with pytest.raises(BrokenProcessPool) as caught:
                    future.result(30)
                assert isinstance(caught.value, WorkerDiedError)
                assert caught.value.signal == signal.SIGKILL
            else:
                assert future.result(30) == n


def test_calls_share_no_objects() -> None:
    shared: list[int] = []
    with ProcessPoolExecutor(1) as pool:
        pool.submit(grow, []).result()
        results = [f.result() for f in [pool.submit(grow, shared) for _ in range(100)]]
        assert results == [[0]] * 100
        assert len({id(r) for r in results}) == 100


def test_values_that_cannot_cross() -> None:
    with ProcessPoolExecutor(1) as pool:
        with pytest.raises(NotShippableError):
            pool.submit(square, threading.Lock()).result(30)
        with pytest.raises(NotShippableError):
            pool.submit(threading.Lock).result(30)
        lock = threading.Lock()
        with pytest.raises(NotShippableError):
            pool.submit(lambda: lock).result(30)
        assert pool.submit(square, 3).result(30) == 9
        mixed = [pool.submit(lambda n: n if n != 5 else threading.Lock(), n) for n in range(10)]
        assert [f.result() for n, f in enumerate(mixed) if n != 5] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert isinstance(mixed[5].exception(), NotShippableError)


def test_arrays_cross_as_views() -> None:
    with ProcessPoolExecutor(2) as pool:
        array = np.arange(300_000.0)
        results = list(pool.map(np.negative, [array] * 6))
        assert all(np.array_equal(r, -array) for r in results)
        assert not results[0].flags.writeable


def test_max_tasks_per_child_and_mp_context() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=2) as pool:
        pids = [pool.submit(pid_and, n).result(60)[0] for n in range(6)]
        assert len(set(pids)) == 3
    with pytest.raises(ValueError):
        ProcessPoolExecutor(1, max_tasks_per_child=0)
    with pytest.raises(TypeError):
        ProcessPoolExecutor(1, max_tasks_per_child="x")  # type: ignore[arg-type]


def test_a_bounded_map_pulls_its_input_lazily() -> None:
    pulled: list[int] = []

    def source() -> Any:
        for n in range(1000):
            pulled.append(n)
            yield n

    with ProcessPoolExecutor(1) as pool:
        results = pool.map(square, source(), buffersize=8)
        assert next(results) == 0
        assert len(pulled) <= 10
        assert sum(1 for _ in results) == 999


def test_many_threads_submit_at_once() -> None:
    with ProcessPoolExecutor(2) as pool:
        found: list[int] = []

        def client(base: int) -> None:
            found.extend(f.result() for f in [pool.submit(square, base + n) for n in range(500)])

        threads = [threading.Thread(target=client, args=(n * 500,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [n * n for n in range(3000)]


SCRIPT = """
from stageflow_executors.futures import AbortedCallError, ProcessPoolExecutor, ThreadPoolExecutor
class Doc:
    def __init__(self, n): self.n = n
def make(n): return Doc(n)
def read(doc): return doc.n + bonus()
def bonus(): return 100
pool, threads = ProcessPoolExecutor(2), ThreadPoolExecutor(2)
docs = list(pool.map(make, range(5)))
assert all(type(d) is Doc for d in docs)
print(list(pool.map(read, docs)), threads.submit(bonus).result(), flush=True)
pool.submit(print, 1)
pending = [pool.submit(make, n) for n in range(50)]
"""


def test_a_script_without_guard_or_shutdown_ends_cleanly(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = subprocess.run([sys.executable, "-X", "dev", str(script)], capture_output=True, text=True, timeout=100)
    assert found.stdout.splitlines() == ["[100, 101, 102, 103, 104] 100", "1"]
    assert "Traceback" not in found.stderr
    assert found.returncode == 0


def speak(n: int) -> int:
    print("said", n)
    logging.getLogger("a.worker").warning("logged %d", n)
    return n


def test_what_a_worker_prints_and_logs_appears_here(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(speak, 7).result() == 7
    assert capsys.readouterr().out == "said 7\n"
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("a.worker", "logged 7")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_executor_finishes_its_calls_and_ends_its_threads(kind: Any) -> None:
    pool = kind(2)
    futures = [pool.submit(sleepy, 0.01) for _ in range(20)]
    threads = [pool._thread] if kind is ProcessPoolExecutor else list(pool._threads)
    del pool
    gc.collect()
    assert [future.result(20) for future in futures] == [0.01] * 20
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


class Holder:
    def method(self) -> str:
        return "called"


@pytest.mark.parametrize("kind", KINDS)
def test_bound_methods_are_not_kept(kind: Any) -> None:
    holder = Holder()
    gone = threading.Event()
    weakref.finalize(holder, gone.set)
    with kind(1) as pool:
        assert pool.submit(holder.method).result() == "called"
        assert pool.submit(functools.partial(pow, 2), 5).result() == 32
        assert list(pool.map("ab".__add__, ["c", "d"])) == ["abc", "abd"]
        del holder
        assert gone.wait(20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bounded_map_ends_and_times_out(kind: Any, tmp_path: Path) -> None:
    with kind(2) as pool:
        assert list(pool.map(square, range(100), buffersize=3)) == [n * n for n in range(100)]
        there, gate = str(tmp_path), str(tmp_path / "gate")
        with pytest.raises(TimeoutError):
            list(pool.map(wait_for_file, [there, gate, there], timeout=0.1, buffersize=2))
        (tmp_path / "gate").touch()
        with pytest.raises(ValueError, match="buffersize"):
            pool.map(square, [1], buffersize=0)
        with pytest.raises(TypeError, match="buffersize"):
            pool.map(square, [1], buffersize="3")


def test_the_cause_has_the_workers_traceback() -> None:
    with ProcessPoolExecutor(1) as pool:
        error = pool.submit(fail, 1).exception()
    assert isinstance(error, ValueError)
    assert "raise ValueError(n)" in str(error.__cause__)


def proxy_set(proxy: Any) -> None:
    proxy.set()


def test_proxies_of_a_multiprocessing_manager_work_in_workers() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(1) as pool:
        event = manager.Event()
        pool.submit(proxy_set, event).result()
        assert event.is_set()


def meet(mine: str, other: str) -> bool:
    """Leave a sign and wait for that of another call."""
    with open(mine, "w"):
        pass
    for _ in range(2000):
        if os.path.exists(other):
            return True
        time.sleep(0.005)
    return False


def test_a_call_is_not_held_back_for_one_that_waits_for_it(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        there = str(tmp_path / "there")
        assert all(pool.map(meet, [there] * 50, [there] * 50))  # now it is known to be quick
        a, b = str(tmp_path / "a"), str(tmp_path / "b")
        assert pool.submit(abs, -1).result() == 1
        first, second = pool.submit(meet, a, b), pool.submit(meet, b, a)
        assert first.result(20)
        assert second.result(20)


def test_futures_behave_as_the_standard_ones_where_several_wait() -> None:
    with ProcessPoolExecutor(2) as pool:
        futures = [pool.submit(time.sleep, 0.05) for _ in range(6)]
        seen: list[bool] = []
        threads = [threading.Thread(target=lambda: seen.append(futures[-1].result(20) is None)) for _ in range(3)]
        for thread in threads:
            thread.start()
        with pytest.raises(TimeoutError):
            futures[-1].result(0.001)
        assert len(list(cf.as_completed(futures, 20))) == 6
        assert cf.wait(futures, 20).not_done == set()
        for thread in threads:
            thread.join(20)
        assert seen == [True] * 3


def hold(path: str) -> int:
    with open(path, "w"):
        pass
    while not os.path.exists(path + ".go"):
        time.sleep(0.002)
    return os.getpid()


def test_abort_ends_the_named_calls_and_no_others(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(abs, range(20)))
        stopped, kept = pool.submit(hold, str(tmp_path / "stopped")), pool.submit(hold, str(tmp_path / "kept"))
        waiting = [pool.submit(square, n) for n in range(10)]
        while not ((tmp_path / "stopped").exists() and (tmp_path / "kept").exists()):
            time.sleep(0.002)
        try:
            pool.abort([stopped, *waiting[:5]])
            with pytest.raises(AbortedCallError):
                stopped.result(20)
        finally:
            (tmp_path / "kept.go").touch()
        assert kept.result(20) > 0
        assert [future.result(20) for future in waiting[5:]] == [25, 36, 49, 64, 81]
        for future in waiting[:5]:  # those that were with a worker already count as running
            assert future.cancelled() or isinstance(future.exception(20), AbortedCallError)
        pool.abort([kept, stopped])
        assert pool.submit(square, 3).result(20) == 9
