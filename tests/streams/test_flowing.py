"""Items of a flat-map that give more than may be held: their values go on in parts while their generators run."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading

import pytest

from stageflow import DROP, Engine, PipelineBuilder, RetryConfig

AT_ONCE = RetryConfig(max_attempts=3, base_delay_ms=0)
MANY = 200_000


def numbers(n: int):
    yield from range(n)


def spread(x: int):
    """Item 1 gives MANY, others three."""
    for k in range(MANY if x == 1 else 3):
        yield DROP if k % 1000 == 999 else (x, k)


def expected(n: int, most: int = MANY) -> list:
    return [(x, k) for x in range(n) for k in range(most if x == 1 else 3) if k % 1000 != 999]


@pytest.mark.parametrize("kind", ["transform", "work", "async"])
def test_values_arrive_in_order_while_their_generator_runs(engine, kind, tmp_path):
    gate = tmp_path / "seen"

    def waiting(x: int):
        for value in spread(x):
            if value == (1, 150_000):  # the first values are read before the last are made
                while not gate.exists():
                    threading.Event().wait(0.001)
            yield value

    async def waiting_async(x: int):
        for value in spread(x):
            if value == (1, 150_000):
                while not gate.exists():
                    await asyncio.sleep(0.001)
            yield value

    seen = []
    runner = waiting
    if kind == "async":
        runner, kind = waiting_async, "work"

    def keep(value) -> None:
        seen.append(tuple(value))
        if len(seen) == 100:
            gate.touch()

    graph = (
        PipelineBuilder("flow").stage("source", numbers).map("many", runner, "source", kind=kind)
        .sink("keep", keep, "many", kind="work", ordered=True).build()
    )  # fmt: skip
    result = engine.run(graph, {"n": 4})
    assert result.success, result.error
    assert seen == expected(4)
    assert result.stats["many"].items_out == 4


def test_paths_of_values_that_flow_say_their_place(engine):
    def few(x: int):
        yield from range(2500 if x == 1 else 2)

    def place(value: int, ctx):
        return (*ctx.item, value)

    graph = (
        PipelineBuilder("paths").stage("source", numbers).map("few", few, "source", kind="transform")
        .map("place", place, "few", kind="work").build()
    )  # fmt: skip
    found = engine.run(graph, {"n": 3}).data("place")
    assert [tuple(one) for one in found] == [(x, k, k) for x in range(3) for k in range(2500 if x == 1 else 2)]


def graph_of(runner, kind="transform", **policies):
    return (
        PipelineBuilder("again").stage("source", numbers).map("many", runner, "source", kind=kind, **policies)
        .map("same", lambda value: value, "many", kind="work").build()
    )  # fmt: skip


def failing_once(mark):
    def many(x: int):
        for k in range(5000 if x == 1 else 3):
            if (x, k) == (1, 3210) and not mark.exists():
                mark.touch()
                raise ConnectionError("lost")
            yield x, k

    return many


@pytest.mark.parametrize("death", ["raises", "dies"])
def test_what_gives_the_same_again_goes_on_where_it_stopped(engine, tmp_path, death):
    mark = tmp_path / "died"

    def dying(x: int):
        for k in range(5000 if x == 1 else 3):
            if (x, k) == (1, 3210) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield x, k

    graph = graph_of(failing_once(mark) if death == "raises" else dying, retry=AT_ONCE, replayable=True)
    result = engine.run(graph, {"n": 6})
    assert result.success, result.error
    wanted = [(x, k) for x in range(6) for k in range(5000 if x == 1 else 3)]
    assert [tuple(one) for one in result.data("same")] == wanted


def test_a_failure_after_values_went_on_is_final(engine, tmp_path):
    result = engine.run(graph_of(failing_once(tmp_path / "a"), retry=AT_ONCE), {"n": 6}, failure_mode="best_effort")
    wanted = [(x, k) for x in range(6) for k in range(3210 if x == 1 else 3)]
    assert [tuple(one) for one in result.data("same")] == wanted
    assert (result.stats["many"].failed, result.stats["many"].retried) == (1, 0)


@pytest.mark.parametrize("replayable", [True, False])
def test_an_async_generator_that_fails_after_values_went_on(engine, tmp_path, replayable):
    many = failing_once(tmp_path / "async")

    async def many_async(x: int):
        for value in many(x):
            yield value

    graph = graph_of(many_async, kind="work", retry=AT_ONCE, replayable=replayable)
    result = engine.run(graph, {"n": 6}, failure_mode="best_effort")
    most = 5000 if replayable else 3210
    wanted = [(x, k) for x in range(6) for k in range(most if x == 1 else 3)]
    assert [tuple(one) for one in result.data("same")] == wanted
    assert result.success == replayable, result.error


def test_a_failure_before_is_tried_again(engine, tmp_path):
    mark = tmp_path / "b"

    def many(x: int):
        for k in range(900):
            if (x, k) == (1, 899) and not mark.exists():
                mark.touch()
                raise ConnectionError("lost")
            yield x, k

    result = engine.run(graph_of(many, retry=AT_ONCE), {"n": 3})
    assert result.success, result.error
    assert [tuple(one) for one in result.data("same")] == [(x, k) for x in range(3) for k in range(900)]


@pytest.mark.parametrize("kind", ["transform", "work"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_flows_without_end_can_be_stopped(engine, kind, whole):
    def endless(x: int):
        for k in itertools.count() if x == 1 else range(3):
            if k > 20_000:
                threading.Event().wait(0.001)  # it is asked to stop by now, or soon
            yield k

    seen = []

    async def main():
        def keep(value: int) -> None:
            seen.append(value)
            if len(seen) == 2000:
                handle.cancel("enough", **({} if whole else {"stage": "endless", "item": 1}))

        graph = (
            PipelineBuilder("stop").stage("source", numbers).map("endless", endless, "source", kind=kind)
            .sink("keep", keep, "endless", kind="work", ordered=True).build()
        )  # fmt: skip
        async with Engine(processes=2, threads=4, grace=20.0) as own:
            handle = await own.start(graph, {"n": 4})
            return await handle

    result = asyncio.run(main())
    assert seen[:2000] == [0, 1, 2, *range(1997)]
    if whole:
        assert result.cancelled
    else:
        assert "item [1] of stage 'endless' was cancelled" in result.error
        assert seen[-6:] == [0, 1, 2, 0, 1, 2]
        assert seen[3:-6] == list(range(len(seen) - 9))
        assert (result.stats["endless"].items_out, result.stats["endless"].cancelled) == (3, 1)


# ---------------------------------------------------------------- batches


def fourth(x: int):
    return DROP if x % 4 == 0 else x  # so batches begin with a gap, and have some inside


def batched(runner, gate=None, *, kind="transform", **policies):
    def same(value, ctx):
        if gate is not None and ctx.item == (5, 50):
            gate.touch()
        return value, ctx.item

    return (
        PipelineBuilder("batched").stage("source", numbers).map("kept", fourth, "source", kind="work")
        .map("many", runner, "kept", kind=kind, batch=3, **policies)
        .map("same", same, "many", kind="work").build()
    )  # fmt: skip


def batches(n: int) -> list[list[int]]:
    there = [x for x in range(n) if x % 4]
    return [there[at : at + 3] for at in range(0, len(there), 3)]


def given(n: int, many: int) -> list:
    """What `same` sees: a batch is known by its first item."""
    return [((xs[-1], k), (xs[0], k)) for xs in batches(n) for k in range(many if xs[0] == 5 else 2)]


def seen_of(result) -> list:
    return [(tuple(value), tuple(path)) for value, path in result.data("same")]


@pytest.mark.parametrize("kind", ["transform", "work", "async"])
def test_the_values_of_a_batch_go_on_while_its_generator_runs(engine, kind, tmp_path):
    gate = tmp_path / "seen"

    def many(xs: list[int]):
        for k in range(9000 if xs[0] == 5 else 2):
            if k == 8000:  # the first are read before the last are made
                while not gate.exists():
                    threading.Event().wait(0.001)
            yield xs[-1], k

    async def many_async(xs: list[int]):
        for k in range(9000 if xs[0] == 5 else 2):
            if k == 8000:
                while not gate.exists():
                    await asyncio.sleep(0.001)
            yield xs[-1], k

    runner, kind = (many_async, "work") if kind == "async" else (many, kind)
    result = engine.run(batched(runner, gate, kind=kind), {"n": 14})
    assert result.success, result.error
    assert seen_of(result) == given(14, 9000)
    stats = result.stats["many"]
    assert (stats.items_in, stats.items_out, stats.emitted) == (10, 10, len(given(14, 9000)))


def breaking(mark, gate, how):
    def many(xs: list[int]):
        for k in range(5000 if xs[0] == 5 else 2):
            if k == 3210 and not mark.exists():
                mark.touch()
                while not gate.exists():  # what came before has gone on
                    threading.Event().wait(0.001)
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ConnectionError("lost")
            yield xs[-1], k

    return many


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_batch_that_gives_the_same_again_goes_on_where_it_stopped(engine, how, tmp_path):
    gate = tmp_path / "seen"
    runner = breaking(tmp_path / "mark", gate, how)
    result = engine.run(batched(runner, gate, retry=AT_ONCE, replayable=True), {"n": 14})
    assert result.success, result.error
    assert seen_of(result) == given(14, 5000)


def test_all_of_a_batch_fails_once_its_values_have_gone_on(engine, tmp_path):
    gate = tmp_path / "seen"
    runner = breaking(tmp_path / "mark", gate, "raises")
    result = engine.run(batched(runner, gate, retry=AT_ONCE), {"n": 14}, failure_mode="continue_on_failure")
    stats = result.stats["many"]
    assert (stats.items_out, stats.failed) == (7, 3)
    assert seen_of(result) == [one for one in given(14, 5000) if one[1][0] != 5 or one[1][1] < 3210]


def test_a_batch_stays_one_when_it_is_tried_again(engine, tmp_path):
    mark = tmp_path / "mark"

    def doubled(xs: list[int]) -> list[tuple[int, int]]:
        if 6 in xs and not mark.exists():
            mark.touch()
            raise ConnectionError("lost")
        return [(2 * x, len(xs)) for x in xs]

    result = engine.run(batched(doubled, retry=AT_ONCE), {"n": 14})
    assert result.success, result.error
    assert [value for value, _ in result.data("same")] == [(2 * x, len(xs)) for xs in batches(14) for x in xs]
