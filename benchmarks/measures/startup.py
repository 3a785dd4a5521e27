"""What it takes to begin: C1, C2, C3. Each in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from benchmarks.harness import Row, Scenario, Sides
from benchmarks.measures.common import our_pool, standard_pool, timed
from benchmarks.peers import HERE, ROOT
from benchmarks.work import noop

OURS: Final = "from stageflow import PipelineBuilder, stage, Engine, RetryConfig"
THEIRS: Final = "import asyncio, concurrent.futures.process"
_MEASURED: Final = "import time; b = time.process_time(); {}; print(time.process_time() - b)"


def import_seconds(line: str) -> Callable[[], float]:
    """CPU seconds that `line` takes in a fresh interpreter with warm bytecode: the least of some."""

    def side() -> float:
        taken = []
        for _ in range(5):
            command = [sys.executable, "-c", _MEASURED.format(line)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
            taken.append(float(done.stdout))
        return min(taken)

    return side


@contextmanager
def _imports(scale: float) -> Iterator[Sides]:
    sides = Sides()
    sides.add("stageflow", import_seconds(OURS))
    sides.add("standard", import_seconds(THEIRS))
    yield sides


def first_result(script: str, *arguments: str) -> Callable[[], None]:
    def run() -> None:
        command = [sys.executable, str(HERE / "scripts" / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
        assert done.stdout.strip() == "42", done.stderr

    return run


@contextmanager
def _first(scale: float) -> Iterator[Sides]:
    sides = Sides()
    sides.add("ours", timed(first_result("first_result_ours.py"), repeat=3))
    sides.add("ppe", timed(first_result("first_result_standard.py"), repeat=3))
    sides.add("bare", timed(first_result("first_result_bare.py"), repeat=3))
    sides.add("built", timed(first_result("first_result_bare.py", "built"), repeat=3))
    yield sides


def _pss(pids: list[int]) -> float:
    import psutil

    return float(sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / len(pids))


@contextmanager
def _idle(scale: float) -> Iterator[Sides]:
    """PSS of a worker that has done a no-op, in bytes."""
    import psutil

    sides = Sides()
    with ExitStack() as stack:
        ours = stack.enter_context(our_pool())
        pids = sorted({ours.submit(_own_pid, number).result() for number in range(8)})
        sides.add("ours", lambda: _pss(pids))
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        standard = stack.enter_context(standard_pool(method="forkserver"))
        theirs = sorted({pid for pid in standard.map(_own_pid, range(16)) if pid not in before})
        sides.add("ppe", lambda: _pss(theirs))
        yield sides


def _own_pid(value: int) -> int:
    import os

    noop(value)
    return os.getpid()


SCENARIOS = (
    Scenario(
        name="import",
        room="start-up",
        open=_imports,
        rounds=7,
        rows=(
            Row(
                id="C1",
                what="import stageflow and its first names",
                against="asyncio + concurrent.futures.process",
                over="stageflow",
                under="standard",
                bar=1.5,
                gate=True,
            ),
        ),
    ),
    Scenario(
        name="first-result",
        room="start-up",
        open=_first,
        rounds=7,
        rows=(
            Row(
                id="C2",
                what="fresh interpreter to first process result",
                against="PPE forkserver",
                over="ours",
                under="ppe",
                bar=1.2,
            ),
            Row(
                id="C2",
                what="asyncio, uvloop and msgspec here, msgspec there (limit)",
                against="PPE forkserver",
                over="bare",
                under="ppe",
            ),
            Row(
                id="C2",
                what="the same, begun there when a graph is built here (limit)",
                against="PPE forkserver",
                over="built",
                under="ppe",
            ),
        ),
    ),
    Scenario(
        name="idle-worker",
        room="start-up",
        open=_idle,
        rows=(
            Row(
                id="C3",
                what="memory of an idle worker (PSS)",
                against="PPE forkserver worker",
                over="ours",
                under="ppe",
                bar=1.5,
                gate=True,
            ),
        ),
    ),
)
