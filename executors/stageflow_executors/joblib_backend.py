"""The process lane as a joblib parallel backend, for scikit-learn and everything else that speaks joblib.

    stageflow_executors.joblib_backend.register()
    with joblib.parallel_config(backend="stageflow", n_jobs=4):
        joblib.Parallel()(joblib.delayed(fit)(fold) for fold in folds)

All calls of one process with the same `n_jobs` share warm workers. Arrays cross through shared memory and arrive
read-only, as joblib's memory maps do; a lost worker raises for the batch it ran. May import `stageflow.core`, this
package and joblib only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import joblib
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from stageflow_executors.futures import ProcessPoolExecutor

_lock = threading.Lock()
_pool: ProcessPoolExecutor | None = None


def _shared_pool(n_jobs: int) -> ProcessPoolExecutor:
    """The pool of this process for `n_jobs`; one of another size ends when its calls have."""
    global _pool
    with _lock:
        if _pool is None or not _pool.usable or _pool.max_workers != n_jobs:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool = ProcessPoolExecutor(n_jobs)
        return _pool


class StageflowBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """What `backend="stageflow"` means. Made by joblib, one per `Parallel` or configuration block."""

    supports_retrieve_callback = True
    uses_threads = False
    supports_sharedmem = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._pool: ProcessPoolExecutor | None = None
        self._open: weakref.WeakSet[Future[Any]] = weakref.WeakSet()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many calls run at once; a negative number counts down from all cores."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(joblib.cpu_count() + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Get ready for the calls of one `Parallel`. joblib's settings for its memory maps have no meaning here."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._pool = _shared_pool(n_jobs)
        return n_jobs

    def submit(self, func: Callable[[], Any], callback: Callable[[Future[Any]], None] | None = None) -> Future[Any]:
        """Run one batch in a worker."""
        assert self._pool is not None
        future = self._pool.submit(func)
        self._open.add(future)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # its name before joblib 1.5

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """The results of a batch; raises what its call raised, or what became of its worker."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End what this `Parallel` still has in hand; the workers that run it are killed and replaced."""
        if self._pool is not None:
            self._pool.abort(list(self._open))

    def terminate(self) -> None:
        """The calls have ended. The workers stay warm for the next ones, and leave by themselves when none come."""
        self._pool = None
        self.reset_batch_stats()


def register(*, make_default: bool = False) -> None:
    """Make `backend="stageflow"` known to joblib, or the one it uses unless told otherwise."""
    joblib.register_parallel_backend("stageflow", StageflowBackend, make_default=make_default)
