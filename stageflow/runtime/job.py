"""One run as the driver sees it: its graph's code, its values, its sinks, and who waits for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from stageflow.context.attempt import Header
from stageflow.context.cancellation import CancellationToken
from stageflow.context.identity import RunIdentity
from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.events.fanout import FanOut
from stageflow.observability.stats import StatsFold
from stageflow.pipeline.graph import StageGraph
from stageflow.runtime.book import Book
from stageflow.runtime.code import GraphCode
from stageflow.runtime.result import Abandoned, FailureRecord, FailureSummary, Outputs, RunResult
from stageflow.scheduler.states import StageState

if TYPE_CHECKING:
    from stageflow.context.pipeline_context import PipelineContext

#: failed items of which the details are kept; all are counted
KEPT_FAILURES: Final = 10_000


class Job:
    """A run under way."""

    __slots__ = (
        "_dice",
        "abandoned",
        "about",
        "book",
        "broken",
        "cancelled_items",
        "children",
        "cleanups",
        "code",
        "context",
        "depth",
        "dice",
        "doomed",
        "error",
        "failed_items",
        "failures",
        "finished",
        "graph",
        "header",
        "header_wire",
        "id",
        "identity",
        "index",
        "inputs_wire",
        "listening",
        "moved",
        "owns_sinks",
        "parent",
        "parent_run_id",
        "paths",
        "pumps",
        "result",
        "run_id",
        "sinks",
        "snapshot",
        "snapshot_wire",
        "spill_file",
        "started",
        "started_ns",
        "stats",
        "survivors",
        "switching",
        "token",
        "trace",
        "unlink",
    )

    def __init__(
        self,
        id: int,
        code: GraphCode,
        snapshot: ContextSnapshot,
        run_id: str,
        loop: asyncio.AbstractEventLoop,
        *,
        sinks: FanOut | None,
        index: int | None,
        depth: int,
        parent: Job | None,
        seed: int | None,
    ) -> None:
        graph: StageGraph = code.graph
        self.id = id
        self.code = code
        self.graph = graph
        self.snapshot = snapshot
        self.identity: RunIdentity = snapshot.run_id
        self.about: Mapping[str, str] = {}  # what else its caller said of it: service, topology, execution mode
        self.run_id = run_id
        self.book = Book(graph)
        self.header = Header(run_id) if depth == 0 else None  # of every attempt of which nothing is special
        self.header_wire: Any = None  # the same, encoded
        self.sinks = sinks
        self.owns_sinks = sinks is not None and (parent is None or sinks is not parent.sinks)
        self.index = index
        self.depth = depth
        self.parent = parent
        self.parent_run_id = parent.run_id if parent is not None else None  # of another process, in a worker
        self.children: set[int] = set()
        self.cleanups: list[Any] = []  # of lost attempts, running on a thread
        self._dice: dict[Any, random.Random] = {}
        self.stats = StatsFold(specs=graph.specs, lanes=code.lanes)
        self.dice = random.Random(seed)
        self.failures: list[FailureRecord] = []
        self.failed_items = 0
        self.cancelled_items = 0
        self.paths: dict[tuple[int, int], tuple[int, ...]] = {}  # of items that were stopped, by stage and index
        self.doomed: dict[tuple[int, tuple[int, ...]], str] = {}  # (stage, path) of items to be stopped once begun
        self.abandoned: list[Abandoned] = []
        self.pumps: dict[int, Any] = {}
        self.switching = 0.0  # the interval of thread switches that this run asked for
        self.moved: set[int] = set()  # stages of which something ran on a thread because it could not be sent
        self.survivors: dict[int, dict[int, tuple[bytes, str | None]]] = {}
        self.snapshot_wire: Any = None
        self.inputs_wire: dict[Any, Any] = {}  # inputs encoded once for several process calls
        self.spill_file: Any = None
        self.context: PipelineContext | None = None  # whose outputs are filled as stages end
        self.token: CancellationToken | None = None
        self.trace: str | None = None  # the trace context it was started in ("" for none), while somebody traces
        self.unlink: Callable[[], None] | None = None
        self.started = 0.0
        self.started_ns = 0
        self.listening = False  # somebody listened when it began
        self.error: ErrorInfo | None = None
        self.broken: BaseException | None = None  # a bug of ours, raised in place of a result
        self.result: RunResult | None = None
        self.finished: asyncio.Future[RunResult] = loop.create_future()

    def dice_for(self, seed: int | None, key: Any) -> random.Random:
        """The jitter of one task: the run's own, or (with a seeded policy) one that gives the same rolls in every
        run."""
        if seed is None:
            return self.dice
        found = self._dice.get(key)
        if found is None:
            found = self._dice[key] = random.Random(f"{seed}:{key}")
        return found

    def _book_cancelled(self, reason: str, states: bytes) -> None:
        """What the end of the run kept from ending has an output too, whether or not anybody listened."""
        output = StageOutput.cancel(reason)
        ends = self.book.ends
        at = states.find(StageState.CANCELLED)
        while at >= 0:
            if at not in ends:
                self.book.end(at, output)
            at = states.find(StageState.CANCELLED, at + 1)

    def finish(self, status: str, reason: str | None, error: ErrorInfo | None, now: float, states: bytes) -> RunResult:
        """Make the result."""
        if status != "completed":
            self._book_cancelled(reason or status, states)
        done = states.count(StageState.DONE)
        failed = states.count(StageState.FAILED)
        skipped = states.count(StageState.SKIPPED)
        summary = FailureSummary(
            total_stages=len(states),
            completed_stages=done,
            failed_stages=failed,
            skipped_stages=skipped,
            cancelled_stages=states.count(StageState.CANCELLED),
            failed_items=self.failed_items,
            cancelled_items=self.cancelled_items,
            failures=tuple(self.failures),
            partial_results=Outputs(self.book),
        )
        text = None
        if status == "failed":
            text = reason
            if text is None and self.failures:
                first = self.failures[0]
                where = f" at item {list(first.item)}" if first.item else ""
                more = len(self.failures) - 1
                text = f"stage {first.stage!r} failed{where}: {first.error}" + (f" (and {more} more)" if more else "")
        self.result = RunResult(
            book=self.book,
            graph=self.graph,
            run_id=self.run_id,
            status=status,
            error=text,
            error_info=error or (self.failures[0].error_info if self.failures and status == "failed" else None),
            duration_ms=(now - self.started) * 1000.0,
            cancel_reason=reason if status == "cancelled" else None,
            failures=summary,
            stats=self.stats,
            abandoned=tuple(self.abandoned),
            index=self.index,
            parent_run_id=self.parent_run_id,
        )
        return self.result
