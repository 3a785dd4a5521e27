"""What a stage may change of its inputs is the same in every lane."""

from __future__ import annotations

import numpy as np
import pytest

from stageflow import DefinitionError, Engine, PipelineBuilder, PipelineValidationError, RetryConfig

LANES = ("thread", "process", "inline", "async")


@pytest.fixture(scope="module")
def engine():
    with Engine(processes=1) as one:
        yield one


def listed():
    return {"values": [1]}


def array():
    return np.zeros(4)


def large():
    return np.zeros(20_000)


def rows():
    for number in range(3):
        yield np.full(4, float(number))


def change(listed, array, large, given):
    listed["values"].append(2)
    return array.flags.writeable, large.flags.writeable, given.flags.writeable


def look(listed, change):
    return listed["values"]


def each(rows, array):
    seen = rows.flags.writeable, array.flags.writeable, float(array[0])
    if seen[0]:
        rows += 1
    if seen[1]:
        array += 1  # other items read it too
    return seen


def gather(rows):
    return [row.flags.writeable for row in rows], [float(row[0]) for row in rows]


def built(lane, *, change_with, each_with, gather_with):
    return (
        PipelineBuilder("owning")
        .stage("listed", listed, executor=lane)
        .stage("array", array, executor=lane)
        .stage("large", large, executor=lane)
        .stage("change", change, executor=lane, **change_with)
        .stage("look", look, executor=lane)
        .stage("rows", rows)
        .map("each", each, over="rows", executor=lane, **each_with)
        .stage("gather", gather, executor=lane, **gather_with)
        .build()
    )


@pytest.mark.parametrize("lane", LANES)
def test_arrays_are_read_only_in_every_lane(engine, lane):
    given = np.ones(3)
    graph = built(lane, change_with={}, each_with={}, gather_with={})
    result = graph.run({"given": given}, engine=engine)
    result.raise_for_failure()
    assert result.data("change") == (False, False, False)
    assert list(result.data("each")) == [(False, False, 0.0)] * 3
    assert result.data("gather")[0] == [False] * 3
    assert given.flags.writeable, "the caller's own array is left as it was"


@pytest.mark.parametrize("lane", LANES)
def test_writable_gives_private_copies_of_all_inputs(engine, lane):
    every = {"writable": True}
    graph = built(lane, change_with=every, each_with=every, gather_with=every)
    result = graph.run({"given": np.ones(3)}, engine=engine)
    result.raise_for_failure()
    assert result.data("change") == (True, True, True)
    assert result.data("look") == [1], "what a stage changed in its copy is seen by nobody"
    assert list(result.data("each")) == [(True, True, 0.0)] * 3, "an item's change of a common input is its own"
    assert result.data("gather") == ([True] * 3, [0.0, 1.0, 2.0])


@pytest.mark.parametrize("lane", LANES)
def test_writable_names_the_parameters_that_it_is_meant_for(engine, lane):
    graph = built(
        lane,
        change_with={"writable": {"large", "given"}},
        each_with={"writable": "rows"},
        gather_with={"writable": ["rows"]},
    )
    result = graph.run({"given": np.ones(3)}, engine=engine)
    result.raise_for_failure()
    assert result.data("change") == (False, True, True)
    assert list(result.data("each")) == [(True, False, 0.0)] * 3
    assert result.data("gather")[0] == [True] * 3


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_isolate_of_a_stage_or_of_the_engine_copies_everything(engine, lane):
    alone = {"isolate": True}
    graph = built(lane, change_with=alone, each_with=alone, gather_with=alone)
    result = graph.run({"given": np.ones(3)}, engine=engine)
    result.raise_for_failure()
    assert (result.data("change"), result.data("look")) == ((True, True, True), [1])
    assert list(result.data("each")) == [(True, True, 0.0)] * 3
    with Engine(processes=1, isolate=True) as isolating:
        plain = built(lane, change_with={}, each_with={}, gather_with={}).run({"given": np.ones(3)}, engine=isolating)
    assert (plain.data("change"), plain.data("look")) == ((True, True, True), [1])


def test_a_name_that_is_no_input_is_a_problem_of_the_definition():
    builder = PipelineBuilder("p").stage("array", array).stage("last", lambda array: 1, writable={"arr"})
    with pytest.raises(PipelineValidationError, match=r"writable names 'arr'.*(.|\n)*Did you mean 'array'"):
        builder.build()
    with pytest.raises(DefinitionError, match="writable=3 is not possible"):
        PipelineBuilder("p").stage("array", array, writable=3)


# ---------------------------------------------------------------- folds


def add(total, number):
    total += number
    return total


def numbers():
    yield from range(600)


def vectors():
    for number in range(600):
        yield np.full(20_000 if number < 2 else 1, float(number))[:1]


def merge(left, right):
    left += right
    return left


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("size", [2, 20_000])
@pytest.mark.parametrize("how", [{}, {"combine": merge}], ids=["chain", "tree"])
def test_a_fold_may_change_its_accumulator_in_place(engine, lane, size, how):
    graph = (
        PipelineBuilder("sum")
        .stage("numbers", numbers)
        .reduce("total", add, over="numbers", initial=np.zeros(size), executor=lane, **how)
        .build()
    )
    result = graph.run({}, engine=engine)
    result.raise_for_failure()
    assert result.data("total").tolist() == [float(sum(range(600)))] * size


@pytest.mark.parametrize("lane", LANES)
def test_a_fold_that_begins_with_its_first_element_leaves_that_alone(engine, lane):
    graph = (
        PipelineBuilder("sum")
        .stage("vectors", vectors)
        .map("same", lambda vectors: vectors, over="vectors", executor=lane, keep=True)
        .reduce("total", add, over="same", executor=lane)
        .build()
    )
    result = graph.run({}, engine=engine)
    result.raise_for_failure()
    assert result.data("total").tolist() == [float(sum(range(600)))]
    assert result.data("same")[0].tolist() == [0.0]


class Once:
    """Raises at the 300th number, the first time."""

    def __init__(self):
        self.raised = False

    def __call__(self, total, number):
        total[0] += number
        if number == 300 and not self.raised:
            self.raised = True
            raise RuntimeError("once")
        return total


def test_a_fold_that_is_retried_begins_again_with_what_it_had(engine):
    graph = (
        PipelineBuilder("sum")
        .stage("numbers", numbers)
        .reduce(
            "total",
            Once(),
            over="numbers",
            initial=[0],
            executor="thread",
            retry=RetryConfig(max_attempts=2, base_delay_ms=1),
        )
        .build()
    )
    result = graph.run({}, engine=engine)
    result.raise_for_failure()
    assert result.data("total") == [sum(range(600))]
