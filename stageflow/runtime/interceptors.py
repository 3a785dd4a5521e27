"""Applies a chain of interceptors around one attempt, on the loop of its run, whatever the attempt's lane."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from stageflow.context.interception import Gate, InterceptorContext, Scope
from stageflow.core.errors import StageCancelledError, StageTimeoutError
from stageflow.core.failure import capture
from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.pipeline.interceptors import InterceptorChain, check_output

_log = logging.getLogger("stageflow.interceptors")
_UNREAD: Final = object()


class LazyOutput:
    """A `StageOutput` whose data is decoded when it is first read. Everything else answers at once.

    `output` is the outcome without its data, `load` decodes. `decoded` tells whether somebody has read it.
    """

    __slots__ = ("_data", "_load", "output")

    def __init__(self, output: StageOutput, load: Callable[[], Any]) -> None:
        self.output = output
        self._load = load
        self._data: Any = _UNREAD

    @property
    def data(self) -> Any:
        """The value, decoded on first use."""
        if self._data is _UNREAD:
            self._data = self._load()
        return self._data

    @property
    def decoded(self) -> bool:
        """True once the data was read."""
        return self._data is not _UNREAD

    def materialise(self) -> StageOutput:
        """The same as a `StageOutput`, decoded."""
        return msgspec.structs.replace(self.output, data=self.data)

    def __getattr__(self, name: str) -> Any:
        # Fields answer without decoding; methods such as `with_data` and `to_dict` work on the whole.
        if name in StageOutput.__struct_fields__ or name in ("is_success", "is_failure", "is_retryable"):
            return getattr(self.output, name)
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.materialise(), name)

    def __repr__(self) -> str:
        return f"<LazyOutput {self.output.status}{' decoded' if self.decoded else ''}>"


class InterceptorStates:
    """What interceptors keep: one of these per run, over one per engine. Thread-safe."""

    def __init__(self, engine: InterceptorStates | None = None) -> None:
        self.engine = engine if engine is not None else self
        self.lock = threading.RLock()
        # The owner is kept as well, so that its id is not given to another while its state is here.
        self._kept: dict[int, tuple[Any, Any]] = {}

    def get(self, owner: Any, factory: Callable[[], Any], scope: Scope) -> Any:
        """The state of `owner` in this run, or in the engine."""
        home = self.engine if scope == "engine" else self
        with home.lock:
            found = home._kept.get(id(owner))
            if found is None:
                found = home._kept[id(owner)] = (owner, factory())
            return found[1]


class InterceptorServices:
    """The `Services` of the interceptors of one run, on its loop. `sleep` may be replaced by one of a virtual clock."""

    __slots__ = ("_gate", "_later", "_sleep", "states")

    def __init__(
        self,
        states: InterceptorStates | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] | None = None,
        gate: Callable[[], Gate] | None = None,
        later: Callable[[float, Callable[[], Any]], Any] | None = None,
    ) -> None:
        self.states = states if states is not None else InterceptorStates()
        self._sleep: Callable[[float], Awaitable[None]] = sleep or _asyncio_sleep
        self._gate = gate
        self._later = later

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Wait so many seconds."""
        return self._sleep(seconds)

    def gate(self) -> Gate:
        """A future of the running loop."""
        if self._gate is not None:
            return self._gate()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        return future

    def later(self, seconds: float, callback: Callable[[], Any]) -> Any:
        """Call back in so many seconds; what is returned has `cancel()`."""
        if self._later is not None:
            return self._later(seconds, callback)
        return asyncio.get_running_loop().call_later(seconds, callback)

    def log(self, level: int, message: str, fields: dict[str, Any]) -> None:
        """Write to the logger `stageflow.interceptors`; the fields become attributes of the record."""
        _log.log(level, "%s", message, extra=fields)

    def digest(self, value: Any) -> str:
        """SHA-256 of the content."""
        from stageflow.store.keys import digest

        return digest(value)

    def state(self, owner: Any, factory: Callable[[], Any], scope: Scope) -> Any:
        """What the interceptor keeps."""
        return self.states.get(owner, factory, scope)

    @property
    def engine_lock(self) -> threading.RLock:
        """Held around the sync hooks of interceptors whose state several loops share."""
        return self.states.engine.lock


async def _asyncio_sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


Attempt = Callable[[], Awaitable[Any]]


