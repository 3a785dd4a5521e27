"""What may be wrapped around the attempts of a stage, as values; `stageflow.runtime.interceptors` applies them.

An interceptor is a frozen value and keeps nothing itself: what it counts lives in `ctx.state`, one per run (or per
engine), so that graphs stay re-entrant. It waits, logs and measures through its context and reads no clock of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import msgspec

from stageflow.context.interception import Gate, InterceptorContext, Scope
from stageflow.core.errors import CircuitOpenError, DefinitionError
from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo, StageOutput

INFO: Final = 20
WARNING: Final = 30


@runtime_checkable
class Interceptor(Protocol):
    """Called around every attempt. Each hook may be sync or async, and an implementation may leave any of them out.

    Lower `priority` is further out: its `before` comes first and its `after` last. What a hook raises is a FAIL of the
    attempt. `leave(ctx)`, if there is one, is called last, whatever happened, cancellation included.
    """

    priority: int

    def before(self, ctx: InterceptorContext) -> Any:
        """Return a StageOutput to take the attempt's place, or None to go on."""
        ...

    def after(self, ctx: InterceptorContext, output: Any) -> Any:
        """Return the output, or another."""
        ...

    def on_error(self, ctx: InterceptorContext, error: ErrorInfo) -> Any:
        """Return a StageOutput to recover with, or None to leave the failure as it is."""
        ...


class BaseInterceptor(msgspec.Struct, frozen=True, kw_only=True):
    """Does nothing at priority 0: override what is wanted. Equal values are still two interceptors.

    With `in_worker` the hooks are called where the attempt runs, beside the stage's function: in its worker, its thread
    or on the loop. What such a one keeps in `ctx.state` is kept per process. It is inside all those of the parent, does
    not see a worker die, and is sent with the stage's code.
    """

    priority: int = 0
    in_worker: bool = False
    scope: ClassVar[Scope] = "run"

    def before(self, ctx: InterceptorContext) -> Any:
        """Go on."""
        return None

    def after(self, ctx: InterceptorContext, output: Any) -> Any:
        """Keep the output."""
        return output

    def on_error(self, ctx: InterceptorContext, error: ErrorInfo) -> Any:
        """Leave the failure."""
        return None


class InterceptorChain:
    """Interceptors in the order they are entered: by priority, equal ones as given. Immutable."""

    __slots__ = ("interceptors",)

    def __init__(self, interceptors: Iterable[Any] = ()) -> None:
        listed = list(interceptors)
        for each in listed:
            if isinstance(each, type) or not any(hasattr(each, hook) for hook in ("before", "after", "on_error")):
                raise DefinitionError(
                    f"{each!r} is not an interceptor",
                    hint="an interceptor is an object with before, after or on_error",
                    field="interceptors",
                )
        self.interceptors: tuple[Any, ...] = tuple(sorted(listed, key=lambda each: getattr(each, "priority", 0)))

    def add(self, interceptor: Any) -> InterceptorChain:
        """A chain with one more."""
        return InterceptorChain((*self.interceptors, interceptor))

    @property
    def is_empty(self) -> bool:
        """True without interceptors."""
        return not self.interceptors

    @property
    def timeout(self) -> float | None:
        """Seconds an attempt may take by the strictest `TimeoutInterceptor`."""
        limits = [each.seconds for each in self.interceptors if isinstance(each, TimeoutInterceptor)]
        return min(limits, default=None)

    def __len__(self) -> int:
        return len(self.interceptors)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.interceptors)


def _parent_only(interceptor: BaseInterceptor) -> None:
    if interceptor.in_worker:
        raise DefinitionError(
            f"{type(interceptor).__name__} decides for all attempts at once and cannot be split over workers",
            hint="leave out in_worker=True",
            field="in_worker",
        )


def _positive(what: str, value: float) -> None:
    if not value > 0:
        raise DefinitionError(f"{what} must be greater than 0, not {value!r}", field=what)


# ---------------------------------------------------------------- built in


class TimeoutInterceptor(BaseInterceptor, frozen=True, kw_only=True):
    """Ends an attempt after so many seconds: it FAILs with `StageTimeoutError` and is stopped as the lane can."""

    seconds: float

    def __post_init__(self) -> None:
        _parent_only(self)
        _positive("seconds", self.seconds)


