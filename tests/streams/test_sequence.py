"""What a stage behind a map is given: all elements as a sequence, which crosses in the form that it has."""

from __future__ import annotations

import os

import numpy as np
import pytest

from stageflow import Engine, PipelineBuilder


def numbers(n: int):
    yield from range(n)


class Trail:
    """Remembers which processes have encoded it."""

    def __init__(self, x: int, pids: tuple[int, ...] = ()):
        self.x = x
        self.pids = pids

    def __reduce__(self):
        return Trail, (self.x, (*self.pids, os.getpid()))


def trail(x: int) -> Trail:
    return Trail(x)


def followed(trails) -> tuple:
    return len(trails), [one.x for one in trails], {one.pids for one in trails}, os.getpid()


def test_elements_that_a_worker_has_encoded_are_not_encoded_again(engine):
    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("trails", trail, "numbers")
        .stage("followed", followed, inputs={"trails": "trails"}, executor="process")
        .stage("beside", followed, inputs={"trails": "trails"}, executor="process")
        .build()
    )
    result = engine.run(graph, {"n": 3000})
    assert result.success, result.error
    for name in ("followed", "beside"):
        length, values, pids, pid = result.data(name)
        assert (length, values) == (3000, list(range(3000)))
        assert pid != os.getpid()
        assert all(len(one) == 1 for one in pids)
        assert os.getpid() not in {one[0] for one in pids}


def halves(x: int):
    return None if x % 2 else np.full(5000, x)


@pytest.mark.parametrize("executor", ["process", "thread"])
@pytest.mark.parametrize("map_lane", ["process", "thread"])
def test_a_sequence_is_the_same_whatever_it_is_made_of(engine, executor, map_lane):
    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("arrays", halves, "numbers", executor=map_lane)
        .stage("lengths", lengths, inputs={"arrays": "arrays"}, executor=executor)
        .build()
    )
    result = engine.run(graph, {"n": 40})
    assert result.success, result.error
    assert result.data("lengths") == (40, 38, 5000 * 6, 20, 38)


def lengths(arrays, ctx) -> tuple:
    seen = ctx.inputs["arrays"]
    return (
        len(arrays),
        int(arrays[-2][0]),
        int(arrays[4:7:2][1].sum()),
        sum(1 for one in arrays if one is None),
        int(seen[38][-1]),
    )


def add_all(x: int, whole) -> int:
    return x + len(whole) + whole[3]


def test_a_map_that_needs_a_whole_sequence_gets_it_in_every_block(engine):
    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("trails", trail, "numbers")
        .map("whole", plain, "trails")
        .stage("again", numbers)
        .map("sums", add_all, "again", inputs={"whole": "whole"})
        .build()
    )
    result = engine.run(graph, {"n": 500})
    assert result.success, result.error
    assert list(result.data("sums")) == [x + 500 + 3 for x in range(500)]


def plain(trail: Trail) -> int:
    return trail.x


def test_what_was_spilled_comes_back(engine):
    def blobs(n: int):
        for i in range(n):
            yield i.to_bytes(8, "little") * 32768

    def size(blobs) -> tuple:
        return len(blobs), sum(map(len, blobs)), [one[0] for one in blobs]

    graph = (
        PipelineBuilder("p")
        .stage("source", blobs)
        .map("blobs", bytes, "source", executor="process")
        .stage("size", size, inputs={"blobs": "blobs"}, executor="process")
        .build()
    )
    with Engine(processes=1, memory_limit="4MiB") as small:
        result = small.run(graph, {"n": 40})
    assert result.success, result.error
    assert result.data("size") == (40, 40 * 262144, list(range(40)))
