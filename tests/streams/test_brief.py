"""Short items of stages that may have effects: handed over in blocks on threads and on the loop, none of them twice,
and not behind each other where they turn out to wait."""

import asyncio
import time
from collections import Counter

import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.context.attempt import CallPlan
from stageflow.context.items import BRIEF_GROUP, ItemProgram
from stageflow.context.pieces import Done, Piece
from stageflow.scheduler.ranges import own_seconds
from stageflow.scheduler.streams import Stream


def numbers(n):
    yield from range(n)


class Told:
    """A sink that counts the blocks of a stage."""

    def __init__(self):
        self.blocks = Counter()

    def emit(self, event):
        if event.type == "stage.items":
            self.blocks[event.stage] += 1


@pytest.mark.parametrize("lane", ["thread", "inline", "async"])
@pytest.mark.parametrize("kind", ["work", "enrich"])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_sink_of_short_items_costs_blocks_and_sees_each_item_once(lane, kind, ordered):
    seen, told = [], Told()
    builder = PipelineBuilder("p", inputs={"n": int}).stage("numbers", numbers)
    graph = builder.sink("put", seen.append, "numbers", executor=lane, kind=kind, ordered=ordered).build()
    with Engine(processes=1) as engine:
        graph.run({"n": 20_000}, engine=engine, event_sinks=[told]).raise_for_failure()
    assert sorted(seen) == list(range(20_000))
    if ordered:
        assert seen == sorted(seen)
    assert told.blocks["put"] < 5_000, "one hand-over for each item would be 20,000"


async def test_coroutines_of_a_stage_still_wait_side_by_side():
    everybody = asyncio.Barrier(32)

    async def meet(x):
        if x >= 100:  # those before were short
            await everybody.wait()
        return x

    graph = PipelineBuilder("p", inputs={"xs": list}).map("meet", meet, "xs").build()
    async with Engine(processes=1) as engine:
        result = await asyncio.wait_for(graph.execute(inputs={"xs": list(range(132))}, engine=engine), 30)
    assert list(result.data("meet")) == list(range(132))


class Port:
    """As much of a lane's port as a block of plain calls uses."""

    lane = "async"
    worker_pid = progress = note = buffer = None

    def items(self, current):
        pass

    def cancelled(self):
        return False

    def on_cancel(self, callback):
        pass


def program(function, *, brief):
    plan = CallPlan((), (("element", 0),), (), False)
    return ItemProgram(
        brief=brief, name="wait", kind="work", runner=function, form="function", is_async=False, plan=plan
    )


def slow_from(place):
    def wait(x):
        if x >= place:
            until = time.perf_counter() + 0.003
            while time.perf_counter() < until:
                pass
        return x

    return wait


class Head:
    attempt = 1


@pytest.mark.parametrize("brief", [True, False])
def test_a_block_whose_items_begin_to_take_long_gives_the_rest_back(brief):
    block = program(slow_from(10), brief=brief)
    steps = block(Port(), Head(), None, (Piece(0, 400, -1, ((0, 0),)),), list(range(400)))
    parts = []
    while True:
        try:
            parts.append(next(steps))
        except StopIteration as end:
            last = end.value
            break
    (left,) = last.meta.unrun
    assert left[1] == 400
    assert (left[0] <= 10 + 2 * BRIEF_GROUP) is brief, "where they could wait side by side the clock is looked at often"


async def test_on_the_loop_too():
    ends = []
    for _ in range(3):  # the machine may stop for 40 ms within the first ten, but not each time
        block = program(slow_from(10), brief=True)
        reply = await block.run_async(Port(), Head(), None, (Piece(0, 400, -1, ((0, 0),)),), list(range(400)))
        ((lo, hi, _),) = reply.meta.ranges
        assert lo == 0
        ends.append(hi)
    assert 11 <= max(ends) <= 25, "40 ms of items that take 3 ms"


def part_of(function, *, brief=True):
    steps = program(function, brief=brief)(Port(), Head(), None, (Piece(0, 1, -1, ((0, 0),)),), [0])
    with pytest.raises(StopIteration) as end:
        next(steps)
    return end.value.value.meta


def test_a_thread_that_waited_for_its_neighbours_is_told_from_one_that_waited_outside():
    def compute(x):
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass

    def wait(x):
        time.sleep(0.02)

    computed, waited = part_of(compute), part_of(wait)
    assert computed.seconds - computed.outside > 0.0049, "while it computed, the process ran"
    assert waited.outside > 0.01
    assert part_of(wait, brief=False).outside == -1.0
    assert own_seconds(computed) >= 0.0049
    assert own_seconds(waited) > 0.01
    assert own_seconds(Done((), seconds=0.5, cpu_seconds=0.001, outside=0.002)) == pytest.approx(0.003)
    assert own_seconds(Done((), seconds=0.5, cpu_seconds=0.001)) == 0.5


def brief_stream():
    stream = Stream(0)
    stream.can_block = stream.brief = True
    stream.measure(16, 16 * 30e-6, 0)
    assert stream.block_size(32, 512) == 33
    return stream


def test_one_late_answer_does_not_end_the_blocks_of_short_items_but_several_do():
    stream = brief_stream()
    stream.measure(1, 0.005, 0)  # it waited for the interpreter
    assert stream.block_size(32, 512) >= 8
    for _ in range(8):
        stream.measure(1, 0.005, 0)
    assert stream.block_size(32, 512) == 1


def test_items_that_turn_out_short_after_all_go_in_blocks_again():
    stream = brief_stream()
    for _ in range(30):
        stream.measure(1, 0.005, 0)
    assert stream.block_size(32, 512) == 1
    for _ in range(12):
        stream.measure(1, 30e-6, 0)
    assert stream.block_size(32, 512) >= 4