_COUNTED: Final = "counted"


class _Breaker:
    __slots__ = ("failures", "open_until", "probing")

    def __init__(self) -> None:
        self.failures = 0
        self.open_until: float | None = None
        self.probing = False


class CircuitBreaker(BaseInterceptor, frozen=True, kw_only=True):
    """Refuses attempts after `threshold` failures in a row, for `cooldown` seconds; then lets one through to try.

    A refusal is a failure (`CircuitOpenError`, retryable, with the seconds to wait) and changes nothing here. The
    trial's success closes the circuit, its failure opens it for another cooldown. FAIL and RETRY count as failures; a
    cancelled attempt counts as nothing. One breaker given to several stages is one circuit, shared by all runs of the
    engine.
    """

    priority: int = -20
    threshold: int = 5
    cooldown: float = 30.0
    scope: ClassVar[Scope] = "engine"

    def __post_init__(self) -> None:
        _parent_only(self)
        _positive("threshold", self.threshold)
        _positive("cooldown", self.cooldown)

    def status(self, ctx: InterceptorContext) -> str:
        """ "closed", "open" or "half_open"."""
        circuit = ctx.state(self, _Breaker, self.scope)
        if circuit.open_until is None:
            return "closed"
        return "half_open" if circuit.probing or ctx.now() >= circuit.open_until else "open"

    def before(self, ctx: InterceptorContext) -> Any:
        """Refuse while the circuit is open, or while its trial runs."""
        circuit = ctx.state(self, _Breaker, self.scope)
        trial = False
        if circuit.open_until is not None:
            left = circuit.open_until - ctx.now()
            if left > 0 or circuit.probing:
                after = max(left, 0.0)
                raise CircuitOpenError(
                    f"the circuit of stage {ctx.stage!r} is open after {circuit.failures} failures in a row",
                    hint=f"it tries again in {after:.3g} s" if left > 0 else "its trial is still running",
                    stage=ctx.stage,
                    retryable=True,
                    retry_after=after,
                )
            circuit.probing = trial = True
        ctx.remember(self, trial)
        return None

    def on_error(self, ctx: InterceptorContext, error: ErrorInfo) -> Any:
        """Count the failure, even if another interceptor recovers from it."""
        self._count(ctx, False)
        ctx.remember(self, _COUNTED)
        return None

    def after(self, ctx: InterceptorContext, output: Any) -> Any:
        """Count the outcome."""
        if ctx.memory.get(id(self)) is _COUNTED:
            ctx.recall(self)
        elif output.status is not StageStatus.CANCEL:
            self._count(ctx, output.status in (StageStatus.OK, StageStatus.SKIP))
        return output

    def leave(self, ctx: InterceptorContext) -> None:
        """A trial that came to nothing makes room for another."""
        if ctx.recall(self, False) is True:
            ctx.state(self, _Breaker, self.scope).probing = False

    def _count(self, ctx: InterceptorContext, success: bool) -> None:
        circuit = ctx.state(self, _Breaker, self.scope)
        trial = ctx.recall(self, False)
        if trial:
            circuit.probing = False
        elif circuit.open_until is not None:
            return  # it began before the circuit opened: only the trial decides now
        if success:
            circuit.failures, circuit.open_until = 0, None
            if trial:
                ctx.emit("circuit.closed", {"stage": ctx.stage})
            return
        circuit.failures += 1
        if trial or circuit.failures >= self.threshold:
            circuit.open_until = ctx.now() + self.cooldown
            data = {"stage": ctx.stage, "failures": circuit.failures, "cooldown": self.cooldown}
            ctx.emit("circuit.opened", data)


class _Bucket:
    __slots__ = ("free_at",)

    def __init__(self) -> None:
        self.free_at = float("-inf")


