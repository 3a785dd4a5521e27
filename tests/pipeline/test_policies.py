"""Policies as values: formulas, validation, units."""

import pickle

import pytest
import tenacity

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import FailureMode
from stageflow.pipeline.policies import (
    DEFAULT_POLICIES,
    BackoffStrategy,
    GuardRetryPolicy,
    IdempotencyConfig,
    JitterStrategy,
    Policies,
    PolicyPool,
    Rate,
    Resources,
    RetryConfig,
    parse_size,
)


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        (BackoffStrategy.EXPONENTIAL, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]),
        (BackoffStrategy.LINEAR, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (BackoffStrategy.CONSTANT, [0.1] * 6),
    ],
)
def test_backoff_begins_with_the_base_and_never_passes_the_cap(backoff, delays):
    config = RetryConfig(base_delay_ms=100, max_delay_ms=1000, backoff=backoff, jitter=JitterStrategy.NONE)
    assert [config.delay_after(n, None, 0.5) for n in range(1, 7)] == pytest.approx(delays)
    assert config.delay_after(10_000_000, None, 0.5) <= 1.0


@pytest.mark.parametrize(
    ("jitter", "at"),
    [(JitterStrategy.NONE, (0.4, 0.4)), (JitterStrategy.FULL, (0.0, 0.4)), (JitterStrategy.EQUAL, (0.2, 0.4))],
)
def test_jitter_spreads_the_delay(jitter, at):
    config = RetryConfig(base_delay_ms=100, jitter=jitter)
    assert (config.delay_after(3, 0.2, 0.0), config.delay_after(3, 0.2, 1.0)) == pytest.approx(at)


def test_decorrelated_jitter_follows_the_previous_delay_and_keeps_the_cap():
    config = RetryConfig(base_delay_ms=100, max_delay_ms=1000, jitter=JitterStrategy.DECORRELATED)
    assert config.delay_after(1, None, 0.0) == pytest.approx(0.1)
    assert config.delay_after(1, None, 1.0) == pytest.approx(0.3)
    assert config.delay_after(2, 0.3, 1.0) == pytest.approx(0.9)
    assert config.delay_after(3, 0.9, 1.0) == pytest.approx(1.0)
    low_cap = config.with_base_delay_ms(5000)
    assert low_cap.delay_after(1, None, 0.7) == pytest.approx(1.0)


def test_a_retry_is_copied_with_changes():
    config = RetryConfig().with_max_attempts(5).with_base_delay_ms(10).with_max_delay_ms(20).with_seed(3)
    config = config.with_backoff(BackoffStrategy.LINEAR).with_jitter(JitterStrategy.EQUAL).with_retry_on(ValueError)
    assert (config.max_attempts, config.base_delay_ms, config.max_delay_ms, config.seed) == (5, 10, 20, 3)
    assert (config.backoff, config.jitter, config.retry_on) == ("linear", "equal", (ValueError,))
    assert RetryConfig() == RetryConfig(3, 1000, 30000, BackoffStrategy.EXPONENTIAL, JitterStrategy.FULL)
    assert pickle.loads(pickle.dumps(config)) == config


def test_strategies_are_told_from_types():
    assert not RetryConfig(retry_on=(ValueError,)).uses_strategies
    assert RetryConfig(retry_on=lambda info: True).uses_strategies
    assert RetryConfig(retry_on=tenacity.retry_if_exception_type(OSError)).uses_strategies
    assert RetryConfig().with_wait(tenacity.wait_fixed(1)).uses_strategies
    assert RetryConfig().with_stop(tenacity.stop_after_delay(5)).uses_strategies


