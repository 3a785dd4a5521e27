"""A whole job on real input: E1 against the same job written by hand, E2 against two bare loops.

The job is the demo's (without its network stage): read a source tree, parse every file, build a searchable index,
write it and a page. The hand-written version is what a careful engineer writes with asyncio and the standard pool:
files in chunks, the whole chain of a file in one call, partial indexes made in the workers and merged at home.
"""

from __future__ import annotations

import asyncio
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import Row, Scenario, Sides
from benchmarks.measures.common import engine_on_loop, standard_pool
from benchmarks.peers import WORKERS
from benchmarks.work import burn, loops_per_second
from stageflow import PipelineBuilder

#: files per call of the hand-written version: the best of these, tried before the rounds
CHUNKS: Final = (4, 8, 16, 32)
#: packages of the standard library that make the input: 4.5 MB in 400 files, some of them far larger than others
TREE: Final = ("lib2to3", "idlelib", "unittest", "email", "asyncio", "xml", "multiprocessing", "importlib", "json")


def make_input(folder: Path, scale: float) -> Path:
    """A tree of links to a part of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    root = folder / "tree"
    root.mkdir()
    names = [name for name in TREE if (library / name).is_dir()]
    for name in names[-2:] if scale < 0.2 else names:
        target = root / name
        for source in sorted((library / name).rglob("*.py")):
            place = target / source.relative_to(library / name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
    return root


def job_graph() -> Any:
    """The demo's graph without the stage that fetches."""
    from stageflow.demo.index import Index, add, merge
    from stageflow.demo.pipeline import parse, read, report, terms, walk

    return (
        PipelineBuilder("job")
        .stage("walk", walk)
        .map("read", read, over="walk")
        .map("parse", parse, over="read")
        .map("terms", terms, over="parse")
        .reduce("index", add, over="terms", initial=Index(), combine=merge)
        .stage("report", report)
        .build()
    )


def part(root: str, files: list[tuple[int, str]]) -> Any:
    """Worker's side of the hand-written version: everything of a chunk of files."""
    from stageflow.demo.index import Index, add
    from stageflow.demo.source import SourceFile, analyse, words_of

    index = Index({}, [])
    for number, path in files:
        index = add(index, words_of(analyse(SourceFile(number, path, Path(root, path).read_bytes()))))
    return index


async def by_hand(pool: ProcessPoolExecutor, root: str, output: Path, chunk: int = CHUNKS[1]) -> int:
    """The job with asyncio and the standard pool; returns the number of modules."""
    import platform

    from stageflow.demo.index import replace_file, write_index
    from stageflow.demo.page import render
    from stageflow.demo.source import python_files

    loop = asyncio.get_running_loop()
    files = list(enumerate(python_files(root)))
    calls = [loop.run_in_executor(pool, part, root, files[at : at + chunk]) for at in range(0, len(files), chunk)]
    index = None
    for call in calls:
        made = await call
        if index is None:
            index = made
            continue
        entries = index.entries
        for word, entry in made.entries.items():
            entries[word] = entries.get(word, b"") + entry
        index.modules.extend(made.modules)
    assert index is not None
    python = platform.python_version()
    write_index(index, output, root=root, python=python)
    page = render(index.modules, None, title="tree", root=root, python=python)
    replace_file(output / "report.html", [page.encode()])
    return len(index.modules)


def _tree_cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of everything below it as far as it lives."""
    import psutil

    below = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        below += times.user + times.system
    return time.process_time(), below


def _costs(call: Callable[[], Any]) -> Callable[[], dict[str, float]]:
    """Wall seconds, CPU seconds of all processes, and the share of this one."""

    def side() -> dict[str, float]:
        parent, below = _tree_cpu()
        began = time.perf_counter()
        call()
        wall = time.perf_counter() - began
        parent_after, below_after = _tree_cpu()
        home, away = parent_after - parent, max(0.0, below_after - below)
        return {"wall": wall, "cpu": home + away, "parent": home / (home + away)}

    return side


@contextmanager
def _whole_job(scale: float) -> Iterator[Sides]:
    sides = Sides()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stageflow-bench-")))
        root = str(make_input(folder, scale))
        graph = job_graph()
        runner, engine = stack.enter_context(engine_on_loop(processes=WORKERS))
        pool = stack.enter_context(standard_pool())
        seen: dict[str, int] = {}

        def ours() -> None:
            result = runner.run(engine.execute(graph, {"root": root, "output": str(folder / "ours")}))
            assert result.success, result.error
            seen["ours"] = result.data("report").files

        def hand(chunk: int) -> None:
            seen["hand"] = runner.run(by_hand(pool, root, folder / "hand", chunk))

        tried = {chunk: _costs(partial(hand, chunk))()["wall"] for chunk in CHUNKS}
        best = min(tried, key=tried.__getitem__)
        sides.notes["files per call by hand"] = best

        sides.add("ours", _costs(ours))
        sides.add("hand", _costs(partial(hand, best)))
        yield sides
        if len(seen) == 2:
            assert seen["ours"] == seen["hand"], seen
            for name in ("words.txt", "entries.bin"):
                assert (folder / "ours" / name).read_bytes() == (folder / "hand" / name).read_bytes(), name


@contextmanager
def _speed_up(scale: float) -> Iterator[Sides]:
    sides = Sides()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stageflow-bench-")))
        root = str(make_input(folder, scale))
        graph = job_graph()
        for workers in (1, 2):
            runner, engine = stack.enter_context(engine_on_loop(processes=workers))

            def run(runner: Any = runner, engine: Any = engine) -> None:
                result = runner.run(engine.execute(graph, {"root": root, "output": str(folder / "out")}))
                assert result.success, result.error

            sides.add(f"ours {workers}", _costs(run))
        pool = stack.enter_context(standard_pool())
        loops = int(loops_per_second() * max(0.2, 2.0 * scale))

        def bare(parts: int) -> Callable[[], float]:
            def side() -> float:
                began = time.perf_counter()
                list(pool.map(burn, [loops // parts] * parts))
                return time.perf_counter() - began

            return side

        sides.add("bare 1", bare(1))
        sides.add("bare 2", bare(2))
        yield sides


def _of_attainable(values: Mapping[str, float]) -> float:
    return (values["ours 1 wall"] / values["ours 2 wall"]) / (values["bare 1"] / values["bare 2"])


SCENARIOS = (
    Scenario(
        name="whole-job",
        room="whole jobs",
        open=_whole_job,
        rounds=15,
        max_rounds=20,
        seconds=150.0,
        quick=False,
        rows=(
            Row(
                id="E1",
                what="index a source tree, wall time",
                against="hand-written asyncio + PPE",
                over="ours wall",
                under="hand wall",
                bar=1.05,
            ),
            Row(
                id="E1",
                what="the same, CPU of all processes",
                against="hand-written asyncio + PPE",
                over="ours cpu",
                under="hand cpu",
                bar=1.1,
            ),
        ),
    ),
    Scenario(
        name="speed-up",
        room="whole jobs",
        open=_speed_up,
        rounds=7,
        max_rounds=9,
        seconds=100.0,
        quick=False,
        rows=(
            Row(
                id="E2",
                what="speed-up of the job, 2 workers over 1",
                against="two bare loops over one",
                formula=_of_attainable,
                bar=0.92,
                at_most=False,
            ),
            Row(
                id="E2",
                what="parent's share of the job's CPU",
                against="all processes",
                formula=lambda values: values["ours 2 parent"],
                bar=0.06,
            ),
        ),
    ),
)
