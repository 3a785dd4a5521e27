"""Runs one attempt of a stage, in whichever lane: binds values to parameters, calls, normalises what comes back.

This module is what the engine ships to workers. May import core, context, contracts and events only.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.inputs import EMPTY_INPUTS, StageInputs
from stageflow.context.stage_context import StageContext
from stageflow.core.executor import Reply
from stageflow.core.kinds import SURE, StageStatus
from stageflow.core.output import StageOutput

if TYPE_CHECKING:
    import asyncio  # 25 ms of the first result: only where there is something to await

    from stageflow.context.cleanup import CleanupReport
    from stageflow.context.inside import Inside
    from stageflow.context.owning import Owning
    from stageflow.core.worker import WorkerPort

_local = threading.local()
_instances: dict[type, Any] = {}  # a class stage is constructed once per process
_instances_lock = threading.Lock()

#: what is neither awaitable nor an output
_PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict})
_NOTHING: Final[frozenset[type]] = frozenset()
#: The key of `Header.extras` that makes a `Traced` call record: the context the run was started in, or "".
TRACE: Final = "trace"
#: value in `values` of a dependency that has none
ABSENT: Final = msgspec.UNSET


class Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What differs from attempt to attempt. Small: it crosses with every call."""

    run_id: str
    attempt: int = 1
    item: tuple[int, ...] | None = None
    deadline: float | None = None
    failed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    extras: dict[str, Any] | None = None


class Slot(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One value of a call: a stage's output or an input of the run, and the parameter it goes to (None: only into
    `ctx.inputs`)."""

    name: str
    param: str | None
    is_stage: bool


def instance_of(runner: Any) -> Any:
    """The object to call `execute` on: an instance as it is, a class constructed once per process."""
    if not isinstance(runner, type):
        return runner
    found = _instances.get(runner)
    if found is None:
        with _instances_lock:
            found = _instances.get(runner)
            if found is None:
                found = _instances[runner] = runner()
    return found


class _KeptLoop:
    """The event loop that a thread keeps for its coroutine stages; closed when the thread ends.

    An error that outlives the thread keeps the loop alive through its traceback: the last reference may then be dropped
    by a thread that is running a loop, where this one cannot be run to its end any more and is just closed.
    """

    __slots__ = ("runner",)

    def __init__(self) -> None:
        import asyncio

        self.runner = asyncio.Runner()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            import asyncio

            loop = self.runner.get_loop()
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                _run_out(loop)
            loop.close()


def _run_out(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on a loop and let it end.

    `Runner.close` would also wait, in a thread of its own, for the threads of `asyncio.to_thread`. But a thread that
    drops its loop is at its end: `threading` does not know it any more and takes it for one that was started elsewhere,
    lists it for ever, and on Python 3.13 complains when the interpreter exits.
    """
    import asyncio

    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())


async def awaited(awaitable: Any) -> Any:
    """Any awaitable as a coroutine."""
    return await awaitable


def _kept_runner() -> asyncio.Runner:
    kept: _KeptLoop | None = getattr(_local, "kept", None)
    if kept is None:
        kept = _local.kept = _KeptLoop()
    return kept.runner


def run_coroutine(coroutine: Any, port: WorkerPort | None = None) -> Any:
    """Run a coroutine to its end in this thread, on a loop that the thread keeps. A cancel of the attempt cancels
    it."""
    import asyncio

    runner = _kept_runner()
    loop = runner.get_loop()

    async def guarded() -> Any:
        task = asyncio.current_task()
        if port is not None and task is not None:
            port.on_cancel(partial(_cancel_threadsafe, loop, task))
        return await coroutine

    return runner.run(guarded())


