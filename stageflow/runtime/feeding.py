"""Opens, pulls and closes sources, and asks predicates."""

# mypy: disable-error-code="misc"
# The driver is spread over modules by subject; each method names Driver as its self.

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from stageflow.context.attempt import Header
from stageflow.context.owning import read_only_items
from stageflow.core.executor import Call
from stageflow.core.failure import capture
from stageflow.core.output import ErrorInfo
from stageflow.core.worker import UnderWay
from stageflow.events import names
from stageflow.pipeline.spec import Role
from stageflow.runtime.inputs import stage_inputs
from stageflow.runtime.job import Job
from stageflow.runtime.moving import is_argument, named
from stageflow.runtime.running import DriverCounters, Running
from stageflow.runtime.sequence import Values
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.worker_source import Credits

CROSSING_FROM: Final = 65536  # bytes of items from which their producer encodes them for readers in other processes


class Feeding(DriverCounters):
    """Opens, pulls and closes sources, and asks predicates."""

    def _pull_source(self: Driver, action: act.PullSource) -> None:
        job = self.jobs[action.run]
        pump = job.pumps.get(action.stage)
        if pump is None:
            try:
                pump = job.pumps[action.stage] = self._open_source(job, action)
            except Exception as error:
                self._source_ended(job, action, error)
                return
        pump.pull(action.count, action.nbytes)

    def _open_source(self: Driver, job: Job, action: act.PullSource) -> Any:
        stage = action.stage
        spec = job.graph.specs[stage]
        run = job.id

        def arrived(given: Any, nbytes: int, seconds: float, enough: bool) -> None:
            if run not in self.jobs:
                return
            self._next_handle = handle = self._next_handle + 1
            count = len(given)
            values = given if isinstance(given, Values) else Values(read_only_items(given), None, nbytes)
            job.book.hold(handle, values)
            self.signal(sig.ItemsArrived(run, stage, count, handle, nbytes, seconds, enough))

        def ended(error: BaseException | None) -> None:
            job.pumps.pop(stage, None)
            self._source_ended(job, action, error)

        from stageflow.runtime.sources import InlineSource, TaskSource, ThreadSource, past

        if spec.role != Role.SOURCE:
            return self._open_expander(job, stage, arrived, ended)
        code = job.code.stage(stage)
        lane = job.code.lanes[stage]
        values = self._values(job, code.sources, "async", None)
        header = Header(job.run_id, action.attempt)
        port = SourcePort(self, job, stage, lane)
        self.first_starts.setdefault((job.id, stage), self.clock.monotonic())

        def begin() -> Any:
            items, ctx = code.program.iterate(port, header, job.snapshot, *values)
            return (items if not action.skip else past(items, action.skip, spec.name)), ctx

        if spec.is_async:
            return TaskSource(begin, arrived, ended, self.loop)
        if lane == "process":
            return self._open_in_worker(job, action, arrived, begin)
        if lane == "inline":
            return InlineSource(begin, arrived, ended, self.loop)
        return ThreadSource(begin, arrived, ended, self.loop, spec.name, self._encoder(job, stage))

    def _open_in_worker(self: Driver, job: Job, action: act.PullSource, arrived: Any, begin: Any) -> Any:
        """A source that computes, in a worker that is not one of the lane's."""
        from stageflow.runtime.sources import ThreadSource
        from stageflow.runtime.worker_source import WorkerSource

        stage, lane = action.stage, "process"
        spec, code = job.graph.specs[stage], job.code.stage(stage)
        executor = cast("Credits", self.executors.get(lane) or self.executor(lane))
        values = self._values(job, code.sources, lane, executor)
        header = Header(job.run_id, action.attempt)
        snapshot = self._snapshot(job, lane, executor) if code.passes_snapshot else None
        calls: list[int] = []

        def make(number: int, credit: tuple[int, int], skip: int) -> Call:
            args = (header, snapshot, skip, credit, *values)
            return Call(number, code.driven(), args, alone=True, apart=True)

        def begun(number: int) -> None:
            done()
            calls.append(number)
            self.running[number] = Running(
                job, act.StartAttempt(number, job.id, stage, lane, action.attempt), executor, self.clock.monotonic()
            )

        def done() -> None:
            while calls:
                number = calls.pop()
                self.running.pop(number, None)
                self._run_survivors(job, number)

        def ended(info: ErrorInfo | None, error: BaseException | None) -> None:
            done()
            job.pumps.pop(stage, None)
            if info is None and error is not None:
                info = capture(error, lane=lane, attempt=action.attempt)
            self._source_ended(job, action, error, info)

        def told(info: ErrorInfo | None) -> None:
            data = {"delay_ms": 0.0, "error": info.message if info is not None else "", "why": "infrastructure"}
            self._event(names.STAGE_RETRYING, job, spec.name, None, action.attempt, lane, data)

        def refused(info: ErrorInfo, credit: tuple[int, int]) -> bool:
            if stage not in job.code.movable or not is_argument(info):
                return False
            done()
            attempt = act.StartAttempt(0, job.id, stage, "thread", action.attempt)
            self._tell_moved(job, attempt, named(job, attempt, info, before=4).message)
            pump = job.pumps[stage] = ThreadSource(
                begin, arrived, partial(ended, None), self.loop, spec.name, self._encoder(job, stage)
            )
            pump.pull(*credit)
            return True

        return WorkerSource(
            executor, make, arrived, ended, self.loop, skip=action.skip, replayable=spec.policies.replayable,
            grace=self.machine.grace, begun=begun, told=told, refused=refused,
        )  # fmt: skip

    def _encoder(self: Driver, job: Job, stage: int) -> Any:
        """Encodes lists of big items where another process reads them, on the thread that made them: then they exist
        once, and are counted as what they are."""
        layout = job.code.layout
        executor = self.executors.get("process")
        if executor is None or not any(layout.lanes[reader] == "process" for reader in layout.readers.get(stage, ())):
            return None

        def encode(items: list[Any], nbytes: int) -> Values:
            if nbytes < CROSSING_FROM:
                return Values(items, None, nbytes)
            try:
                payload = executor.encode(items)
            except Exception:
                return Values(items, None, nbytes)  # whoever reads them says what is wrong
            return Values(None, payload, payload.nbytes, len(items))

        return encode

    def _open_expander(self: Driver, job: Job, stage: int, arrived: Any, ended: Any) -> Any:
        """Lay out the elements of a value that a map goes over."""
        from stageflow.runtime.sources import InlineSource, SequenceSource, TaskSource, ThreadSource

        spec = job.graph.specs[stage]
        if spec.over >= 0:
            value = job.book.value(spec.over)
            origin = f"stage {job.graph.specs[spec.over].name!r}"
        else:
            value = job.snapshot.inputs[str(spec.over_input)]
            origin = f"input {spec.over_input!r}"
        if hasattr(value, "__aiter__"):
            return TaskSource(lambda: (value, None), arrived, ended, self.loop)
        if isinstance(value, Mapping | set | frozenset):
            value = list(value)
        if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, str | bytes):
            return SequenceSource(value, arrived, ended, self.loop)
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
            from stageflow.core.errors import DefinitionError

            raise DefinitionError(
                f"stage {spec.name!r} goes over {origin}, which is {type(value).__name__} and no sequence of elements",
                hint="return a list (or a generator), or use `.stage` instead of `.map`",
            )
        if job.code.lanes[stage] == "inline":
            return InlineSource(lambda: (value, None), arrived, ended, self.loop)
        return ThreadSource(lambda: (value, None), arrived, ended, self.loop, spec.name)

    def _source_ended(
        self: Driver,
        job: Job,
        action: act.PullSource,
        error: BaseException | None,
        info: ErrorInfo | None = None,
    ) -> None:
        """`info`: what went wrong, where that is known better than by the exception."""
        if job.id not in self.jobs:
            return
        stage = action.stage
        lane = job.code.lanes[stage]
        if info is None and error is not None:
            info = capture(error, lane=lane, attempt=action.attempt)
        if info is None:
            self.signal(sig.SourceEnded(job.id, stage))
            return
        ended = sig.SourceEnded(job.id, stage, "error", info)
        retry = job.graph.specs[stage].policies.retry
        if retry is not None:
            now = self.clock.monotonic()
            seconds = now - self.first_starts.get((job.id, stage), now)
            from stageflow.runtime.strategies import judge

            verdict = judge(retry, info, error, action.attempt, seconds, 0.0, job.dice_for(retry.seed, stage))
            ended.retry, ended.wait, ended.roll = verdict.retry, verdict.wait, verdict.roll
            if verdict.broken is not None:
                ended.error = info = capture(verdict.broken, lane=lane, attempt=action.attempt)
        job.book.failure(stage, info)
        self.signal(ended)

    def _stop_source(self: Driver, action: act.StopSource) -> None:
        pump = self.jobs[action.run].pumps.get(action.stage)
        if pump is not None:
            pump.stop(action.reason)
        else:
            self.signal(sig.SourceEnded(action.run, action.stage, "cancelled"))

    def _decide(self: Driver, action: act.Decide) -> None:
        job = self.jobs[action.run]
        decided = sig.Decided(action.run, action.stage)
        try:
            when = job.graph.specs[action.stage].policies.when
            decided.go = bool(when(stage_inputs(job, action.stage)))
        except Exception as error:
            decided.error = capture(error, lane="async", attempt=1)
            job.book.failure(action.stage, decided.error)
        self.signal(decided)


