"""Evaluates the retry strategies a user brings (tenacity's wait, stop and retry, or a predicate) when an attempt has
failed.

The scheduler stays pure: it only sees the verdict. tenacity's strategies need an object with a handful of attributes,
which is given
to them here, so tenacity itself is imported only by whoever made a strategy.
"""

from __future__ import annotations

import random
from typing import Any, Final

from stageflow.core.errors import StageTimeoutError
from stageflow.core.failure import revive
from stageflow.core.output import ErrorInfo
from stageflow.pipeline.policies import RetryConfig

#: type of the failures that a stage returned instead of raising
RETURNED: Final = "stageflow.StageOutput"


class _Outcome:
    """Stands for a finished future that holds an exception."""

    __slots__ = ("_error",)
    failed = True

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def exception(self) -> BaseException:
        """The failure."""
        return self._error

    def result(self) -> Any:
        """Raises the failure."""
        raise self._error


class Attempt:
    """What tenacity's strategies read of an attempt (its RetryCallState, without the clock)."""

    __slots__ = (
        "args",
        "attempt_number",
        "fn",
        "idle_for",
        "kwargs",
        "next_action",
        "outcome",
        "outcome_timestamp",
        "retry_object",
        "seconds_since_start",
        "start_time",
        "upcoming_sleep",
    )

    def __init__(self, error: BaseException, attempt: int, seconds: float, idle: float) -> None:
        self.outcome = _Outcome(error)
        self.attempt_number = attempt
        self.seconds_since_start = seconds
        self.idle_for = idle
        self.start_time = 0.0
        self.outcome_timestamp = seconds
        self.upcoming_sleep = 0.0
        self.next_action = None
        self.retry_object = None
        self.fn = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}


class Verdict:
    """What the scheduler is told: `retry` None leaves the decision to it; `wait` None leaves the formula to it."""

    __slots__ = ("broken", "retry", "roll", "wait")

    def __init__(
        self, retry: bool | None, wait: float | None, roll: float, broken: BaseException | None = None
    ) -> None:
        self.retry = retry
        self.wait = wait
        self.roll = roll
        self.broken = broken  # what a user's strategy raised


def judge(
    retry: RetryConfig | None,
    info: ErrorInfo | None,
    exception: BaseException | None,
    attempt: int,
    seconds: float,
    idle: float,
    dice: random.Random,
) -> Verdict:
    """The verdict on one failed attempt. `seconds` since the first start, of which `idle` were spent waiting."""
    if retry is None:
        return Verdict(None, None, 1.0)
    roll = dice.random()
    if not retry.uses_strategies and retry.retry_on is None:
        return Verdict(None, None, roll)
    try:
        return _judge(retry, info, exception, attempt, seconds, idle, roll)
    except Exception as broken:  # a user's strategy raised: the task ends with that error
        return Verdict(False, None, roll, broken)


def _judge(
    retry: RetryConfig,
    info: ErrorInfo | None,
    exception: BaseException | None,
    attempt: int,
    seconds: float,
    idle: float,
    roll: float,
) -> Verdict:
    again: bool | None = None
    error = exception
    if error is None and info is not None:
        error = revive(info)
    state = Attempt(error if error is not None else RuntimeError("failed"), attempt, seconds, idle)
    on = retry.retry_on
    if on is not None:
        if isinstance(on, tuple):
            # types choose among exceptions; what the stage itself called retryable is not theirs to refuse
            asked = info is not None and info.type == RETURNED
            again = asked or _matches(on, error, info)
        elif hasattr(on, "__module__") and type(on).__module__.startswith("tenacity"):
            again = bool(on(state))
        else:
            again = bool(on(info))
        if again is False:
            return Verdict(False, None, roll)
    wait: float | None = None
    if retry.wait is not None:
        wait = float(retry.wait(state))
        state.upcoming_sleep = wait
    if retry.stop is not None and retry.stop(state):
        return Verdict(False, None, roll)
    return Verdict(again, wait, roll)


def _matches(types: tuple[type, ...], error: BaseException | None, info: ErrorInfo | None) -> bool:
    """By the exception where it travelled, else by the name of its type. A timeout of ours is a TimeoutError too."""
    if error is not None and isinstance(error, types):
        return True
    if info is None:
        return False
    if info.code == StageTimeoutError.code and any(issubclass(TimeoutError, one) for one in types):
        return True
    return any(info.type in (f"{t.__module__}.{t.__qualname__}", t.__qualname__) for t in types)
