"""Sources, maps, joins, batches, reduces and sinks to their full definition, in every lane and for any worker count."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from stageflow import DROP, Engine, PipelineBuilder, StageContext

LANES = ("inline", "thread", "process", None)


def numbers(n: int):
    yield from range(n)


async def numbers_async(n: int):
    for i in range(n):
        if i % 50 == 0:
            await asyncio.sleep(0)
        yield i


def double(x: int) -> int:
    return 2 * x


def odd_out(x: int):
    return DROP if x % 3 == 0 else x


def expand(x: int):
    for k in range(x % 4):
        yield (x, k)


def joined(a: str, b: str) -> str:
    return a + b


def text(x: int) -> str:
    return f"{x},"


def run(graph, engine: Engine, lane: str | None, inputs=None):
    if lane is None:
        return engine.run(graph, inputs)
    return graph.run(inputs, processes=2, lane=lane)


@pytest.mark.parametrize("lane", LANES)
def test_items_flow_through_maps_drops_and_flat_maps_in_order(engine, lane):
    graph = (
        PipelineBuilder("flow")
        .stage("numbers", numbers)
        .map("double", double, "numbers")
        .map("kept", odd_out, "double")
        .map("pairs", expand, "kept")
        .build()
    )
    result = run(graph, engine, lane, {"n": 300})
    survivors = [2 * i for i in range(300) if 2 * i % 3]
    assert result.success, result.error
    assert list(result.data("pairs")) == [(x, k) for x in survivors for k in range(x % 4)]
    assert result.stats["kept"].dropped == 100


@pytest.mark.parametrize("source", [numbers, numbers_async])
def test_a_source_may_be_sync_or_async(engine, source):
    graph = PipelineBuilder("s").stage("numbers", source).map("double", double, "numbers").build()
    result = engine.run(graph, {"n": 500})
    assert list(result.data("double")) == [2 * i for i in range(500)]


@pytest.mark.parametrize("lane", LANES)
def test_a_join_is_inner_by_index_and_counts_what_it_drops(engine, lane):
    graph = (
        PipelineBuilder("join")
        .stage("numbers", numbers)
        .map("left", odd_out, "numbers")
        .map("right", double, "numbers")
        .map("both", lambda left, right: (left, right), "left", inputs={"right": "right"})
        .build()
    )
    result = run(graph, engine, lane, {"n": 90})
    assert result.success, result.error
    assert list(result.data("both")) == [(i, 2 * i) for i in range(90) if i % 3]


@pytest.mark.parametrize("lane", LANES)
def test_an_associative_combine_need_not_commute(engine, lane):
    graph = (
        PipelineBuilder("r")
        .stage("numbers", numbers)
        .map("text", text, "numbers")
        .reduce("whole", joined, "text", combine=joined, initial="", block=7)
        .build()
    )
    result = run(graph, engine, lane, {"n": 400})
    assert result.data("whole") == "".join(f"{i}," for i in range(400))


def test_a_reduce_of_nothing_is_its_initial_and_without_one_an_error(engine):
    with_initial = (
        PipelineBuilder("r").stage("numbers", numbers).reduce("whole", joined, "numbers", initial="empty").build()
    )
    assert engine.run(with_initial, {"n": 0}).data("whole") == "empty"
    without = PipelineBuilder("r").stage("numbers", numbers).reduce("whole", joined, "numbers").build()
    result = engine.run(without, {"n": 0})
    assert not result.success
    assert "no element" in result.error


@pytest.mark.parametrize("processes", [1, 2])
def test_a_float_sum_is_bit_equal_for_any_number_of_workers(processes):
    def add(a: float, b: float) -> float:
        return a + b

    def tenth(x: int) -> float:
        return 0.1 * x

    graph = (
        PipelineBuilder("f")
        .stage("numbers", numbers)
        .map("t", tenth, "numbers")
        .reduce("s", add, "t", combine=add)
        .build()
    )
    found = {graph.run({"n": 2000}, processes=processes).data("s") for _ in range(2)}
    found.add(graph.run({"n": 2000}, lane="inline").data("s"))
    assert len(found) == 1


@pytest.mark.parametrize("lane", LANES)
def test_a_batch_gets_lists_of_consecutive_survivors(engine, lane):
    def sizes(xs: list) -> list:
        assert isinstance(xs, list)
        return [(x, len(xs)) for x in xs]

    graph = (
        PipelineBuilder("b")
        .stage("numbers", numbers)
        .map("kept", odd_out, "numbers")
        .map("batched", sizes, "kept", batch=4)
        .build()
    )
    result = run(graph, engine, lane, {"n": 15})
    assert list(result.data("batched")) == [(x, 4 if x < 13 else 2) for x in range(15) if x % 3]


def test_a_batch_is_closed_by_time(engine):
    release = threading.Event()
    seen: list[int] = []

    def slow_numbers():
        yield 1
        yield 2
        release.wait(30)
        yield 3

    def note(xs):
        seen.append(len(xs))
        release.set()
        return xs

    graph = (
        PipelineBuilder("b")
        .stage("src", slow_numbers)
        .map("note", note, "src", batch=100, batch_seconds=0.05, executor="thread")
        .build()
    )
    result = engine.run(graph)
    assert list(result.data("note")) == [1, 2, 3]
    assert seen[0] <= 2
    assert sum(seen) == 3


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_of_a_batch_that_fails_only_the_guilty_are_lost(lane):
    def picky(xs):
        if 5 in xs:
            raise ValueError("five")
        return xs

    graph = PipelineBuilder("b").stage("numbers", numbers).map("picky", picky, "numbers", batch=4).build()
    result = graph.run({"n": 12}, processes=1, lane=lane, failure_mode="continue_on_failure")
    assert list(result.data("picky")) == [i for i in range(12) if i != 5]
    assert [failure.item for failure in result.failures.failures] == [(5,)]


def test_items_of_a_flat_map_have_the_path_of_their_parent(engine):
    def where(pair, ctx: StageContext):
        return ctx.item

    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("pairs", expand, "numbers")
        .map("where", where, "pairs")
        .build()
    )
    for lane in LANES:
        result = run(graph, engine, lane, {"n": 9})
        assert result.success, result.error
        assert list(result.data("where")) == [(x, k) for x in range(9) for k in range(x % 4)], lane


def test_the_path_is_kept_through_drops_and_maps_and_grows_with_each_flat_map(engine):
    def odd_k(pair):
        return pair if pair[1] % 2 else DROP

    def again(pair):
        yield pair
        yield pair

    def where(pair, ctx: StageContext):
        return (*pair, ctx.item)

    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("pairs", expand, "numbers")
        .map("odd_k", odd_k, "pairs")
        .map("again", again, "odd_k")
        .map("where", where, "again")
        .build()
    )
    found = list(engine.run(graph, {"n": 12}).data("where"))
    assert found == [(x, k, (x, k, j)) for x in range(12) for k in range(x % 4) if k % 2 for j in range(2)]


def test_a_failed_item_is_named_by_its_path(engine):
    def fragile(pair):
        if pair == (7, 2):
            raise ValueError("no")
        return pair

    graph = (
        PipelineBuilder("p")
        .stage("numbers", numbers)
        .map("pairs", expand, "numbers")
        .map("f", fragile, "pairs")
        .build()
    )
    result = engine.run(graph, {"n": 9}, failure_mode="continue_on_failure")
    assert [failure.item for failure in result.failures.failures] == [(7, 2)]


def test_an_ordered_sink_gets_items_in_order_and_nothing_is_kept(engine):
    seen: list[int] = []

    async def take(double: int) -> None:
        seen.append(double)

    graph = (
        PipelineBuilder("s")
        .stage("numbers", numbers)
        .map("double", double, "numbers")
        .sink("take", take, "double", ordered=True)
        .build()
    )
    result = engine.run(graph, {"n": 400})
    assert seen == [2 * i for i in range(400)]
    assert result.data("take") is None
    assert result.data("double") is None
    assert result.outputs["double"].metadata["items"] == 400


@pytest.mark.parametrize("lane", LANES)
def test_a_stage_behind_a_map_gets_an_ordered_sequence(engine, lane):
    def look(double):
        return len(double), double[0], double[-1], double[3:5], list(double) == list(double)

    graph = PipelineBuilder("s").stage("numbers", numbers).map("double", double, "numbers").stage("look", look).build()
    graph = (
        PipelineBuilder("s")
        .stage("numbers", numbers)
        .map("double", double, "numbers")
        .stage("look", look, inputs={"double": "double"})
        .build()
    )
    assert run(graph, engine, lane, {"n": 700}).data("look") == (700, 0, 1398, [6, 8], True)


def test_keep_decides_what_stays(engine):
    graph = (
        PipelineBuilder("k")
        .stage("numbers", numbers)
        .map("a", double, "numbers", keep=True)
        .map("b", double, "a", keep=False)
        .build()
    )
    result = engine.run(graph, {"n": 20})
    assert list(result.data("a")) == [2 * i for i in range(20)]
    assert result.data("b") is None


def test_a_source_is_closed_when_its_reader_fails(engine):
    closed = threading.Event()

    def endless():
        try:
            i = 0
            while True:
                yield i
                i += 1
        finally:
            closed.set()

    def fails(endless):
        if endless == 40:
            raise RuntimeError("enough")
        return endless

    graph = PipelineBuilder("e").stage("endless", endless).map("fails", fails, "endless").build()
    result = engine.run(graph)
    assert not result.success
    assert closed.wait(30)


def test_a_source_is_never_far_ahead_of_a_slow_reader(engine):
    given = 0
    taken = 0
    most_ahead = 0

    def source():
        nonlocal given
        for _ in range(300):
            given += 1
            yield bytes(100_000)

    def slow(source):
        nonlocal taken, most_ahead
        most_ahead = max(most_ahead, given - taken)
        taken += 1

    graph = (
        PipelineBuilder("a")
        .stage("source", source)
        .sink("slow", slow, "source", executor="thread", concurrency=1)
        .build()
    )
    with Engine(processes=1, memory_limit="4MiB") as small:
        result = small.run(graph)
    assert result.success, result.error
    assert taken == 300
    assert most_ahead * 100_000 <= 4 << 20


def test_workers_are_other_processes(engine):
    def pid(x):
        return os.getpid()

    graph = PipelineBuilder("w").stage("numbers", numbers).map("pid", pid, "numbers").build()
    assert os.getpid() not in set(engine.run(graph, {"n": 50}).data("pid"))
