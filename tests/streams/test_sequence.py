"""What a stage behind a map is given: all elements as a sequence, which crosses in the form that it has."""

from __future__ import annotations

import gc
import os
import sys

import numpy as np
import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.runtime.sampling import anonymous_bytes


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


class Costly:
    """Remembers in its process how many of it were decoded there."""

    def __init__(self, x: int):
        self.x = x
        sys.decoded = getattr(sys, "decoded", 0) + 1

    def __reduce__(self):
        return Costly, (self.x,)


def looked_at(costlies) -> tuple:
    sys.decoded = 0
    length = len(costlies), sys.decoded
    one = costlies[3].x
    few = sys.decoded
    return length, one, few, [one.x for one in costlies] == [one.x for one in costlies]


def test_in_a_worker_elements_are_decoded_when_they_are_looked_at(engine):
    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("costly", lambda xs: [Costly(x) for x in xs], "numbers", executor="process", batch=10)
        .stage("looked", looked_at, inputs={"costlies": "costly"}, executor="process")
        .build()
    )
    result = engine.run(graph, {"n": 1000})
    assert result.success, result.error
    length, one, few, twice = result.data("looked")
    assert (length, one, twice) == ((1000, 0), 3, True)
    assert 0 < few <= 10, "one list of a hundred"


def test_views_of_a_sequence_outlive_it_and_its_stage(engine):
    """Leases are held for as long as anything made from the elements is there, and no longer."""

    def full(x: int):
        return np.full(100_000, x, np.uint8)

    def keeps(arrays) -> int:
        sys.kept = arrays[7]
        del arrays
        gc.collect()
        return int(sys.kept[0])

    def overwrites(x: int):
        return np.full(100_000, 255, np.uint8)

    def still(overwritten, keeps) -> tuple:
        return int(sys.kept.min()), int(sys.kept.max())

    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("arrays", full, "numbers", executor="process")
        .stage("keeps", keeps, executor="process")
        .stage("more", lambda keeps, n: range(n), executor="thread")
        .map("overwritten", overwrites, "more", executor="process")
        .stage("still", still, executor="process")
        .build()
    )
    with Engine(processes=1, memory_limit="16MiB") as one:
        result = one.run(graph, {"n": 40})
        assert result.success, result.error
        assert result.data("still") == (7, 7)


def test_what_lies_on_disk_is_read_by_the_worker_itself():
    """Far more than the memory limit, collected by a process stage: it passes list by list."""

    def blob(i: int) -> bytes:
        sys.before = anonymous_bytes("self")
        return os.urandom(1000) + i.to_bytes(8, "little") * 125_000

    def looked(blobs) -> tuple:
        anonymous, total = [anonymous_bytes("self")], 0
        for one in blobs:
            total += int.from_bytes(one[-8:], "little")
            anonymous.append(anonymous_bytes("self"))
        return len(blobs), total, (max(anonymous) - sys.before) / len(one)

    graph = (
        PipelineBuilder("p")
        .stage("source", numbers)
        .map("blobs", blob, "source", executor="process")
        .stage("looked", looked, inputs={"blobs": "blobs"}, executor="process")
        .build()
    )
    with Engine(processes=1, memory_limit="24MiB") as small:
        result = small.run(graph, {"n": 60})
    assert result.success, result.error
    length, total, held = result.data("looked")
    assert (length, total) == (60, sum(range(60)))
    assert held < 15, "elements that the worker held at once"
