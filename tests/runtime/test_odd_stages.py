"""What functions do that nobody expects of them is one item's or one stage's matter, and the same in every lane."""

import asyncio
import functools
import gc
import os
import sys
import threading
import types

import pytest

from stageflow import Engine, LaneClosedError, NotShippableError, PipelineBuilder
from stageflow.testing.sinks import RecordingSink

LANES = ("async", "thread", "process", "inline")


@pytest.fixture(scope="module")
def engine():
    with Engine(processes=1, threads=2, grace=1) as made:
        yield made


def mapped(engine, function, items, lane, **policies):
    """One map over `items`, everything kept that can be."""
    graph = PipelineBuilder("p").stage("items", lambda: items).map("m", function, "items", executor=lane, **policies)
    return engine.run(graph.build(), failure_mode="continue_on_failure")


def found(number):
    return next(one for one in (1, 2, 4, 5) if one == number)


@pytest.mark.parametrize("lane", LANES)
def test_a_bare_next_that_finds_nothing_is_its_items_failure_and_loses_nobody(engine, lane):
    result = mapped(engine, found, [1, 2, 3, 4, 5], lane)
    assert list(result.outputs["m"].data) == [1, 2, 4, 5]
    (failure,) = result.failures.failures
    assert (failure.item, failure.stage) == ((2,), "m")
    assert "StopIteration" in failure.error_type or "StopIteration" in failure.error


def cancels(number):
    if number == 1:
        raise asyncio.CancelledError("not asked for")
    return number


@pytest.mark.parametrize("lane", LANES)
def test_a_cancellation_that_nobody_asked_for_is_a_failure_and_no_hang(engine, lane):
    graph = PipelineBuilder("p").stage("s", cancels, executor=lane).build()
    result = engine.run(graph, {"number": 1})
    assert result.outputs["s"].error_info.type.endswith("CancelledError")
    assert result.outputs["s"].error == "not asked for"
    assert engine.run(graph, {"number": 2}).data("s") == 2
    assert not mapped(engine, cancels, [1], lane).success


async def doubled(number):
    await asyncio.sleep(0)
    return number * 2


@pytest.mark.parametrize("lane", LANES)
def test_what_a_plain_function_returns_to_be_awaited_is_awaited(engine, lane):
    assert list(mapped(engine, lambda number: doubled(number), [1, 2, 3], lane).outputs["m"].data) == [2, 4, 6]
    graph = PipelineBuilder("p").stage("s", lambda number: doubled(number), executor=lane).build()
    assert engine.run(graph, {"number": 4}).data("s") == 8


def test_a_reduce_that_returns_coroutines_says_so(engine):
    graph = (
        PipelineBuilder("p").stage("items", lambda: [1]).reduce("r", lambda acc, one: doubled(one), "items", initial=0)
    )
    assert "make it an `async def`" in engine.run(graph.build()).outputs["r"].error


@pytest.mark.parametrize("lane", ["async", "thread", "inline"])
def test_a_generator_that_a_function_returns_is_its_value(engine, lane):
    graph = PipelineBuilder("p").stage("s", lambda: (one for one in (1, 2, 3)), executor=lane)
    graph = graph.map("m", lambda one: one + 1, "s", executor=lane)
    assert list(engine.run(graph.build()).outputs["m"].data) == [2, 3, 4]


def test_a_generator_that_a_function_returns_cannot_leave_its_worker(engine):
    graph = PipelineBuilder("p").stage("s", lambda: (one for one in (1, 2)), executor="process").build()
    assert "generator" in engine.run(graph).outputs["s"].error


async def scoped(number):
    async with asyncio.timeout(0.05), asyncio.TaskGroup() as group:
        waiting = group.create_task(asyncio.sleep(0, number))
        yield number
        yield await waiting + 1
        if number > 1:
            await asyncio.sleep(3600)


@pytest.mark.parametrize("lane", LANES)
def test_scopes_of_an_async_generator_stay_whole_across_its_yields(engine, lane):
    result = mapped(engine, scoped, [1, 2], lane)
    assert list(result.outputs["m"].data) == [1, 2]
    (failure,) = result.failures.failures
    assert (failure.item, failure.error_type) == ((1,), "TimeoutError")


