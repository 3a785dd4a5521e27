"""What stands still for good ends with who waits for whom; what only waits for somebody who is at work goes on."""

import asyncio
import threading

from stageflow import Engine, PipelineBuilder, Resources

GPU = {"executor": "thread", "resources": Resources(tokens={"gpu": 1})}


async def within(run):
    return await asyncio.wait_for(run, 30)


async def test_a_source_that_waits_for_what_a_later_stage_sets_is_at_work():
    came = threading.Event()

    def numbers():
        yield 1
        assert came.wait(20)
        yield 2

    def put(x):
        came.set()

    graph = PipelineBuilder("echo").stage("numbers", numbers).sink("put", put, "numbers").build()
    async with Engine(processes=1, threads=1) as engine:
        result = await within(graph.execute(engine=engine))
    result.raise_for_failure()
    assert result.stats["put"].items_in == 2


async def test_a_token_that_another_run_holds_is_waited_for():
    held, done = threading.Event(), threading.Event()

    def hold():
        held.set()
        assert done.wait(20)

    def beside():
        assert held.wait(20)
        done.set()

    holder = PipelineBuilder("holder").stage("hold", hold, **GPU).build()
    wants = PipelineBuilder("wants").stage("want", int, **GPU).stage("beside", beside, executor="thread").build()
    async with Engine(processes=1, threads=4, tokens={"gpu": 1}) as engine:
        first = asyncio.create_task(holder.execute(engine=engine))
        assert await asyncio.to_thread(held.wait, 20)
        second = await within(wants.execute(engine=engine))
        assert second.success
        assert (await within(first)).success


async def test_items_that_each_hold_what_their_child_needs_are_told_so_one_by_one():
    child = PipelineBuilder("child").stage("inner", int, **GPU).build()

    async def outer(x, ctx):
        return (await ctx.spawn(child, {})).error

    graph = PipelineBuilder("parent", inputs={"xs": list}).map("outer", outer, "xs", resources=GPU["resources"]).build()
    async with Engine(processes=1, threads=1, tokens={"gpu": 1}) as engine:
        result = await within(graph.execute(inputs={"xs": [1, 2, 3]}, engine=engine))
        errors = list(result.data("outer"))
        assert len(errors) == 3
        assert all("stage 'outer'" in error and "holds the token 'gpu'" in error for error in errors)
        assert (await within(child.execute(engine=engine))).success, "the token is free again"


async def test_an_endless_source_whose_reader_is_gone_stops():
    closed = threading.Event()

    def numbers():
        try:
            n = 0
            while True:
                yield n
                n += 1
        finally:
            closed.set()

    def gone(x):
        raise ValueError("gone")

    graph = PipelineBuilder("endless").stage("numbers", numbers).sink("put", gone, "numbers").build()
    async with Engine(processes=1, threads=1) as engine:
        result = await within(graph.execute(engine=engine))
    assert not result.success
    assert "gone" in result.error
    assert closed.is_set()
