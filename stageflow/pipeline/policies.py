"""Policies as values: what a stage asks for. Nothing here waits, rolls dice or reads a clock.

Every keyword of the builder and of `@stage` is a field of `Policies`; its default is the field's default. Durations are
in seconds unless the name says `_ms`; sizes are bytes or text like "512MB" (KB = 1000) and "4GiB" (KiB = 1024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, Final, Self

import msgspec
from msgspec.structs import force_setattr

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import FailureMode, Lane
from stageflow.pipeline.names import did_you_mean, nearest


class PolicyError(DefinitionError):
    """A policy has a value it cannot have (fields `policy`, `field`, `got`)."""

    code = "SF-POLICY"


def _wrong(policy: str, field: str, got: object, want: str) -> PolicyError:
    return PolicyError(
        f"{policy}: {field}={got!r} is not possible",
        hint=f"It must be {want}.",
        policy=policy,
        field=field,
        got=repr(got),
    )


def _number(policy: str, field: str, value: object, *, least: float, above: bool = False) -> None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or value < least or (above and value == least):  # type: ignore[operator]
        raise _wrong(policy, field, value, f"a number {'above' if above else 'of at least'} {least:g}")


def _count(policy: str, field: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _wrong(policy, field, value, f"a whole number of at least {least}")


# ---------------------------------------------------------------- sizes and rates

_UNITS: Final[dict[str, int]] = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgtp", start=1)
    for unit, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}i", 1024), (f"{letter}ib", 1024))
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_size(size: int | float | str) -> int:
    """Bytes of `size`: a number of bytes, or text such as "512MB" (10^6) or "4GiB" (2^30)."""
    given: Any = size
    if isinstance(given, str):
        match = _SIZE.fullmatch(given)
        if match and (unit := _UNITS.get(match[2].lower())):
            return round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(given, int | float) and not isinstance(given, bool) and given >= 0 and math.isfinite(given):
        return int(given)
    raise _wrong("size", "value", size, 'bytes as a number, or text such as "512MB" or "4GiB"')


_PERIODS: Final = {
    **dict.fromkeys(("s", "sec", "second"), 1.0),
    **dict.fromkeys(("m", "min", "minute"), 60.0),
    **dict.fromkeys(("h", "hour"), 3600.0),
    **dict.fromkeys(("d", "day"), 86400.0),
    "ms": 0.001,
}
_RATE: Final = re.compile(r"\s*(\d+(?:\.\d*)?)\s*/\s*(\d+(?:\.\d*)?)?\s*([a-zA-Z]+)\s*")


class Rate(msgspec.Struct, frozen=True):
    """At most `count` starts in any `seconds`."""

    count: float
    seconds: float = 1.0

    def __post_init__(self) -> None:
        _number("rate", "count", self.count, least=0, above=True)
        _number("rate", "seconds", self.seconds, least=0, above=True)

    def __str__(self) -> str:
        unit = {1.0: "s", 60.0: "min", 3600.0: "h", 86400.0: "d"}.get(self.seconds)
        return f"{self.count:g}/{unit}" if unit else f"{self.count:g}/{self.seconds:g}s"

    @property
    def per_second(self) -> float:
        """Starts per second."""
        return self.count / self.seconds

    @classmethod
    def parse(cls, rate: float | str | Rate) -> Rate:
        """`10` is ten per second; "100/min", "5/s" and "30/10s" say their period."""
        if isinstance(rate, Rate):
            return rate
        if isinstance(rate, str):
            match = _RATE.fullmatch(rate)
            if match and (period := _PERIODS.get(match[3].lower())):
                return cls(float(match[1]), period * float(match[2] or 1))
            raise _wrong("rate", "rate", rate, 'a number per second, or text such as "100/min" or "30/10s"')
        _number("rate", "rate", rate, least=0, above=True)
        return cls(float(rate))


# ---------------------------------------------------------------- retry


class BackoffStrategy(StrEnum):
    """How the delay grows with the number of attempts."""

    EXPONENTIAL = "exponential"  #: base, 2 base, 4 base, ...
    LINEAR = "linear"  #: base, 2 base, 3 base, ...
    CONSTANT = "constant"  #: base, base, base, ...


class JitterStrategy(StrEnum):
    """How a delay d is spread so that many clients do not come back at once."""

    NONE = "none"  #: d
    FULL = "full"  #: evenly from 0 to d
    EQUAL = "equal"  #: evenly from d/2 to d
    DECORRELATED = "decorrelated"  #: evenly from base to three times the previous delay; ignores the backoff


class RetryConfig(msgspec.Struct, frozen=True):
    """When and how often an attempt is repeated. `max_attempts` counts the first call.

    `retry_on` is a tuple of exception types, a predicate on `error_info`, or a tenacity retry strategy. `wait` and
    `stop` take any tenacity strategy and then replace the formula and `max_attempts`. `seed` makes the jitter of this
    stage its own.
    """

    max_attempts: int = 3
    base_delay_ms: float = 1000
    max_delay_ms: float = 30000
    backoff: BackoffStrategy = BackoffStrategy.EXPONENTIAL
    jitter: JitterStrategy = JitterStrategy.FULL
    retry_on: Any = None
    wait: Any = None
    stop: Any = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _count("retry", "max_attempts", self.max_attempts, least=1)
        _number("retry", "base_delay_ms", self.base_delay_ms, least=0)
        _number("retry", "max_delay_ms", self.max_delay_ms, least=0)
        for field, kind in (("backoff", BackoffStrategy), ("jitter", JitterStrategy)):
            value = getattr(self, field)
            try:
                force_setattr(self, field, kind(value))
            except ValueError:
                raise _wrong("retry", field, value, f"one of {', '.join(kind)}") from None
        if isinstance(self.retry_on, type):
            force_setattr(self, "retry_on", (self.retry_on,))
        if isinstance(self.retry_on, list):
            force_setattr(self, "retry_on", tuple(self.retry_on))
        types = self.retry_on
        if isinstance(types, tuple):
            if not types or not all(isinstance(one, type) and issubclass(one, BaseException) for one in types):
                raise _wrong(
                    "retry", "retry_on", types, "a tuple of exception types, a predicate or a tenacity strategy"
                )
        elif types is not None and not callable(types):
            raise _wrong("retry", "retry_on", types, "a tuple of exception types, a predicate or a tenacity strategy")
        for field in ("wait", "stop"):
            value = getattr(self, field)
            if value is not None and not callable(value):
                raise _wrong("retry", field, value, "a tenacity strategy or another callable that takes a retry state")
        if self.seed is not None:
            _count("retry", "seed", self.seed, least=0)

    @property
    def uses_strategies(self) -> bool:
        """True when the verdict needs a callable (`wait`, `stop`, or a `retry_on` that is no tuple of types)."""
        return self.wait is not None or self.stop is not None or callable(self.retry_on)

    def delay_after(self, attempt: int, previous: float | None, roll: float) -> float:
        """Seconds to wait once attempt number `attempt` (1-based) has failed. `roll` in [0, 1) is the jitter.

        `previous` is the delay before that attempt, None for the first; only decorrelated jitter looks at it. Never
        above `max_delay_ms`. Does not ask whether an attempt is left.
        """
        base, cap = self.base_delay_ms, self.max_delay_ms
        if self.jitter is JitterStrategy.DECORRELATED:
            last = base if previous is None else previous * 1000.0
            low = min(base, cap)
            high = max(low, min(cap, 3.0 * last))
            return (low + roll * (high - low)) / 1000.0
        if self.backoff is BackoffStrategy.EXPONENTIAL:
            # 2.0 ** 1024 overflows; by then every positive base is far above any cap
            delay = base * 2.0 ** min(attempt - 1, 1000) if base else 0.0
        elif self.backoff is BackoffStrategy.LINEAR:
            delay = base * attempt
        else:
            delay = base
        delay = min(delay, cap)
        if self.jitter is JitterStrategy.FULL:
            delay *= roll
        elif self.jitter is JitterStrategy.EQUAL:
            delay = delay / 2 + roll * delay / 2
        return delay / 1000.0

    def _with(self, **changes: Any) -> RetryConfig:
        return msgspec.structs.replace(self, **changes)

    def with_max_attempts(self, max_attempts: int) -> RetryConfig:
        """A copy with another number of attempts, the first call included."""
        return self._with(max_attempts=max_attempts)

    def with_base_delay_ms(self, base_delay_ms: float) -> RetryConfig:
        """A copy with another first delay."""
        return self._with(base_delay_ms=base_delay_ms)

    def with_max_delay_ms(self, max_delay_ms: float) -> RetryConfig:
        """A copy with another cap."""
        return self._with(max_delay_ms=max_delay_ms)

    def with_backoff(self, backoff: BackoffStrategy) -> RetryConfig:
        """A copy with another growth."""
        return self._with(backoff=backoff)

    def with_jitter(self, jitter: JitterStrategy) -> RetryConfig:
        """A copy with another spread."""
        return self._with(jitter=jitter)

    def with_retry_on(self, retry_on: Any) -> RetryConfig:
        """A copy that retries other errors."""
        return self._with(retry_on=retry_on)

    def with_wait(self, wait: Any) -> RetryConfig:
        """A copy with a tenacity wait strategy."""
        return self._with(wait=wait)

    def with_stop(self, stop: Any) -> RetryConfig:
        """A copy with a tenacity stop strategy."""
        return self._with(stop=stop)

    def with_seed(self, seed: int | None) -> RetryConfig:
        """A copy with a jitter of its own."""
        return self._with(seed=seed)


# ---------------------------------------------------------------- idempotency, guards, resources


class IdempotencyConfig(msgspec.Struct, frozen=True):
    """Do the work once per key.

    `key` is text or a function of the stage's inputs; None derives it from stage and inputs.

    Successes are kept `ttl_seconds` (None: for ever). `fields` restricts the parameters that are compared with the
    first call's.
    """

    key: str | Callable[..., str] | None = None
    ttl_seconds: float | None = 3600
    fields: tuple[str, ...] | None = None
    enforce_params_match: bool = True

    def __post_init__(self) -> None:
        key: Any = self.key
        if key is not None and not callable(key) and not (isinstance(key, str) and key):
            raise _wrong("idempotency", "key", self.key, "text, a function of the inputs, or None")
        if self.ttl_seconds is not None:
            _number("idempotency", "ttl_seconds", self.ttl_seconds, least=0, above=True)
        force_setattr(self, "fields", _field_names("idempotency", "fields", self.fields))


class GuardRetryPolicy(msgspec.Struct, frozen=True):
    """When this guard FAILs, run `retry_stage` and the path to the guard again.

    `max_attempts` counts the guard's failures, so 2 means one more run. `stagnation_limit` ends it after so many
    repeats of an unchanged failure, `timeout_seconds` after that long since the first. `hash_fields` restricts the data
    that is compared.
    """

    retry_stage: str
    max_attempts: int = 2
    stagnation_limit: int = 2
    hash_fields: tuple[str, ...] | None = None
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        retry_stage: Any = self.retry_stage
        if not isinstance(retry_stage, str) or not retry_stage.strip():
            raise _wrong("guard_retry", "retry_stage", self.retry_stage, "the name of a stage upstream of the guard")
        _count("guard_retry", "max_attempts", self.max_attempts, least=1)
        _count("guard_retry", "stagnation_limit", self.stagnation_limit, least=1)
        force_setattr(self, "hash_fields", _field_names("guard_retry", "hash_fields", self.hash_fields))
        if self.timeout_seconds is not None:
            _number("guard_retry", "timeout_seconds", self.timeout_seconds, least=0, above=True)


def _field_names(policy: str, field: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(one, str) for one in value):
        raise _wrong(policy, field, value, "a sequence of field names")
    return tuple(value)


class Resources(msgspec.Struct, frozen=True):
    """What one attempt needs while it runs.

    `cpu` None means 1 in the process lane and 0 elsewhere; `memory` (bytes or text; None = as measured) is reserved;
    `tokens` are counted names such as {"gpu": 1}, of which the engine hands out as many as it was given.
    """

    cpu: float | None = None
    memory: int | str | None = None
    tokens: dict[str, int] = {}

    def __post_init__(self) -> None:
        if self.cpu is not None:
            _number("resources", "cpu", self.cpu, least=0)
        if self.memory is not None:
            force_setattr(self, "memory", parse_size(self.memory))
        tokens: Any = self.tokens
        if not isinstance(tokens, Mapping):
            raise _wrong("resources", "tokens", tokens, 'a mapping of names to counts, such as {"gpu": 1}')
        for name, count in tokens.items():
            if not isinstance(name, str) or not name:
                raise _wrong("resources", "tokens", self.tokens, "a mapping whose names are text")
            _count("resources", f"tokens[{name!r}]", count, least=1)
        force_setattr(self, "tokens", dict(tokens))

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as bytes (which it is, whatever it was given as)."""
        return None if self.memory is None else parse_size(self.memory)

    def __hash__(self) -> int:
        return hash((self.cpu, self.memory, frozenset(self.tokens.items())))