def holds_itself(number):
    nested = [number]
    nested.append(nested)
    for _ in range(5000):
        nested = [nested]
    wide = [number]
    for _ in range(60):
        wide = [wide, wide]
    return nested, wide


class Odd:
    def __getattr__(self, name):
        raise KeyError(name)


@pytest.mark.parametrize("lane", ["async", "thread", "inline"])
def test_values_without_an_end_are_weighed_in_a_moment(engine, lane):
    assert len(mapped(engine, holds_itself, [1, 2], lane).outputs["m"].data) == 2
    assert len(mapped(engine, lambda one: Odd(), [1, 2], lane).outputs["m"].data) == 2


def test_what_cannot_be_sent_does_not_keep_the_next_from_being_sent(engine):
    """Functions of a module that workers cannot import, as those of a notebook."""
    module = types.ModuleType("only_here")
    sys.modules["only_here"] = module
    try:
        exec(
            "def bad(x):\n    return helper(x)\ndef helper(x):\n    return lock\ndef good(x):\n    return x + 1",
            vars(module),
        )
        module.lock = threading.Lock()
        bad, good = (
            PipelineBuilder("p").stage("s", one, executor="process").build() for one in (module.bad, module.good)
        )
        assert "cannot be sent" in engine.run(bad, {"x": 1}).outputs["s"].error
        assert engine.run(good, {"x": 1}).data("s") == 2
        module.lock = None
        assert engine.run(bad, {"x": 1}).outputs["s"].status == "ok"
    finally:
        del sys.modules["only_here"]


def closes_everything(number):
    os.closerange(3, 4096)
    return number


class ExitsWhenRead:
    def __reduce__(self):
        return os._exit, (3,)


def ignores(thing, number):
    return number


@pytest.mark.parametrize(
    ("function", "status", "deaths"),
    [(closes_everything, 70, 3), (functools.partial(ignores, ExitsWhenRead()), 3, 9)],
    ids=["a worker that cannot tell of its call", "a function that no worker can read"],
)
def test_a_call_that_no_worker_can_tell_of_is_not_sent_for_ever(engine, function, status, deaths):
    sink = RecordingSink()
    graph = PipelineBuilder("p").stage("s", function, executor="process").build()
    result = engine.run(graph, {"number": 1}, event_sinks=[sink])
    info = result.outputs["s"].error_info
    assert info.type.endswith("WorkerDiedError")
    assert (info.exit_code, info.worker_pid > 0, info.rss_bytes > 0) == (status, True, True)
    assert len(sink.of("worker.lost")) <= deaths
    again = PipelineBuilder("p").stage("s", ignores, executor="process").build()
    assert engine.run(again, {"thing": 0, "number": 1}).data("s") == 1


@pytest.mark.filterwarnings("error")
def test_a_closed_engine_says_so_and_nothing_else():
    graph = PipelineBuilder("p").stage("s", lambda: 1, executor="async").build()
    closed = Engine(processes=1)
    closed.close()
    with pytest.raises(LaneClosedError, match="the engine is closed"):
        closed.run(graph)
    gc.collect()


@pytest.mark.parametrize("lane", ["async", "thread", "inline"])
@pytest.mark.parametrize("error", [SystemExit, GeneratorExit])
def test_whatever_a_source_raises_is_its_own_failure(engine, lane, error):
    def source():
        yield 1
        raise error("the source")

    async def waiting():
        yield 1
        raise error("the source")

    graph = PipelineBuilder("p").stage("s", waiting if lane == "async" else source, executor=lane)
    result = engine.run(graph.map("m", lambda one: one, "s", executor=lane).build())
    assert (result.status, result.outputs["s"].error_info.type) == ("failed", error.__name__)


class ReadNowhere:
    def __reduce__(self):
        return _unreadable, ()


def _unreadable():
    raise RuntimeError("not to be read")


def test_a_value_that_cannot_be_read_is_named(engine):
    graph = PipelineBuilder("p").stage("made", lambda: ReadNowhere(), executor="process").build()
    with pytest.raises(NotShippableError, match=r"the value of stage 'made' .* RuntimeError: not to be read"):
        engine.run(graph).data("made")


def kind_of(thing):
    return type(thing).__name__


