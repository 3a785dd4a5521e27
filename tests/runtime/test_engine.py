"""The engine on real lanes: big graphs, long maps, cancellation, loops and threads, streams of runs."""

import asyncio
import os
import signal
import threading
import time

import pytest

from stageflow import CancellationToken, ContextSnapshot, Engine, PipelineBuilder, StageOutput
from stageflow.testing.clock import VirtualClock
from stageflow.testing.sinks import RecordingSink


def one():
    return 1


def square(x):
    return x * x


def add(acc, x):
    return acc + x


def plus(a, b):
    return a + b


def numbers(n):
    yield from range(n)


def odd_killer(x, ctx):
    """Kills its own worker the first time it meets a multiple of 50."""
    marker = os.path.join(ctx.snapshot.inputs["folder"], str(x))
    if x % 50 == 0 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 2


@pytest.fixture(scope="module")
def engine():
    with Engine(processes=2, threads=4) as made:
        yield made


def sum_graph(**keywords):
    return (
        PipelineBuilder("sum")
        .stage("numbers", numbers)
        .map("square", square, "numbers", **keywords)
        .reduce("total", add, "square", initial=0, combine=plus)
        .build()
    )


def test_a_graph_of_10_000_stages_in_a_chain_and_side_by_side(engine):
    builder = PipelineBuilder("long")
    builder.stage("s0", one, executor="async")
    for i in range(1, 5000):
        builder.stage(f"s{i}", one, [f"s{i - 1}"], executor="async")
    for i in range(5000, 10_000):
        builder.stage(f"s{i}", one, ["s0"], executor="async")
    result = engine.run(builder.build())
    assert result.success
    assert result.failures.completed_stages == 10_000


@pytest.mark.parametrize(("lane", "count"), [("inline", 100_000), ("process", 200_000)])
def test_a_long_map_keeps_every_element(lane, count):
    with Engine(processes=2, lane=None if lane == "process" else lane) as engine:
        result = engine.run(sum_graph(), {"n": count})
    assert result.data("total") == sum(x * x for x in range(count))
    assert result.stats["square"].items_out == count


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lane", ["inline", "process"])
def test_a_map_of_a_million_elements(lane):
    with Engine(processes=2, lane=None if lane == "process" else lane) as engine:
        result = engine.run(sum_graph(), {"n": 1_000_000})
    assert result.data("total") == sum(x * x for x in range(1_000_000))


def test_workers_killed_in_the_middle_of_a_map_change_no_result(engine, tmp_path):
    graph = PipelineBuilder("k").stage("numbers", numbers).map("m", odd_killer, "numbers").build()
    result = engine.run(graph, {"n": 300, "folder": str(tmp_path)})
    assert result.success, result.error
    assert list(result.data("m")) == [x * 2 for x in range(300)]
    assert len(list(tmp_path.iterdir())) == 6


# ---------------------------------------------------------------- cancellation


def test_a_token_stops_a_run_from_another_thread(engine):
    token = CancellationToken()
    entered = threading.Event()
    cleaned = []

    def waits(ctx):
        ctx.defer(cleaned.append, "yes")
        entered.set()
        while True:
            ctx.raise_if_cancelled()
            time.sleep(0.002)

    def stop():
        entered.wait()
        token.cancel("enough")
        token.cancel("too late")

    threading.Thread(target=stop).start()
    result = engine.run(PipelineBuilder("t").stage("w", waits).stage("after", one, ["w"]).build(), token=token)
    assert (result.status, result.cancelled, result.cancel_reason) == ("cancelled", True, "enough")
    assert cleaned == ["yes"]
    assert not result.abandoned


def test_a_token_cancelled_before_the_start_starts_nothing(engine):
    token = CancellationToken()
    token.cancel("never mind")
    ran = []
    result = engine.run(PipelineBuilder("t").stage("w", lambda: ran.append(1)).build(), token=token)
    assert result.status == "cancelled"
    assert ran == []


def test_a_timeout_of_the_run_ends_it_as_failed():
    clock = VirtualClock()

    async def forever():
        await clock.sleep(3600)

    with Engine(processes=1, clock=clock) as engine:
        result = engine.run(PipelineBuilder("t").stage("w", forever).build(), timeout=50)
    assert result.status == "failed"
    assert "timeout of 50 s" in result.error
    assert clock.now == 50


async def test_cancelling_execute_stops_the_run_and_waits_for_its_cleanup():
    cleaned, entered = [], asyncio.Event()

    async def waits(ctx):
        ctx.defer(cleaned.append, 1)
        entered.set()
        await asyncio.sleep(3600)

    async with Engine(processes=1) as engine:
        task = asyncio.create_task(engine.execute(PipelineBuilder("c").stage("w", waits).build()))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == [1]


def test_a_thread_that_does_not_stop_is_named_in_the_result():
    clock, release = VirtualClock(), threading.Event()

    def stubborn(ctx):
        clock.advance(50)  # it has begun: now its time may pass
        while not ctx.token.cancelled:
            time.sleep(0.001)
        clock.advance(10)  # it was asked to stop: now the grace
        release.wait(30)

    with Engine(processes=1, grace=10, clock=clock) as engine:
        result = engine.run(PipelineBuilder("t").stage("stubborn", stubborn).build(), timeout=50)
        release.set()
    assert result.status == "failed"
    assert [one.stage for one in result.abandoned] == ["stubborn"]
    assert "stubborn" in result.abandoned[0].stack


