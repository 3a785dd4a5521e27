"""C2: fresh interpreter to first result; C3: memory of an idle worker. Beside the standard's pool on a fork server."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.executors.pairs import interleave, show

OURS = """
from stageflow_executors.processes.supply import WorkerSupply
supply = WorkerSupply(2)
supply.prestart()
import asyncio, operator
from stageflow_executors.processes.pool import ProcessExecutor
async def main():
    async with ProcessExecutor(supply=supply) as lane:
        assert await lane.submit(operator.abs, -3) == 3
        {more}
asyncio.run(main())
supply.close()
"""
PEER = """
import multiprocessing, operator
from concurrent.futures import ProcessPoolExecutor
if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
        assert pool.submit(operator.abs, -3).result() == 3
        {more}
"""
OUR_PID = "print(*[w.pid for w in supply.workers.values()], flush=True); import sys; sys.stdin.read()"
PEER_PID = "import sys; print(*pool._processes, flush=True); sys.stdin.read()"


def run(text: str) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", text.format(more="pass")], check=True)
    return time.perf_counter() - start


def proportional(text: str, more: str) -> float:
    """Mean proportional set size of the workers, in MB."""
    command = [sys.executable, "-c", text.format(more=more)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pids = process.stdout.readline().split()
        sizes = []
        for pid in pids:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    sizes.append(int(line.split()[1]) / 1024)
        return sum(sizes) / len(sizes)
    finally:
        # Not a kill: the standard's fork server and its workers would stay behind for ever.
        process.stdin.close()
        process.wait()
        process.stdout.close()


def measure() -> dict[str, Any]:
    """Seconds, and MB."""
    run(OURS)
    run(PEER)
    return {
        "C2": interleave(lambda: run(OURS), lambda: run(PEER), 11),
        "C3": interleave(lambda: proportional(OURS, OUR_PID), lambda: proportional(PEER, PEER_PID), 5),
    }


if __name__ == "__main__":
    result = measure()
    show("C2 fresh process to result", "<= 1.2", result["C2"])
    show("C3 idle worker, MB", "<= 1.5", result["C3"])
