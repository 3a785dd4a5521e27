"""T1: 20,000 no-ops with a future each; T3: tasks of 1 ms and mixed tasks. Beside the standard's pool."""

from __future__ import annotations

import operator
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor as Standard
from typing import Any

from benchmarks.executors.pairs import interleave, show
from stageflow_executors.futures import ProcessPoolExecutor

NO_OPS = 20_000
TASKS = 2_000


def burn(seconds: float) -> None:
    """CPU for about `seconds` of work, by count, so that contention shows as time and not as less work."""
    for _ in range(int(seconds * 2e7)):
        pass


def measure() -> dict[str, Any]:
    """Seconds per task."""
    dice = random.Random(7)
    mixed = [dice.uniform(0.0001, 0.02) for _ in range(300)]
    with Standard(2) as peer, ProcessPoolExecutor(2) as ours:

        def our_no_ops(clock: Callable[[], float] = time.perf_counter) -> float:
            start = clock()
            futures = [ours.submit(operator.abs, n) for n in range(NO_OPS)]
            for future in futures:
                future.result()
            return (clock() - start) / NO_OPS

        def peer_no_ops(clock: Callable[[], float] = time.perf_counter) -> float:
            start = clock()
            for _ in peer.map(operator.abs, range(NO_OPS // 5), chunksize=1):
                pass
            return (clock() - start) / (NO_OPS // 5)

        def ours_of(tasks: list[float]) -> float:
            start = time.perf_counter()
            for future in [ours.submit(burn, seconds) for seconds in tasks]:
                future.result()
            return (time.perf_counter() - start) / len(tasks)

        def peer_of(tasks: list[float], chunksize: int) -> float:
            start = time.perf_counter()
            list(peer.map(burn, tasks, chunksize=chunksize))
            return (time.perf_counter() - start) / len(tasks)

        for _ in range(2):
            our_no_ops()
            peer_no_ops()
        even = [0.001] * TASKS
        best = min((8, 16, 32, 64), key=lambda size: peer_of(even, size))
        best_mixed = min((1, 4, 16), key=lambda size: peer_of(mixed, size))
        ours_of(even)
        return {
            "T1": interleave(our_no_ops, peer_no_ops, 7),
            "T1 CPU": interleave(lambda: our_no_ops(time.process_time), lambda: peer_no_ops(time.process_time), 7),
            "T3": interleave(lambda: ours_of(even), lambda: peer_of(even, best), 7),
            "T3 mixed": interleave(lambda: ours_of(mixed), lambda: peer_of(mixed, best_mixed), 5),
        }


if __name__ == "__main__":
    result = measure()
    show("T1 no-op, a future each", "<= 0.067", result["T1"])
    show("T1 CPU of the parent alone", "", result["T1 CPU"])
    show("T3 1 ms tasks", "<= 1.03", result["T3"])
    show("T3 0.1-20 ms tasks", "<= 0.91", result["T3 mixed"])