async def run_intercepted(
    chain: InterceptorChain,
    ctx: InterceptorContext,
    attempt: Attempt,
    *,
    enforce_timeout: bool = True,
) -> StageOutput | LazyOutput:
    """The outcome of `attempt()` with the chain around it.

    `before` runs from low to high priority; the first output it returns takes the attempt's place. `on_error` is
    asked in the same order about a FAIL, and the first output recovers. `after` runs in reverse, for those that were
    entered, whatever the outcome. `leave` runs last, in reverse, also when the attempt is cancelled. An exception of
    the attempt or of a hook becomes a FAIL; cancellation passes through. The very object that `attempt` returned
    comes back if nobody exchanged it, so that an output whose data nobody read is never decoded.

    `attempt` must stop its work when it is cancelled: that is how `TimeoutInterceptor` ends it (unless
    `enforce_timeout=False`, for a caller that applies `chain.timeout` itself).
    """
    entered: list[Any] = []
    try:
        output = await _before(chain, ctx, entered)
        if output is None:
            output = await _attempt(ctx, attempt, chain.timeout if enforce_timeout else None)
        output = await _on_error(entered, ctx, output)
        final: StageOutput | LazyOutput = await _after(entered, ctx, output)
        return final
    finally:
        for interceptor in reversed(entered):
            leave = getattr(interceptor, "leave", None)
            if leave is not None:
                try:
                    await _call(interceptor, ctx, leave, ctx)
                except Exception:
                    _log.exception("leave of %s raised", type(interceptor).__name__)


async def _call(interceptor: Any, ctx: InterceptorContext, hook: Callable[..., Any], *arguments: Any) -> Any:
    lock = getattr(ctx.services, "engine_lock", None)
    if lock is not None and getattr(interceptor, "scope", "run") == "engine":
        with lock:
            returned = hook(*arguments)
    else:
        returned = hook(*arguments)
    return await returned if inspect.isawaitable(returned) else returned


async def _before(chain: InterceptorChain, ctx: InterceptorContext, entered: list[Any]) -> Any:
    for interceptor in chain:
        hook = getattr(interceptor, "before", None)
        output = None
        if hook is not None:
            try:
                output = await _call(interceptor, ctx, hook, ctx)
                output = None if output is None else check_output(output, interceptor)
            except Exception as error:
                return failed(error, ctx)
        entered.append(interceptor)
        if output is not None:
            return output
    return None


async def _attempt(ctx: InterceptorContext, attempt: Attempt, limit: float | None) -> Any:
    started = ctx.now()
    loop = asyncio.get_running_loop()
    scope = asyncio.timeout(None)
    timer = None
    try:
        async with scope:
            if limit is not None:
                timer = ctx.services.later(limit, lambda: scope.reschedule(loop.time()))
            return await attempt()
    except StageCancelledError as error:
        return StageOutput.cancel(getattr(error, "reason", None) or error.message)
    except TimeoutError as error:
        if not scope.expired():
            return failed(error, ctx)
        elapsed = ctx.now() - started
        text = f"stage {ctx.stage!r} took longer than the {limit:g} s its interceptor allows"
        return failed(StageTimeoutError(text, stage=ctx.stage, elapsed=elapsed, limit=limit, retryable=True), ctx)
    except Exception as error:
        return failed(error, ctx)
    finally:
        if timer is not None:
            timer.cancel()


async def _on_error(entered: list[Any], ctx: InterceptorContext, output: Any) -> Any:
    if output.status is not StageStatus.FAIL:
        return output
    info = output.error_info
    if info is None:
        info = ErrorInfo(type="StageFailed", message=output.error or "", retryable=output.retryable)
    for interceptor in entered:
        hook = getattr(interceptor, "on_error", None)
        if hook is None:
            continue
        try:
            recovery = await _call(interceptor, ctx, hook, ctx, info)
            if recovery is not None:
                return check_output(recovery, interceptor)
        except Exception as error:
            return failed(error, ctx)
    return output


async def _after(entered: list[Any], ctx: InterceptorContext, output: Any) -> Any:
    for interceptor in reversed(entered):
        hook = getattr(interceptor, "after", None)
        if hook is None:
            continue
        try:
            output = check_output(await _call(interceptor, ctx, hook, ctx, output), interceptor)
        except Exception as error:
            output = failed(error, ctx)
    return output


def failed(error: BaseException, ctx: InterceptorContext) -> StageOutput:
    """The FAIL that an exception of this attempt amounts to."""
    info = capture(error, lane=ctx.lane or None, attempt=ctx.attempt, item=ctx.item)
    return StageOutput(StageStatus.FAIL, error=info.message, error_info=info, retryable=info.retryable)