@pytest.mark.parametrize(
    ("size", "expected"),
    [("512MB", 512_000_000), ("4GiB", 4 * 2**30), ("1.5 kb", 1500), ("10", 10), (7, 7), ("2TiB", 2 * 2**40), ("3B", 3)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected
    assert Resources(memory=size).memory_bytes == expected


@pytest.mark.parametrize("size", ["", "MB", "4XB", "-1", -1, True, "1e3", float("nan")])
def test_sizes_that_are_none(size):
    with pytest.raises(DefinitionError, match="512MB"):
        parse_size(size)


@pytest.mark.parametrize(
    ("rate", "per_second", "text"),
    [(10, 10, "10/s"), ("100/min", 100 / 60, "100/min"), ("30/10s", 3, "30/10s"), ("5 / h", 5 / 3600, "5/h")],
)
def test_rates(rate, per_second, text):
    assert Rate.parse(rate).per_second == pytest.approx(per_second)
    assert str(Rate.parse(rate)) == text


@pytest.mark.parametrize("rate", [0, -1, "fast", "10/fortnight", "0/s", True])
def test_rates_that_are_none(rate):
    with pytest.raises(DefinitionError):
        Rate.parse(rate)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetryConfig(max_attempts=0),
        lambda: RetryConfig(max_attempts=1.5),
        lambda: RetryConfig(base_delay_ms=-1),
        lambda: RetryConfig(backoff="cubic"),
        lambda: RetryConfig(retry_on=()),
        lambda: RetryConfig(retry_on=("ValueError",)),
        lambda: RetryConfig(retry_on=3),
        lambda: RetryConfig(wait=3),
        lambda: GuardRetryPolicy(""),
        lambda: GuardRetryPolicy("a", max_attempts=0),
        lambda: GuardRetryPolicy("a", stagnation_limit=0),
        lambda: GuardRetryPolicy("a", timeout_seconds=0),
        lambda: GuardRetryPolicy("a", hash_fields="text"),
        lambda: IdempotencyConfig(key=3),
        lambda: IdempotencyConfig(ttl_seconds=0),
        lambda: Resources(cpu=-1),
        lambda: Resources(tokens={"gpu": 0}),
        lambda: Resources(tokens="gpu"),
        lambda: Policies(timeout=0),
        lambda: Policies(timeout="3s"),
        lambda: Policies(concurrency=0),
        lambda: Policies(batch=1.5),
        lambda: Policies(priority="high"),
        lambda: Policies(conditional=1),
        lambda: Policies(keep="yes"),
        lambda: Policies(max_failed_items=1.5),
        lambda: Policies(on_failure="explode"),
        lambda: Policies(executor="gpu"),
        lambda: Policies(when=3),
        lambda: Policies(retry=3),
    ],
)
def test_impossible_values_are_refused_with_a_hint(make):
    with pytest.raises(DefinitionError) as caught:
        make()
    assert caught.value.hint


def test_values_are_normalised():
    made = Policies(rate="60/min", on_failure="best_effort", executor="process", interceptors=[1], when=["r", "b"])
    assert (made.rate, made.on_failure, made.when) == (Rate(60, 60), FailureMode.BEST_EFFORT, ("r", "b"))
    assert (made.executor, made.interceptors) == ("process", (1,))
    assert set(made.changed()) == {"rate", "on_failure", "executor", "interceptors", "when"}


def test_a_pool_shares_equal_policies_and_names_the_nearest_keyword():
    pool = PolicyPool()
    assert pool.make({}, where="x") is DEFAULT_POLICIES
    assert pool.make({"timeout": None}, where="x") is DEFAULT_POLICIES
    tokens = {"resources": Resources(tokens={"gpu": 1})}
    assert pool.make(tokens, where="x") is pool.make({"resources": Resources(tokens={"gpu": 1})}, where="x")
    with pytest.raises(DefinitionError, match="stage 'x': there is no keyword 'retires'") as caught:
        pool.make({"retires": 3}, where="stage 'x'")
    assert caught.value.nearest[0] == "retry"
    with pytest.raises(DefinitionError, match="stage 'x': stage: timeout=-1"):
        pool.make({"timeout": -1}, where="stage 'x'")
