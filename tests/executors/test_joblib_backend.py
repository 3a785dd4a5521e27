"""The process lane behind joblib: what `joblib.Parallel` promises holds with our workers."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

joblib = pytest.importorskip("joblib", reason="joblib is not installed")
from joblib import Parallel, delayed  # noqa: E402

from stageflow.core.errors import WorkerDiedError  # noqa: E402
from stageflow_executors import joblib_backend  # noqa: E402


def fail_at(n: int, bad: int) -> int:
    if n == bad:
        raise ValueError(f"no {n}")
    return n


def where(n: int) -> tuple[int, int]:
    return os.getpid(), n


def die(n: int) -> int:
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def hang(path: str) -> None:
    Path(path).touch()
    while True:
        time.sleep(1)


def nested(n: int) -> tuple[int, list[int]]:
    return os.getpid(), Parallel(n_jobs=2)(delayed(abs)(-m) for m in range(n))


def twice(array: Any) -> tuple[bool, Any]:
    return bool(array.flags.writeable), array * 2


@pytest.fixture(autouse=True)
def stageflow_backend() -> Iterator[None]:
    joblib_backend.register()
    with joblib.parallel_config(backend="stageflow", n_jobs=2):
        yield


@pytest.fixture(scope="module", autouse=True)
def workers_leave() -> Iterator[None]:
    yield
    if joblib_backend._pool is not None:
        joblib_backend._pool.shutdown()


def test_results_in_order_from_warm_workers() -> None:
    first = Parallel()(delayed(where)(n) for n in range(40))
    again = Parallel()(delayed(where)(n) for n in range(40))
    assert [n for _, n in first] == list(range(40))
    pids = {pid for pid, _ in [*first, *again]}
    assert os.getpid() not in pids
    assert len(pids) <= 2, "the second call started workers of its own"


def test_short_calls_are_batched() -> None:
    with Parallel(batch_size="auto") as parallel:
        backend = parallel._backend
        assert isinstance(backend, joblib_backend.StageflowBackend)
        assert parallel(delayed(math.sqrt)(n * n) for n in range(3000)) == list(range(3000))
        assert backend._effective_batch_size > 1


def test_the_calls_own_error_is_raised_and_the_pool_goes_on() -> None:
    with pytest.raises(ValueError, match="no 5") as caught:
        Parallel()(delayed(fail_at)(n, 5) for n in range(100))
    assert "fail_at" in str(caught.value.__cause__)
    assert Parallel()(delayed(fail_at)(n, -1) for n in range(5)) == list(range(5))


def test_a_lost_worker_is_told_and_the_pool_goes_on() -> None:
    with pytest.raises(BrokenProcessPool) as caught:
        Parallel()(delayed(die)(n) for n in range(6))
    assert isinstance(caught.value, WorkerDiedError)
    assert Parallel()(delayed(die)(n) for n in range(3)) == [0, 1, 2]


def test_a_timeout_frees_the_workers(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(multiprocessing.TimeoutError):
        Parallel(timeout=0.5)(delayed(hang)(str(tmp_path / str(n))) for n in range(2))
    assert Parallel()(delayed(abs)(-n) for n in range(4)) == [0, 1, 2, 3]
    assert time.monotonic() - started < 50  # they would hang for ever


@pytest.mark.parametrize("order", ["generator", "generator_unordered"])
def test_results_come_as_a_generator(order: str) -> None:
    results = Parallel(return_as=order)(delayed(abs)(-n) for n in range(50))
    assert next(results) is not None
    assert len(list(results)) == 49


def test_calls_in_calls() -> None:
    found = Parallel()(delayed(nested)(n) for n in range(4))
    assert [numbers for _, numbers in found] == [list(range(n)) for n in range(4)]
    assert os.getpid() not in {pid for pid, _ in found}


def test_lambdas_and_arrays_cross() -> None:
    factor = 3
    assert Parallel()(delayed(lambda n: n * factor)(n) for n in range(4)) == [0, 3, 6, 9]
    array = np.arange(300_000.0)
    for writeable, doubled in Parallel()(delayed(twice)(array) for _ in range(3)):
        assert not writeable
        assert np.array_equal(doubled, array * 2)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (None, 1), (3, 3), (-1, joblib.cpu_count())])
def test_how_many_jobs(asked: int | None, given: int) -> None:
    assert joblib_backend.StageflowBackend().effective_n_jobs(asked) == given


def test_one_job_runs_here_and_none_is_refused() -> None:
    assert Parallel(n_jobs=1)(delayed(where)(n) for n in range(2)) == [(os.getpid(), 0), (os.getpid(), 1)]
    with pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)(delayed(abs)(n) for n in range(2))


def test_a_script_may_use_what_it_defines_and_ends_cleanly(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import joblib, stageflow_executors.joblib_backend
stageflow_executors.joblib_backend.register(make_default=True)
class Doc:
    def __init__(self, n): self.n = n
def make(n): return Doc(n)
print([type(d) is Doc and d.n for d in joblib.Parallel(n_jobs=2)(joblib.delayed(make)(n) for n in range(4))])
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 1, 2, 3]\n", "", 0)