def _cancel_threadsafe(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the attempt is over
        loop.call_soon_threadsafe(task.cancel)


class CallPlan:
    """How the values of a call reach the runner's parameters. Computed once, pickled with the program."""

    __slots__ = ("element", "keywords", "positional", "slots", "wants_ctx")

    def __init__(
        self,
        slots: tuple[Slot, ...],
        positional: tuple[tuple[str, Any], ...],
        keywords: tuple[tuple[str, str, Any], ...],
        wants_ctx: bool,
        element: str | None = None,
    ) -> None:
        self.slots = slots
        #: ("value" | "ctx" | "element" | "const", slot or the constant) in call order
        self.positional = positional
        #: (parameter, "value" | "ctx" | "element", slot)
        self.keywords = keywords
        self.wants_ctx = wants_ctx
        #: how the element of a map arrives: "positional", a parameter name, or None where there is none
        self.element = element

    def __reduce__(self) -> tuple[Any, ...]:
        return CallPlan, (self.slots, self.positional, self.keywords, self.wants_ctx, self.element)

    def arguments(self, values: tuple[Any, ...], ctx: Any, element: Any) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments; an absent value leaves its parameter to the default."""
        args: list[Any] = []
        if not self.positional and not self.keywords:
            return args, {}
        for kind, slot in self.positional:
            if kind == "value":
                value = values[slot]
                args.append(None if value is ABSENT else value)
            elif kind == "const":
                args.append(slot)
            else:
                args.append(ctx if kind == "ctx" else element)
        kwargs: dict[str, Any] = {}
        for name, kind, slot in self.keywords:
            if kind == "value":
                value = values[slot]
                if value is not ABSENT:
                    kwargs[name] = value
            elif kind == "nullable":
                value = values[slot]
                kwargs[name] = None if value is ABSENT else value
            else:
                kwargs[name] = ctx if kind == "ctx" else element
        return args, kwargs


class Program:
    """One stage as workers know it: the runner, how to call it, and what to do around the call."""

    __slots__ = (
        "_awaits",
        "_bound",
        "_checker",
        "_sure",
        "contract",
        "declared",
        "form",
        "grace",
        "inside",
        "is_async",
        "kind",
        "name",
        "own",
        "plan",
        "resource_scope",
        "resources",
        "returns",
        "runner",
    )

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        runner: Any,
        form: str,
        is_async: bool,
        plan: CallPlan,
        declared: tuple[str, ...] = (),
        contract: Any = None,
        returns: Any = None,
        resources: Mapping[str, Callable[[], Any]] | None = None,
        resource_scope: int = 0,
        grace: float = 5.0,
        inside: Inside | None = None,
        own: Owning | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.runner = runner
        self.form = form
        self.is_async = is_async
        self.plan = plan
        self.declared = declared
        self.contract = contract
        #: the annotation that values are checked against, where there is no `contract`; None: nothing to check
        self.returns = returns
        self.resources = dict(resources or {})
        self.resource_scope = resource_scope
        self.inside = inside  #: interceptors that asked to be called here; then there is a context
        self.own = own  #: inputs that it may change; None: none
        self.grace = grace  #: seconds for the cleanups of an attempt
        self._awaits = False  # what it calls has returned a coroutine without being a coroutine function
        self._bound: Callable[..., Any] | None = None
        self._checker: Any = None
        self._sure = _surely(contract, returns)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for cls in type(self).__mro__
            for name in getattr(cls, "__slots__", ())
            if not name.startswith("_") and hasattr(self, name)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._awaits = False
        self._bound = None
        self._checker = None
        for name, value in state.items():
            setattr(self, name, value)
        self._sure = _surely(self.contract, self.returns)

    # ------------------------------------------------------------ the call

    def target(self) -> Callable[..., Any]:
        """What is called: the function, or the `execute` of the stage object."""
        bound = self._bound
        if bound is None:
            bound = self._bound = self.runner if self.form == "function" else instance_of(self.runner).execute
        return bound

    def function(self, ctx: StageContext | None, port: WorkerPort) -> Callable[..., Any]:
        """What is called, with the interceptors around it that asked to be here."""
        target = self.target()
        return target if self.inside is None or ctx is None else self.inside.around(target, ctx, port)

    def context(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        values: tuple[Any, ...],
        item: tuple[int, ...] | None = None,
    ) -> StageContext:
        """The StageContext of one attempt."""
        if self.declared:
            stage_values = {
                slot.name: value
                for slot, value in zip(self.plan.slots, values, strict=False)
                if slot.is_stage and value is not ABSENT
            }
            inputs = StageInputs(stage_values, self.declared, self.name, failed=header.failed, skipped=header.skipped)
        else:
            inputs = EMPTY_INPUTS
        return StageContext(
            self,
            port,
            header.run_id,
            header.attempt,
            item if item is not None else header.item,
            snapshot,
            inputs,
            header.deadline,
            header.extras,
        )

    def __call__(self, port: WorkerPort, header: Header, snapshot: Any, *values: Any) -> Any:
        """One attempt in a thread or process; a coroutine stage runs on a loop here."""
        plan = self.plan
        if self.own is not None:
            crossed = port.lane == "process"
            snapshot = snapshot if crossed else self.own.snapshot(snapshot)
            values = self.own.values(values, crossed=crossed)
        if not plan.wants_ctx:
            args, kwargs = plan.arguments(values, None, None)
            result = (self._bound or self.target())(*args, **kwargs)
            kind = type(result)
            if kind in _PLAIN and not self.checks:
                return result
            if self.is_async or inspect.isawaitable(result):
                result = run_coroutine(_awaited(result), port)
            return self.reply(result, None)
        ctx = self.context(port, header, snapshot, values)
        args, kwargs = plan.arguments(values, ctx, None)
        try:
            result = self.function(ctx, port)(*args, **kwargs)
            if self.is_async or inspect.isawaitable(result):
                result = run_coroutine(_awaited(result), port)
        except BaseException:
            finish_context(ctx)
            raise
        finish_context(ctx)
        return self.reply(result, ctx)

    async def run_async(self, port: WorkerPort, header: Header, snapshot: Any, *values: Any) -> Any:
        """One attempt on the caller's loop. A synchronous runner is called inline."""
        plan = self.plan
        if self.own is not None:
            snapshot, values = self.own.snapshot(snapshot), self.own.values(values)
        if not plan.wants_ctx:
            args, kwargs = plan.arguments(values, None, None)
            result = self.target()(*args, **kwargs)
            if self.is_async or inspect.isawaitable(result):
                result = await result
            return result if result is None and not self.checks else self.reply(result, None)
        ctx = self.context(port, header, snapshot, values)
        args, kwargs = plan.arguments(values, ctx, None)
        try:
            result = self.function(ctx, port)(*args, **kwargs)
            if self.is_async or inspect.isawaitable(result):
                result = await result
        except BaseException:
            await finish_context_async(ctx)
            raise
        await finish_context_async(ctx)
        return self.reply(result, ctx)

    def iterate(self, port: WorkerPort, header: Header, snapshot: Any, *values: Any) -> tuple[Any, StageContext | None]:
        """Start a source: its iterator or async iterator, and the context to finish when it ends."""
        if self.own is not None:
            snapshot, values = self.own.snapshot(snapshot), self.own.values(values)
        ctx = self.context(port, header, snapshot, values) if self.plan.wants_ctx else None
        args, kwargs = self.plan.arguments(values, ctx, None)
        items = self.target()(*args, **kwargs)
        if self.checks:
            items = _CheckedAsync(items, self) if hasattr(items, "__aiter__") else _Checked(items, self)
        return items, ctx

    def reply(self, result: Any, ctx: StageContext | None) -> Any:
        """What the parent gets: a plain value as it is, everything else as a Reply whose meta is the output without
        data."""
        artifacts = ctx._artifacts if ctx is not None else None
        if isinstance(result, StageOutput):
            if artifacts:
                result = result.with_artifacts((*result.artifacts, *artifacts))
            if result.status is StageStatus.OK:
                self.check(result.data)
            return Reply(result.data, msgspec.structs.replace(result, data=None), has_value=result.data is not None)
        self.check(result)
        if artifacts:
            return Reply(result, StageOutput(artifacts=tuple(artifacts)))
        # the lanes take a bare generator for one of parts
        return Reply(result) if type(result) is GeneratorType else result

    @property
    def checks(self) -> bool:
        """Whether values of this stage are checked at all."""
        return self.contract is not None or self.returns is not None

    def check(self, value: Any) -> None:
        """Raise ContractViolationError where `value` does not fit the stage's contract, or its return annotation."""
        if self.returns is None and self.contract is None:
            return
        if type(value) in self._sure:
            return
        checker = self._checker
        if checker is None:
            checker = self._compile()
        checker.check(value, stage=self.name)

    def passes(self, kinds: set[type]) -> bool:
        """Whether values of these classes need no look: nothing is checked, or the class says it all."""
        if self.returns is None and self.contract is None:
            return True
        if self._checker is None and not kinds <= self._sure:
            self._compile()
        return kinds <= self._sure

    def _compile(self) -> Any:
        from stageflow.contracts.checker import compile_contract

        exact = self.contract is None
        checker = self._checker = compile_contract(self.returns if exact else self.contract, exact=exact)
        self._sure = checker.sure
        return checker


def _surely(contract: Any, returns: Any) -> frozenset[type]:
    """The classes of which every instance fits, as far as that is known without the checker, which takes longer to
    import than a short stage takes."""
    return SURE.get(returns, _NOTHING) if contract is None and type(returns) is type else _NOTHING


class _Checked:
    """The iterator of a source, with each item checked as it leaves."""

    __slots__ = ("_items", "_program")

    def __init__(self, items: Any, program: Program) -> None:
        self._items = iter(items)
        self._program = program

    def __iter__(self) -> _Checked:
        return self

    def __next__(self) -> Any:
        value = next(self._items)
        self._program.check(value)
        return value

    def close(self) -> None:
        """Close the source's own iterator."""
        close_iterator(self._items)


class _CheckedAsync:
    """The async iterator of a source, with each item checked as it leaves."""

    __slots__ = ("_items", "_program")

    def __init__(self, items: Any, program: Program) -> None:
        self._items = items.__aiter__()
        self._program = program

    def __aiter__(self) -> _CheckedAsync:
        return self

    async def __anext__(self) -> Any:
        value = await self._items.__anext__()
        self._program.check(value)
        return value

    async def aclose(self) -> None:
        """Close the source's own iterator."""
        close = getattr(self._items, "aclose", None)
        if close is not None:
            await close()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


# ---------------------------------------------------------------- cleanup


def finish_context(ctx: StageContext | None) -> None:
    """Run what the attempt deferred, last registered first. An error of one is noted and does not keep the others
    from running."""
    if ctx is None or ctx._cleanup is None:
        return
    cleanup, ctx._cleanup = ctx._cleanup, None
    _cleaned(ctx, cleanup.run_here(ctx._program.grace, run_coroutine))


async def finish_context_async(ctx: StageContext) -> None:
    """`finish_context` on a running loop; shielded from the cancellation of the attempt."""
    if ctx._cleanup is None:
        return
    cleanup, ctx._cleanup = ctx._cleanup, None
    try:
        await cleanup.run_all(ctx._program.grace)
    finally:
        from stageflow.context.cleanup import CleanupReport

        _cleaned(ctx, CleanupReport(cleanup.completed, cleanup.failed))


def _cleaned(ctx: StageContext, report: CleanupReport) -> None:
    """Tell the parent what was done."""
    for failure in report.failed:
        text = failure.message if failure.error is None else f"{failure.error.type}: {failure.error.message}"
        data = {"cleanup": failure.name, "error": text}
        ctx._port.note("event", ctx._said("stage.cleanup_failed", data))
    ctx._port.note("deferred", len(report.completed) + len(report.failed))


# ---------------------------------------------------------------- helpers of the item programs


def close_iterator(iterator: Any) -> None:
    """Close a generator; what its cleanup raises is the stage's and propagates."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()


def drain_async(iterator: Any, port: WorkerPort) -> Iterator[Any]:
    """The items of an async iterator, pulled on this thread's loop. One task drives it from the first to its close:
    cancel scopes and timeouts that are open across a `yield` stay whole."""
    import asyncio

    step = iterator.__aiter__()
    loop = _kept_runner().get_loop()
    wanted, given = asyncio.Event(), asyncio.Event()
    box: list[Any] = []

    async def drive() -> None:
        try:
            async for value in step:
                box.append(value)
                given.set()
                await wanted.wait()
                wanted.clear()
        finally:
            aclose = getattr(step, "aclose", None)
            if aclose is not None:
                await aclose()

    async def pull() -> None:
        waiting = asyncio.ensure_future(given.wait())
        try:
            await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    task = loop.create_task(drive())
    port.on_cancel(partial(_cancel_threadsafe, loop, task))
    try:
        while True:
            loop.run_until_complete(pull())
            if box:
                given.clear()
                yield box.pop()
                wanted.set()
            else:
                task.result()
                return
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