def things(amount):
    return [threading.Lock() if place % 3 == 1 else place for place in range(amount)]


def test_what_cannot_be_sent_runs_on_a_thread_where_nobody_chose_the_lane(engine, caplog):
    sink = RecordingSink()
    graph = PipelineBuilder("p").stage("one", kind_of, kind="transform", inputs={"thing": "lock"})
    graph = graph.stage("things", things).map("m", kind_of, "things").map("again", lambda m: m, "m")
    graph = graph.reduce("count", lambda total, one: total + 1, "things", initial=0)
    inputs = {"lock": threading.Lock(), "amount": 5}
    with caplog.at_level("WARNING", "stageflow"):
        result = engine.run(graph.build(), inputs, event_sinks=[sink])
    assert result.data("one") == "lock"
    assert list(result.data("again")) == ["int", "lock", "int", "int", "lock"]
    assert result.data("count") == 5
    placed = sink.of("stage.placed")
    assert {(event.stage, event.lane) for event in placed} == {("one", "thread"), ("m", "thread"), ("count", "thread")}
    assert all("lock" in event.data["reason"] for event in placed)
    assert len([record for record in caplog.records if "on a thread" in record.getMessage()]) == 3


def test_the_numbers_say_the_lane_in_which_most_attempts_ran(engine):
    graph = PipelineBuilder("p").stage("one", kind_of, kind="transform", inputs={"thing": "lock"})
    graph = graph.stage("things", things).map("few", kind_of, "things")
    graph = graph.map("all", lambda each: type(each).__name__, "locks")
    inputs = {"lock": threading.Lock(), "amount": 5, "locks": [threading.Lock() for _ in range(4)]}
    result = engine.run(graph.build(), inputs)
    assert result.data("one") == "lock"
    assert list(result.data("all")) == ["lock"] * 4
    assert {name: result.stats[name].lane for name in ("one", "few", "all")} == {
        "one": "thread", "few": "process", "all": "thread",
    }  # fmt: skip


def test_what_cannot_be_sent_fails_where_the_author_chose_the_lane(engine):
    graph = PipelineBuilder("p").stage("one", kind_of, executor="process").build()
    assert "cannot cross" in engine.run(graph, {"thing": threading.Lock()}).outputs["one"].error
    with Engine(processes=1, placement={"transform": "process"}) as operated:
        graph = PipelineBuilder("p").stage("one", kind_of, kind="transform").build()
        assert "cannot cross" in operated.run(graph, {"thing": threading.Lock()}).outputs["one"].error


def test_what_cannot_be_sent_is_called_as_its_author_calls_it(engine):
    held = {"deep": [threading.Lock()]}
    graph = PipelineBuilder("p").stage("one", kind_of, executor="process").build()
    assert engine.run(graph, {"thing": held}).outputs["one"].error.startswith("input 'thing'['deep'][0] cannot cross")
    graph = PipelineBuilder("p").stage("made", lambda: held).stage("one", lambda made: 1, executor="process").build()
    assert engine.run(graph).outputs["one"].error.startswith("the value of stage 'made'['deep'][0] cannot cross")
    (failure,) = mapped(engine, kind_of, [1, 2, held], "process").failures.failures
    assert failure.item == (2,)
    assert failure.error.startswith("the element['deep'][0] cannot cross")


def three_is_too_many(xs):
    if xs == 3:
        raise ValueError("three")
    return xs


@pytest.mark.parametrize("lane", LANES)
def test_a_map_that_ends_the_run_by_a_failed_item_has_failed_itself(lane):
    graph = (
        PipelineBuilder("p", inputs={"xs": list})
        .map("m", three_is_too_many, over="xs")
        .stage("after", lambda m: len(list(m)))
        .build()
    )
    result = graph.run({"xs": list(range(10))}, lane=lane)
    output = result.outputs["m"]
    assert (result.status, output.status, output.error, output.error_info.type) == (
        "failed",
        "fail",
        "three",
        "ValueError",
    )
    assert result.outputs["after"].status == "cancel"
    assert [(failure.stage, failure.item) for failure in result.failures.failures] == [("m", (3,))]
    assert (result.failures.failed_stages, result.failures.failed_items, result.stats["m"].failed) == (1, 1, 1)
