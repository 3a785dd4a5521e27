"""Applies the interceptors of a stage that asked to be called where its attempts run, beside its function.

The same hooks in the same order as in the parent (`stageflow.runtime.interceptors`), inside all of those. May import
core, context, contracts and events only.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from stageflow.context.interception import Gate, InterceptorContext, Scope
from stageflow.core.errors import DefinitionError, StageCancelledError
from stageflow.core.failure import capture
from stageflow.core.kinds import DROP, StageStatus
from stageflow.core.output import ErrorInfo, StageOutput

if TYPE_CHECKING:
    from stageflow.context.stage_context import StageContext
    from stageflow.core.worker import WorkerPort

_log = logging.getLogger("stageflow.interceptors")
MOST_RUNS: Final = 64  # whose state a process keeps; the run begun longest ago is forgotten first


class _States:
    """What interceptors keep in this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, dict[int, tuple[Any, Any]]] = OrderedDict()

    def get(self, run_id: str, owner: Any, factory: Callable[[], Any], scope: Scope) -> Any:
        """The state of `owner` in this run, or (scope "engine") for as long as the process lives."""
        with self._lock:
            kept = self._runs.setdefault("" if scope == "engine" else run_id, {})
            while len(self._runs) > MOST_RUNS:
                self._runs.pop(next(run for run in self._runs if run))
            found = kept.get(id(owner))
            if found is None:
                found = kept[id(owner)] = (owner, factory())
            return found[1]


_states = _States()


class WorkerServices:
    """The `Services` of interceptors beside a running attempt."""

    __slots__ = ("_run_id",)

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    async def sleep(self, seconds: float) -> None:
        """Wait so many real seconds."""
        await asyncio.sleep(seconds)

    def gate(self) -> Gate:
        """Refused: attempts in different workers cannot wait for each other."""
        raise DefinitionError(
            "an interceptor inside a worker has no gates", hint="leave out in_worker=True: it then acts in the parent"
        )

    def later(self, seconds: float, callback: Callable[[], Any]) -> Any:
        """Call back on the running loop in so many real seconds; what is returned has `cancel()`."""
        return asyncio.get_running_loop().call_later(seconds, callback)

    def log(self, level: int, message: str, fields: dict[str, Any]) -> None:
        """Write to the logger `stageflow.interceptors`; the fields become attributes of the record."""
        _log.log(level, "%s", message, extra=fields)

    def digest(self, value: Any) -> str:
        """SHA-256 of the content."""
        return str(import_module("stageflow.store.keys").digest(value))  # a room above: reached by name, on use

    def state(self, owner: Any, factory: Callable[[], Any], scope: Scope) -> Any:
        """What the interceptor keeps in this process."""
        return _states.get(self._run_id, owner, factory, scope)


