"""`stageflow.map`: lazy, ordered, on all cores, and gone when it is closed."""

import itertools
import os
import threading
import time

import pytest

import stageflow
from stageflow import DROP, DefinitionError, StageFailedError


def square(x):
    return x * x


def where(x):
    return os.getpid()


def odd_only(x):
    return x if x % 2 else DROP


def divided(x):
    return 10 // x


def twice(x):
    yield x
    yield -x


def total(xs):
    return [sum(xs)] * len(xs)


async def waited(x):
    return x + 1


def map_threads():
    return [thread for thread in threading.enumerate() if thread.name == "stageflow-map"]


def test_results_come_in_the_order_of_the_items():
    assert list(stageflow.map(square, range(700))) == [x * x for x in range(700)]
    assert map_threads() == []


def test_a_plain_function_runs_in_other_processes():
    assert os.getpid() not in set(stageflow.map(where, range(20)))


def test_unordered_results_are_the_same_results():
    assert sorted(stageflow.map(square, range(300), ordered=False)) == sorted(x * x for x in range(300))


@pytest.mark.parametrize(
    ("function", "keywords", "expected"),
    [
        (odd_only, {}, [1, 3, 5]),
        (twice, {}, [0, 0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5]),
        (waited, {}, [1, 2, 3, 4, 5, 6]),
        (total, {"batch": 3}, [3, 3, 3, 12, 12, 12]),
        (lambda x: x + 0.5, {}, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]),
        (str, {}, ["0", "1", "2", "3", "4", "5"]),
        (square, {"executor": "thread"}, [0, 1, 4, 9, 16, 25]),
        (square, {"executor": "inline"}, [0, 1, 4, 9, 16, 25]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_whatever_a_map_stage_may_be(function, keywords, expected):
    assert list(stageflow.map(function, range(6), **keywords)) == expected


def test_no_items_give_no_results():
    assert list(stageflow.map(square, [])) == []


def test_an_endless_iterator_is_read_only_as_far_as_needed_and_closing_stops_everything():
    read = itertools.count()
    pulled = []

    def endless():
        for number in read:
            pulled.append(number)
            yield number

    results = stageflow.map(square, endless(), executor="thread")
    assert [next(results) for _ in range(10)] == [x * x for x in range(10)]
    results.close()
    assert map_threads() == []
    stopped_at = len(pulled)
    assert stopped_at < 200_000
    time.sleep(0.05)  # what still ran would pull
    assert len(pulled) == stopped_at


def test_a_slow_consumer_holds_the_source_back():
    pulled = []

    def source():
        for number in range(1_000_000):
            pulled.append(number)
            yield number

    results = stageflow.map(square, source(), executor="thread")
    next(results)
    seen, quiet = -1, 0
    while quiet < 5:  # until it has come to rest
        time.sleep(0.05)
        quiet, seen = (quiet + 1, seen) if len(pulled) == seen else (0, len(pulled))
    results.close()
    assert seen < 1_000_000


def test_a_failure_comes_after_the_results_before_it():
    seen = []
    with pytest.raises(StageFailedError) as caught:
        seen.extend(stageflow.map(divided, [5, 2, 0, 1], executor="inline"))
    assert seen == [2, 5][: len(seen)]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_failed_items_may_be_left_out():
    results = stageflow.map(divided, [5, 0, 2], on_failure="continue_on_failure")
    assert (next(results), next(results)) == (2, 5)
    with pytest.raises(StageFailedError):
        next(results)


@pytest.mark.parametrize(
    ("function", "items", "keywords", "message"),
    [
        (lambda a, b: a, [1], {}, "nothing gives it 'b'"),
        (3, [1], {}, "3"),
        (square, [1], {"retires": 2}, "retires"),
        (square, [1], {"kind": "transfrom"}, "transfrom"),
    ],
)
def test_a_mistake_is_told_at_the_call(function, items, keywords, message):
    with pytest.raises(DefinitionError, match=message):
        stageflow.map(function, items, **keywords)


def test_what_cannot_be_iterated_over_is_told_at_the_call():
    with pytest.raises(TypeError, match="not iterable"):
        stageflow.map(square, 3)
