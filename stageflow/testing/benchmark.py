"""`pipeline_benchmark`: how fast a pipeline is, in numbers that can be compared on a machine that is shared.

Each round is timed beside a loop of known work, and what is stored is the cost of an item in units of that loop. The
numbers go into pytest-benchmark's `extra_info`; the stored ones are in a JSON file that is meant to be committed.

May not import: `stageflow.report`, cli, demo, any executor; pytest only for its types.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.core.errors import DefinitionError

if TYPE_CHECKING:
    from stageflow.pipeline.graph import StageGraph
    from stageflow.runtime.engine import Engine
    from stageflow.runtime.result import RunResult

#: name of the file of stored numbers, beside the test's rootdir
STORE: Final = "pipeline-benchmarks.json"
#: how much worse than the stored number is a failure
TOLERANCE: Final = 0.30
#: one unit of known work: turns of a loop, some milliseconds on any machine of today
LOOP: Final = 50_000
_SAMPLE_SECONDS: Final = 0.01


class PipelineTooSlowError(AssertionError):
    """A pipeline's cost per item is worse than the stored one by more than the tolerance."""


class StoredPace(msgspec.Struct, frozen=True):
    """What is kept between sessions: cost per item in units of the loop, with the least and greatest of the rounds."""

    ratio: float
    low: float
    high: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a pipeline did, per second of the median round.

    `items` are the elements that its widest stage took (the number of runs, where no stage takes elements). `wait` is
    seconds by reason, summed over stages; `peak_bytes` the resident memory of this process and its workers at its
    highest (pages that processes share count in each). `ratio` is the wall time of an item in units of the loop;
    `baseline` the stored one.
    """

    items: int
    seconds: float
    items_per_second: float
    bytes_per_second: float
    wait: dict[str, float]
    peak_bytes: int
    ratio: float
    low: float
    high: float
    baseline: StoredPace | None
    result: RunResult


class PaceStore:
    """The stored numbers of all tests: a JSON object by test name. Written as a whole, sorted."""

    def __init__(self, path: Path, *, update: bool = False) -> None:
        self.path = path
        self.update = update

    def get(self, name: str) -> StoredPace | None:
        """The stored number of a test; None where there is none. DefinitionError when the file cannot be read."""
        found = self._load().get(name)
        return msgspec.convert(found, StoredPace) if found is not None else None

    def put(self, name: str, pace: StoredPace) -> None:
        """Store the number of a test."""
        found = self._load()
        found[name] = msgspec.to_builtins(pace)
        self.path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")

    def _load(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            made: dict[str, Any] = msgspec.json.decode(self.path.read_bytes(), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise DefinitionError(
                f"{self.path} does not hold stored paces: {error}", hint="delete it and store them anew"
            ) from error
        return made


def spin(turns: int = LOOP) -> float:
    """Wall seconds of a fixed amount of pure-Python work."""
    began = time.perf_counter()
    total = 0
    for number in range(turns):
        total += number & 3
    return time.perf_counter() - began


class PipelineBenchmark:
    """The value of the `pipeline_benchmark` fixture. Call it once per test.

    `benchmark` is pytest-benchmark's fixture: rounds, statistics and storage are its own.
    """

    def __init__(self, benchmark: Any, store: PaceStore, name: str) -> None:
        self._benchmark = benchmark
        self._store = store
        self._name = name

    def __call__(
        self,
        graph: StageGraph,
        items: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
        *,
        rounds: int = 5,
        tolerance: float = TOLERANCE,
        engine: Engine | None = None,
        **config: Any,
    ) -> Measured:
        """Run `graph` `rounds` times and measure it; `items` are the inputs of one run, or an iterable of inputs.

        An iterable runs through `run_many`, once per element. Without `engine`, one is made of the keywords that are
        its settings and kept warm; the others go to each run.

        Raises:
            PipelineTooSlowError: every round costs more than every stored one, and the median more than `tolerance`
                above the stored median.
            StageFailedError: a run failed: there is nothing to measure.
        """
        from stageflow.runtime.engine import Engine
        from stageflow.runtime.options import split_options

        of_run, of_engine = split_options(config)
        if engine is not None and of_engine:
            raise DefinitionError(
                f"engine= and engine settings ({', '.join(of_engine)}) were given together",
                hint="give the settings to Engine(...)",
            )
        with ExitStack() as stack:
            chosen = engine if engine is not None else stack.enter_context(Engine(**of_engine))
            run = _runner(chosen, graph, items, of_run)
            times, loops, results = self._rounds(run, rounds)
            peak = _peak_bytes(run)
        measured = _measured(times, loops, results, peak, self._store.get(self._name))
        self._note(measured)
        self._judge(measured, tolerance)
        return measured

    def _rounds(
        self, run: Callable[[], list[RunResult]], rounds: int
    ) -> tuple[list[float], list[float], list[RunResult]]:
        times: list[float] = []
        loops: list[float] = []
        results: list[RunResult] = []

        def calibrate() -> None:
            loops.append(min(spin() for _ in range(3)))

        def timed() -> None:
            began = time.perf_counter()
            results[:] = run()
            times.append(time.perf_counter() - began)

        run()  # workers start, code is shipped
        self._benchmark.pedantic(timed, setup=calibrate, rounds=rounds)
        return times, loops, results

    def _note(self, measured: Measured) -> None:
        shown = {
            "items": measured.items,
            "items_per_second": measured.items_per_second,
            "bytes_per_second": measured.bytes_per_second,
            "wait": measured.wait,
            "peak_bytes": measured.peak_bytes,
            "ratio_to_loop": measured.ratio,
        }
        if measured.baseline is not None:
            shown["ratio_to_baseline"] = measured.ratio / measured.baseline.ratio
        self._benchmark.extra_info.update(shown)

    def _judge(self, measured: Measured, tolerance: float) -> None:
        if self._store.update:
            self._store.put(self._name, StoredPace(measured.ratio, measured.low, measured.high))
            return
        before = measured.baseline
        if before is None:
            return
        factor = measured.ratio / before.ratio
        if measured.low > before.high and factor > 1.0 + tolerance:
            raise PipelineTooSlowError(
                f"an item costs {factor:.2f} times what {self._store.path.name} has: {measured.ratio:.4g} loops"
                f" ({measured.low:.4g} to {measured.high:.4g}), stored {before.ratio:.4g}"
                f" ({before.low:.4g} to {before.high:.4g}); --pipeline-baseline-update stores the new number"
            )


def _runner(
    engine: Engine,
    graph: StageGraph,
    items: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
) -> Callable[[], list[RunResult]]:
    """A call that runs everything once and raises for a failure."""
    if items is None or isinstance(items, Mapping):
        inputs = items

        def once() -> list[RunResult]:
            return _checked([engine.run(graph, inputs, **options)])

        return once
    several = list(items)
    if not several:
        raise DefinitionError("there are no items to run the pipeline with", hint="give at least one input mapping")

    def many() -> list[RunResult]:
        return _checked(list(engine.run_many(graph, several, **options)))

    return many


def _checked(results: list[RunResult]) -> list[RunResult]:
    for result in results:
        result.raise_for_failure()
    return results


def _measured(
    times: list[float], loops: list[float], results: list[RunResult], peak: int, baseline: StoredPace | None
) -> Measured:
    rows = [row for result in results for row in result.stats.values()]
    widest: dict[str, int] = {}
    for row in rows:
        widest[row.stage] = widest.get(row.stage, 0) + row.items_in
    items = max(len(results), max(widest.values(), default=0))
    seconds = statistics.median(times)
    wait: dict[str, float] = {}
    for row in rows:
        for reason, waited in row.wait.items():
            wait[reason] = wait.get(reason, 0.0) + waited
    ratios = [taken / items / loop for taken, loop in zip(times, loops, strict=True)]
    return Measured(
        items=items,
        seconds=seconds,
        items_per_second=items / seconds,
        bytes_per_second=sum(row.bytes_in + row.bytes_out for row in rows) / seconds,
        wait=wait,
        peak_bytes=peak,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        baseline=baseline,
        result=results[-1],
    )


def _peak_bytes(run: Callable[[], object]) -> int:
    """One more run, not timed: the highest resident memory seen while it went on."""
    import psutil

    me = psutil.Process()

    def resident() -> int:
        total = 0
        for process in (me, *me.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        return total

    highest = resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(_SAMPLE_SECONDS):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch, name="pipeline-benchmark-memory", daemon=True)
    watcher.start()
    try:
        run()
        highest = max(highest, resident())
    finally:
        over.set()
        watcher.join()
    return highest