# ---------------------------------------------------------------- all of them


def asks_for_worker(interceptor: Any) -> bool:
    """Whether the hooks of an interceptor are to be called where the attempt runs."""
    return bool(getattr(interceptor, "in_worker", False))


class Policies(msgspec.Struct, frozen=True, kw_only=True):
    """Every policy of one stage. Fields have their defaults where a stage says nothing; equal values are shared."""

    retry: RetryConfig | None = None
    timeout: float | None = None  #: seconds per attempt, from entry of the function to its return
    total_timeout: float | None = None  #: seconds from first start to final end, all waits included
    idempotency: IdempotencyConfig | None = None
    resources: Resources | None = None
    concurrency: int | None = None  #: attempts at once, over all runs of the engine
    priority: int = 0  #: higher first
    contract: Any = None  #: a type that every value must fit
    on_failure: FailureMode | None = None  #: None = the run's mode
    rate: Rate | None = None
    interceptors: tuple[Any, ...] = ()
    conditional: bool = False  #: skipped when any dependency was skipped
    guard_retry: GuardRetryPolicy | None = None
    fuse: bool | None = None  #: None = where it is safe and pays
    max_failed_items: int | float | None = None  #: a count (int) or a fraction of the items (float up to 1.0)
    isolate: bool = False  #: copies of its own of all its inputs, which it may change
    #: give buffers as private writable copies instead of read-only views: of all inputs, or of the parameters named
    writable: bool | tuple[str, ...] = False
    replayable: bool = False  #: a generator that yields the same again may be retried after it has yielded
    when: Any = None  #: a branch name, (router, branch), or a predicate on StageInputs
    batch: int | None = None
    batch_seconds: float | None = None
    ordered: bool | None = None  #: None = True
    keep: bool | None = None  #: None = keep what nobody consumes
    spill: bool = True
    executor: str | None = None  #: a lane; None = the placement table decides

    def __post_init__(self) -> None:
        for field in ("timeout", "total_timeout", "batch_seconds"):
            if (value := getattr(self, field)) is not None:
                _number("stage", field, value, least=0, above=True)
        for field in ("concurrency", "batch"):
            if (value := getattr(self, field)) is not None:
                _count("stage", field, value, least=1)
        priority: Any = self.priority
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise _wrong("stage", "priority", self.priority, "a whole number; higher goes first")
        for field in ("conditional", "isolate", "replayable", "spill"):
            if not isinstance(getattr(self, field), bool):
                raise _wrong("stage", field, getattr(self, field), "True or False")
        for field in ("fuse", "ordered", "keep"):
            if getattr(self, field) not in (None, True, False):
                raise _wrong("stage", field, getattr(self, field), "True, False or None")
        for field, kind in _STRUCTS:
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise _wrong("stage", field, value, f"a {kind.__name__}(...) or None")
        self._normalise()

    def _normalise(self) -> None:
        writable: Any = self.writable
        if not isinstance(writable, bool):
            several = isinstance(writable, Iterable) and not isinstance(writable, str)
            names = list(writable) if several else [writable]
            if not all(isinstance(one, str) for one in names):
                raise _wrong("stage", "writable", writable, "True, False, or names of parameters")
            force_setattr(self, "writable", tuple(sorted(set(names))))
        if self.rate is not None:
            force_setattr(self, "rate", Rate.parse(self.rate))
        if self.on_failure is not None:
            try:
                force_setattr(self, "on_failure", FailureMode(self.on_failure))
            except ValueError:
                raise _wrong("stage", "on_failure", self.on_failure, f"one of {', '.join(FailureMode)}") from None
        if self.executor is not None:
            try:
                force_setattr(self, "executor", Lane(self.executor))
            except ValueError:
                near = did_you_mean(str(self.executor), [str(lane) for lane in Lane], what="Lanes")
                raise PolicyError(f"stage: there is no lane {self.executor!r}", hint=near, field="executor") from None
        budget = self.max_failed_items
        if budget is not None:
            _number("stage", "max_failed_items", budget, least=0)
            if isinstance(budget, float) and budget > 1.0:
                raise _wrong("stage", "max_failed_items", budget, "a count (int) or a fraction from 0.0 to 1.0")
        interceptors: Any = self.interceptors
        if not isinstance(interceptors, tuple):
            several = isinstance(interceptors, Iterable)
            force_setattr(self, "interceptors", tuple(interceptors) if several else (interceptors,))
        when = self.when
        pair = isinstance(when, tuple | list) and len(when) == 2 and all(isinstance(one, str) and one for one in when)
        if pair:
            force_setattr(self, "when", tuple(when))
        elif when is not None and not callable(when) and not (isinstance(when, str) and when):
            raise _wrong("stage", "when", when, "a branch name, a pair (router, branch), or a predicate on StageInputs")

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their default."""
        if self is DEFAULT_POLICIES:
            return {}
        names = self.__struct_fields__
        return {n: v for n in names if (v := getattr(self, n)) != getattr(DEFAULT_POLICIES, n)}

    def quiet(self) -> bool:
        """Whether an attempt of a plain stage starts and succeeds as if it had no policies at all."""
        return self is DEFAULT_POLICIES or QUIET_POLICIES.issuperset(self.changed())


_STRUCTS: Final = (
    ("retry", RetryConfig),
    ("idempotency", IdempotencyConfig),
    ("resources", Resources),
    ("guard_retry", GuardRetryPolicy),
)
POLICY_NAMES: Final = frozenset(Policies.__struct_fields__)
#: what says where a stage runs, in what order, what its value must be or what its failure means: nobody is asked
#: anything before an attempt of it starts, or when it has succeeded
QUIET_POLICIES: Final = frozenset(
    {"contract", "executor", "fuse", "keep", "on_failure", "priority", "replayable", "spill", "writable", "isolate"}
)
#: what a stage without policies has: one object, however many stages
DEFAULT_POLICIES: Final = Policies()

#: elements that a source is asked for at once, and that may wait unread behind it
SOURCE_AHEAD: Final = 8192


class PolicyPool:
    """Makes `Policies` from keywords and hands out one object for equal ones."""

    __slots__ = ("_by_keywords", "_by_value")

    def __init__(self) -> None:
        self._by_keywords: dict[tuple[Any, ...], Policies] = {}
        self._by_value: dict[Policies, Policies] = {DEFAULT_POLICIES: DEFAULT_POLICIES}

    def make(self, keywords: Mapping[str, Any], *, where: str) -> Policies:
        """The policies these keywords describe; None means the default. `where` begins the message of an error.

        Raises:
            DefinitionError: an unknown keyword (with the nearest name), or a value that is not possible.
        """
        if not keywords:
            return DEFAULT_POLICIES
        key: tuple[Any, ...] | None = tuple((name, type(value), value) for name, value in keywords.items())
        try:
            if (known := self._by_keywords.get(key)) is not None:  # type: ignore[arg-type]
                return known
        except TypeError:
            key = None  # a value that cannot be hashed is compared by nobody and simply made
        check_keywords(keywords, where=where)
        try:
            made = Policies(**{name: value for name, value in keywords.items() if value is not None})
        except PolicyError as error:
            error.message = f"{where}: {error.message}"
            error.args = (error.message,)
            raise
        try:
            made = self._by_value.setdefault(made, made)
        except TypeError:
            key = None
        if key is not None:
            self._by_keywords[key] = made
        return made

    def copy(self) -> Self:
        """A pool that starts with what this one has."""
        twin = type(self)()
        twin._by_keywords.update(self._by_keywords)
        twin._by_value.update(self._by_value)
        return twin


def check_keywords(keywords: Mapping[str, Any], *, where: str, also: tuple[str, ...] = ()) -> None:
    """Raise DefinitionError for the first keyword that is no policy (nor in `also`), naming the nearest."""
    for name in keywords:
        if name not in POLICY_NAMES and name not in also:
            known = sorted(POLICY_NAMES | set(also))
            near = nearest(name, known)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keywords: {', '.join(known)}."
            raise DefinitionError(f"{where}: there is no keyword {name!r}", hint=hint, keyword=name, nearest=near)