class RateLimit(BaseInterceptor, frozen=True, kw_only=True):
    """At most `rate` attempts a second, `burst` of them at once after a pause; the others wait their turn, in order.

    A token bucket, one per run; one value given to several stages is one bucket.
    """

    rate: float
    burst: int = 1

    def __post_init__(self) -> None:
        _parent_only(self)
        _positive("rate", self.rate)
        _positive("burst", self.burst)

    async def before(self, ctx: InterceptorContext) -> Any:
        """Take a token, waiting for it if need be."""
        bucket = ctx.state(self, _Bucket, self.scope)
        # The bucket as one number: when its next token is due. It never lies further back than a full bucket.
        now, step = ctx.now(), 1.0 / self.rate
        due = max(bucket.free_at, now - (self.burst - 1) * step)
        bucket.free_at = due + step
        if due > now:
            await ctx.services.sleep(due - now)
        return None


class _Slots:
    __slots__ = ("taken", "waiting")

    def __init__(self) -> None:
        self.taken = 0
        self.waiting: list[Gate] = []


class ConcurrencyLimit(BaseInterceptor, frozen=True, kw_only=True):
    """At most `limit` attempts at once in a run, of all stages that have this very value; others wait, in order."""

    limit: int

    def __post_init__(self) -> None:
        _parent_only(self)
        _positive("limit", self.limit)

    async def before(self, ctx: InterceptorContext) -> Any:
        """Take a slot, waiting for it if need be."""
        slots = ctx.state(self, _Slots, self.scope)
        if slots.taken < self.limit:
            slots.taken += 1
        else:
            gate = ctx.services.gate()
            slots.waiting.append(gate)
            try:
                await gate
            except BaseException:
                if gate in slots.waiting:
                    slots.waiting.remove(gate)
                else:
                    self._free(slots)  # the slot came in the same instant
                raise
        ctx.remember(self, True)
        return None

    def leave(self, ctx: InterceptorContext) -> None:
        """Hand the slot to the next in line."""
        if ctx.recall(self, False):
            self._free(ctx.state(self, _Slots, self.scope))

    @staticmethod
    def _free(slots: _Slots) -> None:
        while slots.waiting:
            gate = slots.waiting.pop(0)
            if not gate.done():
                gate.set_result(None)
                return
        slots.taken -= 1


class LoggingInterceptor(BaseInterceptor, frozen=True, kw_only=True):
    """Writes a line when an attempt starts and ends. `level` is a number as in the standard library (20 is INFO)."""

    priority: int = -10
    level: int = INFO

    def before(self, ctx: InterceptorContext) -> Any:
        """Log the start."""
        ctx.remember(self, ctx.now())
        ctx.services.log(self.level, f"{ctx.stage}: attempt {ctx.attempt} starts", self._fields(ctx))
        return None

    def after(self, ctx: InterceptorContext, output: Any) -> Any:
        """Log the end."""
        seconds = ctx.now() - ctx.recall(self, ctx.now())
        failed = output.status in (StageStatus.FAIL, StageStatus.CANCEL)
        why = f": {output.error or output.cancel_reason}" if failed else ""
        text = f"{ctx.stage}: attempt {ctx.attempt} ended {output.status} after {seconds * 1000:.1f} ms{why}"
        ctx.services.log(WARNING if failed else self.level, text, {**self._fields(ctx), "seconds": seconds})
        return output

    @staticmethod
    def _fields(ctx: InterceptorContext) -> dict[str, Any]:
        return {"run_id": ctx.run_id, "stage": ctx.stage, "attempt": ctx.attempt, "item": ctx.item, "lane": ctx.lane}


class MetricsInterceptor(BaseInterceptor, frozen=True, kw_only=True):
    """Emits `stage.metrics` after every attempt: `stage, attempt, lane, status, seconds, retryable`."""

    priority: int = -10

    def before(self, ctx: InterceptorContext) -> Any:
        """Note the time."""
        ctx.remember(self, ctx.now())
        return None

    def after(self, ctx: InterceptorContext, output: Any) -> Any:
        """Emit the numbers."""
        data = {
            "stage": ctx.stage,
            "attempt": ctx.attempt,
            "lane": ctx.lane,
            "status": str(output.status),
            "seconds": ctx.now() - ctx.recall(self, ctx.now()),
            "retryable": bool(output.retryable),
        }
        ctx.emit("stage.metrics", data)
        return output