def test_a_source_that_does_not_stop_is_named_in_the_result():
    clock, release = VirtualClock(), threading.Event()

    def stuck():
        yield 1
        clock.advance(60)  # the run's time and the grace
        release.wait(30)
        yield 2

    graph = PipelineBuilder("t").stage("stuck", stuck).sink("s", lambda x: x, "stuck").build()
    with Engine(processes=1, grace=10, clock=clock) as engine:
        result = engine.run(graph, timeout=50)
        release.set()
    assert result.status == "failed"
    assert [one.stage for one in result.abandoned] == ["stuck"]


def test_an_endless_source_stops_when_its_only_reader_has_failed(engine):
    def endless():
        n = 0
        while True:
            yield n
            n += 1

    def never(x):
        raise ValueError("no")

    graph = (
        PipelineBuilder("t")
        .stage("endless", endless)
        .map("m", never, "endless", executor="thread", max_failed_items=3, on_failure="continue_on_failure")
        .build()
    )
    result = engine.run(graph)
    assert result.status == "failed"
    assert str(result.outputs["m"].status) == "fail"
    assert str(result.outputs["endless"].status) == "ok"


# ---------------------------------------------------------------- loops and threads


@pytest.mark.parametrize("uvloop", [False, True])
def test_one_engine_serves_successive_loops(engine, uvloop):
    factory = None
    if uvloop:
        factory = pytest.importorskip("uvloop").new_event_loop
    for _ in range(3):
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(engine.execute(sum_graph(), {"n": 50})).data("total") == 40425


def test_workers_of_a_run_that_is_over_serve_other_threads_and_loops():
    graph = PipelineBuilder("p", inputs={"xs": list}).map("square", square, "xs", executor="process").build()
    wanted = [x * x for x in range(400)]
    found = []

    async def on_a_loop_of_its_own(engine):
        return list((await engine.execute(graph, inputs={"xs": list(range(400))})).data("square"))

    with Engine(processes=2) as engine:
        for _ in range(2):
            assert list(engine.run(graph, {"xs": list(range(400))}).data("square")) == wanted
            pids = set(engine.run(graph, {"xs": list(range(400))}).stats["square"].worker_pids)
            thread = threading.Thread(
                target=lambda: found.append(asyncio.run(on_a_loop_of_its_own(engine))), daemon=True
            )
            thread.start()
            thread.join(20)
            assert not thread.is_alive(), "the workers are held by a loop that stands still"
        assert found == [wanted, wanted]
        assert len(pids) <= 2


def test_one_engine_serves_several_threads_at_once(engine):
    found, errors = [], []

    def work():
        try:
            for _ in range(3):
                found.append(engine.run(sum_graph(), {"n": 100}).data("total"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == [328350] * 12


async def test_concurrent_runs_of_one_graph_share_nothing():
    async def wait(x):
        await asyncio.sleep(0)
        if x == 3:
            raise ValueError("three")
        return x

    graph = PipelineBuilder("g").stage("wait", wait).stage("twice", lambda wait: wait * 2).build()
    async with Engine(processes=1) as engine:
        results = await asyncio.gather(*(engine.execute(graph, {"x": x}) for x in range(8)))
    assert [result.success for result in results] == [x != 3 for x in range(8)]
    assert [result.data("twice") for result in results if result.success] == [0, 2, 4, 8, 10, 12, 14]
    assert len({result.run_id for result in results}) == 8


# ---------------------------------------------------------------- many runs


def test_run_many_keeps_the_order_of_its_inputs(engine):
    async def jitter(x):
        await asyncio.sleep((x % 3) / 1000)
        return x

    graph = PipelineBuilder("m").stage("jitter", jitter).build()
    results = list(graph.run_many(({"x": x} for x in range(30)), engine=engine, max_in_flight=5))
    assert [result.data("jitter") for result in results] == list(range(30))
    assert [result.index for result in results] == list(range(30))


async def test_stream_unordered_yields_as_they_finish_and_pulls_lazily():
    gate = asyncio.Event()
    pulled = []

    async def first_waits(x):
        if x == 0:
            await gate.wait()
        return x

    def inputs():
        for x in range(100):
            pulled.append(x)
            yield {"x": x}

    graph = PipelineBuilder("m").stage("w", first_waits).build()
    async with Engine(processes=1) as engine:
        seen = []
        async for result in graph.stream(inputs(), ordered=False, max_in_flight=4, engine=engine):
            seen.append(result.index)
            if len(seen) == 20:
                assert 0 not in seen
                assert len(pulled) < 30
                gate.set()
        assert sorted(seen) == list(range(100))


async def test_closing_a_stream_early_stops_what_is_in_flight():
    stopped = []

    async def waits(x, ctx):
        ctx.defer(stopped.append, x)
        await asyncio.sleep(3600 if x else 0)
        return x

    graph = PipelineBuilder("m").stage("w", waits).build()
    async with Engine(processes=1) as engine:
        results = graph.stream(({"x": x} for x in range(100)), max_in_flight=4, engine=engine)
        assert (await anext(results)).index == 0
        await results.aclose()
        assert 0 in stopped
        assert len(stopped) >= 4


def test_a_snapshot_carries_its_inputs_and_identity(engine):
    snapshot = ContextSnapshot(inputs={"n": 10})
    result = engine.run(sum_graph(), snapshot=snapshot)
    assert result.data("total") == 285


# ---------------------------------------------------------------- events


def test_the_events_of_a_run_come_in_order(engine):
    sink = RecordingSink()
    graph = PipelineBuilder("e").stage("a", one).stage("b", lambda a: StageOutput.skip("not today")).build()
    engine.run(graph, event_sinks=[sink])
    sink.assert_order("run.started", "stage.started", "stage.completed", "stage.skipped", "run.completed")
    numbers_ = [event.seq for event in sink]
    assert numbers_ == sorted(numbers_)
    sink.assert_emitted("stage.skipped", stage="b", times=1, reason="not today")