class Inside:
    """The interceptors of one stage, in their order. Shipped with its program."""

    __slots__ = ("interceptors",)

    def __init__(self, interceptors: tuple[Any, ...]) -> None:
        self.interceptors = interceptors

    def __reduce__(self) -> tuple[Any, ...]:
        return Inside, (self.interceptors,)

    def around(self, function: Callable[..., Any], ctx: StageContext, port: WorkerPort) -> Callable[..., Any]:
        """`function` with the hooks around it: a coroutine where it is one itself or a loop is running."""

        def called(*args: Any, **kwargs: Any) -> Any:
            steps = self._steps(function, ctx, args, kwargs)
            if inspect.iscoroutinefunction(function) or _loop_is_running():
                return _awaiting(steps)
            return _stepping(steps, port)

        return called

    def _steps(
        self, function: Callable[..., Any], ctx: StageContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Generator[Any, Any, Any]:
        """The hooks and the call, each yielded to be awaited if it wants to be; returns what the attempt returns."""
        here = _context_of(ctx, args, kwargs)
        entered: list[Any] = []
        try:
            raw, output, error = yield from self._answer(function, here, entered, args, kwargs)
            answer = output
            if output.status is StageStatus.FAIL:
                answer = yield from _recovered(entered, here, output)
            for each in reversed(entered):
                hook = getattr(each, "after", None)
                if hook is not None:
                    answer = _checked((yield hook(here, answer)), each)
            if answer is not output:
                return answer
            if error is not None:
                raise error
            return raw
        finally:
            for each in reversed(entered):
                leave = getattr(each, "leave", None)
                if leave is not None:
                    try:
                        yield leave(here)
                    except Exception:
                        _log.exception("leave of %s raised", type(each).__name__)

    def _answer(
        self,
        function: Callable[..., Any],
        here: InterceptorContext,
        entered: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Generator[Any, Any, tuple[Any, StageOutput, Exception | None]]:
        """What the first `before` with an output, or the function, answers: as it is, as an output, and what it
        raised."""
        for each in self.interceptors:
            hook = getattr(each, "before", None)
            output = None if hook is None else (yield hook(here))
            entered.append(each)
            if output is not None:
                return output, _checked(output, each), None
        try:
            raw = yield function(*args, **kwargs)
        except StageCancelledError:
            raise
        except Exception as error:
            info = capture(error, lane=here.lane or None, attempt=here.attempt, item=here.item)
            failed = StageOutput(StageStatus.FAIL, error=info.message, error_info=info, retryable=info.retryable)
            return None, failed, error
        if isinstance(raw, StageOutput):
            return raw, raw, None
        return raw, StageOutput.skip("the element was dropped") if raw is DROP else StageOutput(data=raw), None


def _recovered(entered: list[Any], here: InterceptorContext, output: StageOutput) -> Generator[Any, Any, StageOutput]:
    """The first answer to a failure; the failure itself without one."""
    info = output.error_info or ErrorInfo(type="StageFailed", message=output.error or "", retryable=output.retryable)
    for each in entered:
        hook = getattr(each, "on_error", None)
        recovery = None if hook is None else (yield hook(here, info))
        if recovery is not None:
            return _checked(recovery, each)
    return output


def _checked(output: Any, who: Any) -> StageOutput:
    if isinstance(output, StageOutput):
        return output
    raise DefinitionError(
        f"interceptor {type(who).__name__} returned a {type(output).__name__} where a StageOutput was wanted",
        hint="`after` must return the output; `before` and `on_error` return a StageOutput or None",
    )


def _context_of(ctx: StageContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InterceptorContext:
    inputs: Any = {name: ctx.inputs[name] for name in ctx.inputs}
    if not inputs:
        inputs = {f"argument {place}": value for place, value in enumerate(args) if value is not ctx}
        inputs.update((name, value) for name, value in kwargs.items() if value is not ctx)
    return InterceptorContext(
        stage=ctx.stage_name,
        run_id=ctx.run_id,
        services=WorkerServices(ctx.run_id),
        emit=ctx.emit,
        now=time.monotonic,
        attempt=ctx.attempt,
        item=ctx.item,
        lane=ctx.lane,
        kind=str(ctx.kind),
        inputs=inputs,
        snapshot=ctx.snapshot,
    )


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _stepping(steps: Generator[Any, Any, Any], port: WorkerPort) -> Any:
    """Drive the steps in this thread; an awaitable among them runs on the loop that the thread keeps."""
    from stageflow.context.attempt import run_coroutine

    given: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(given) if error is None else steps.throw(error)
        except StopIteration as over:
            return over.value
        given, error = step, None
        if inspect.isawaitable(step):
            try:
                given = run_coroutine(_of(step), port)
            except BaseException as raised:
                error = raised


async def _awaiting(steps: Generator[Any, Any, Any]) -> Any:
    """Drive the steps on the running loop."""
    given: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(given) if error is None else steps.throw(error)
        except StopIteration as over:
            return over.value
        given, error = step, None
        if inspect.isawaitable(step):
            try:
                given = await step
            except BaseException as raised:
                error = raised


async def _of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