class SourcePort:
    """The worker port of a source, which the parent drives."""

    __slots__ = ("_driver", "_job", "_reason", "_stage", "lane")

    def __init__(self, driver: Driver, job: Job, stage: int, lane: str) -> None:
        self._driver = driver
        self._job = job
        self._stage = stage
        self.lane = lane
        self._reason: str | None = None

    @property
    def worker_pid(self) -> int:
        """This process."""
        import os

        return os.getpid()

    def cancelled(self) -> bool:
        """True once the run is over or being stopped."""
        return self._job.id not in self._driver.jobs or self._stage not in self._job.pumps

    def cancel_reason(self) -> str | None:
        """Why."""
        return "the run is over" if self.cancelled() else None

    def progress(self, done: float, total: float) -> None:
        """A source's progress is its items."""

    def note(self, kind: str, data: Any) -> None:
        """Send an event from the source's own thread."""
        if kind != "event":
            return
        name = self._job.graph.specs[self._stage].name
        loop = self._driver.loop
        fields = (str(data["type"]), self._job, name, None, 1, self.lane, dict(data.get("data") or {}))
        try:
            loop.call_soon_threadsafe(self._driver._event, *fields)
        except RuntimeError:
            pass  # the loop is closed: the run is over

    def buffer(self, nbytes: int) -> memoryview:
        """Plain memory."""
        return memoryview(bytearray(nbytes))

    def items(self, current: Callable[[], UnderWay]) -> None:
        """A source has none."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Sources look at `cancelled` between items; they are closed when the run ends."""