class ImmutabilityCheck(BaseInterceptor, frozen=True, kw_only=True):
    """FAILs an attempt that changed its inputs or the snapshot. Hashes all of them twice: for tests.

    It sees what is in this process: a stage in a worker changes its own copy, which harms nobody. With
    `in_worker=True` it looks at that copy, and finds the offender in every lane alike.
    """

    priority: int = -50

    def before(self, ctx: InterceptorContext) -> Any:
        """Hash everything."""
        ctx.remember(self, self._hashes(ctx))
        return None

    def after(self, ctx: InterceptorContext, output: Any) -> Any:
        """Hash again and compare."""
        was = ctx.recall(self)
        now = self._hashes(ctx)
        changed = [name for name in was if was[name] != now.get(name)] if was is not None else []
        if not changed:
            return output
        ctx.emit("stage.immutability_violated", {"stage": ctx.stage, "changed": changed})
        raise InputsChangedError(
            f"stage {ctx.stage!r} changed {', '.join(changed)}, which other stages may be reading",
            hint="work on a copy, or declare the stage isolate=True",
            stage=ctx.stage,
            changed=changed,
        )

    @staticmethod
    def _hashes(ctx: InterceptorContext) -> dict[str, str]:
        hashes = {"the snapshot": ctx.services.digest(ctx.snapshot)}
        items = getattr(ctx.inputs, "items", None)
        for name, value in items() if callable(items) else (("the inputs", ctx.inputs),):
            hashes[f"input {name!r}" if callable(items) else name] = ctx.services.digest(value)
        return hashes


class InputsChangedError(DefinitionError):
    """A stage changed what it was only lent (fields `stage`, `changed`)."""

    code = "SF-INPUTS-CHANGED"


class ContextSizeInterceptor(BaseInterceptor, frozen=True, kw_only=True):
    """Measures the snapshot and warns when it is near or above `max_bytes`. Never refuses anything.

    The size is that of its JSON form, with buffers at their own size. It is measured once per run.
    """

    priority: int = -40
    max_bytes: int = 1_048_576
    warn_threshold: float = 0.8

    def __post_init__(self) -> None:
        _positive("max_bytes", self.max_bytes)
        msgspec.structs.force_setattr(self, "warn_threshold", min(1.0, max(0.0, self.warn_threshold)))

    def before(self, ctx: InterceptorContext) -> Any:
        """Warn, the first time in a run."""
        sizes: dict[int, int] = ctx.state(self, dict, self.scope)
        if id(ctx.snapshot) in sizes:
            return None
        size = sizes[id(ctx.snapshot)] = size_of(ctx.snapshot)
        fields = {"run_id": ctx.run_id, "stage": ctx.stage, "size_bytes": size, "max_bytes": self.max_bytes}
        if size > self.max_bytes:
            ctx.services.log(WARNING, f"the snapshot has {size} bytes, more than {self.max_bytes}", fields)
        elif size > self.max_bytes * self.warn_threshold:
            share = size / self.max_bytes
            ctx.services.log(WARNING, f"the snapshot has {size} bytes, {share:.0%} of {self.max_bytes}", fields)
        return None

    def after(self, ctx: InterceptorContext, output: Any) -> Any:
        """Record the size as an event."""
        sizes: dict[int, int] = ctx.state(self, dict, self.scope)
        size = sizes.get(id(ctx.snapshot))
        ctx.emit("context.size_recorded", {"stage": ctx.stage, "size_bytes": size})
        return output


def size_of(value: Any) -> int:
    """Bytes of a value's JSON form; buffers count as they are, and what has no JSON form by its text."""
    buffers = 0

    def stand_in(part: Any) -> Any:
        nonlocal buffers
        nbytes = getattr(part, "nbytes", None)
        if isinstance(nbytes, int):
            buffers += nbytes
            return None
        return repr(part)

    try:
        return len(msgspec.json.encode(value, enc_hook=stand_in)) + buffers
    except (TypeError, ValueError, RecursionError):
        return len(repr(value)) + buffers


def check_output(value: Any, who: Any) -> Any:
    """What a hook returned, if it is an output. DefinitionError otherwise."""
    if isinstance(value, StageOutput) or (hasattr(value, "status") and hasattr(value, "materialise")):
        return value
    raise DefinitionError(
        f"interceptor {type(who).__name__} returned a {type(value).__name__} where a StageOutput was wanted",
        hint="`after` must return the output; `before` and `on_error` return a StageOutput or None",
    )
