"""Stopping runs and stages: by token, deadline, handle, a stage's own word; and the cleanup that always runs."""

import asyncio
import os
import signal
import threading
import time

import pytest

from stageflow import (
    CancellationToken,
    Engine,
    FailureMode,
    InvariantError,
    PipelineBuilder,
    RetryConfig,
    StageCancelledError,
    StageOutput,
)
from stageflow.testing.clock import VirtualClock


def until_asked(ctx):
    while not ctx.token.cancelled:
        time.sleep(0.002)
    return ctx.token.reason


async def sleeps():
    await asyncio.sleep(60)


def write(path, text):
    with open(path, "a") as file:
        file.write(text)


def with_cleanup(ctx, how, path):
    ctx.defer(write, path, "1")
    ctx.defer(broken_cleanup, name="broken")
    ctx.defer(write, path, "2")
    if how == "exception":
        raise ValueError(how)
    if how == "fail":
        return StageOutput.fail(how)
    if how == "skip":
        return StageOutput.skip(how)
    if how == "cancel":
        return StageOutput.cancel(how)
    if how == "raises cancel":
        raise StageCancelledError(how)
    if how == "exit":
        raise SystemExit(3)
    if how == "asked":
        ctx.emit("ready", {})
        until_asked(ctx)
    return how


async def with_cleanup_async(ctx, how, path):
    async def write_later(text):
        await asyncio.sleep(0)
        write(path, text)

    ctx.defer(write_later, "1")
    ctx.defer(broken_cleanup, name="broken")
    ctx.defer(write, path, "2")
    if how == "exception":
        raise ValueError(how)
    if how == "asked":
        ctx.emit("ready", {})
        await asyncio.sleep(60)
    return how


def broken_cleanup():
    raise OSError("cleanup")


def dies(ctx, path):
    ctx.defer(write, path, "1", survive=True)
    ctx.defer(write, path, "lost")
    ctx.defer(write, path, "2", survive=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs_with_survivor(ctx, path):
    ctx.defer(write, path, "1", survive=True)
    ctx.emit("ready", {})
    time.sleep(60)


def read(path):
    return path.read_text() if path.exists() else ""


class WhenReady:
    """A sink that calls a function once a stage says that it is ready."""

    def __init__(self, react):
        self.react = react

    def emit(self, event):
        if event.type == "ready":
            self.react()


class CancelWhenReady(WhenReady):
    """A sink that cancels a token once a stage says that it is ready."""

    def __init__(self, token):
        super().__init__(lambda: token.cancel("enough"))


# ---------------------------------------------------------------- tokens


def test_a_token_cancelled_before_the_start_starts_nothing(one, lane, sink):
    token = CancellationToken()
    token.cancel("too late")
    result = one(until_asked, lane, run={"token": token, "event_sinks": [sink]})
    assert (result.status, result.cancel_reason) == ("cancelled", "too late")
    assert result.outputs["s"].cancel_reason == "too late"
    assert not [event for event in sink if event.type == "stage.started"]


def test_a_result_is_the_same_whether_or_not_anybody_listens(one):
    token = CancellationToken()
    token.cancel("too late")
    assert one(until_asked, "thread", run={"token": token}).outputs["s"].status == "cancel"


@pytest.mark.parametrize("lane", ["async", "thread", "process"])
def test_a_deadline_stops_the_run_when_it_passes(one, lane):
    token = CancellationToken().with_deadline(0.1)
    result = one(sleeps if lane == "async" else until_asked, lane, run={"token": token})
    assert (result.status, result.cancel_reason, result.abandoned) == ("cancelled", "deadline", ())


def test_the_deadline_above_a_token_counts():
    clock = VirtualClock()
    above = CancellationToken(deadline=20.0, clock=lambda: clock.now)

    async def stage():
        await clock.sleep(100)

    with Engine(clock=clock) as engine:
        result = engine.run(PipelineBuilder("p").stage("s", stage).build(), token=above.child(deadline=50.0))
    assert (result.status, clock.now) == ("cancelled", pytest.approx(20.0))


def test_a_run_that_ends_in_time_leaves_nothing_on_its_token(one):
    token = CancellationToken(deadline=time.monotonic() + 1000)
    assert one(lambda: 1, "async", run={"token": token}).success
    assert not token._callbacks


def test_the_attempts_token_is_the_one_token_and_follows_the_run(one, lane):
    def stage(ctx):
        assert type(ctx.token) is CancellationToken
        child = ctx.token.child()
        child.cancel("only the child")
        return ctx.token.cancelled, child.reason

    assert one(stage, lane).data("s") == (False, "only the child")


def test_the_first_reason_wins(one):
    token = CancellationToken()
    timer = threading.Timer(0.05, lambda: (token.cancel("first"), token.cancel("second")))
    timer.start()
    assert one(until_asked, "thread", run={"token": token}).cancel_reason == "first"


# ---------------------------------------------------------------- handles


async def test_a_handle_stops_its_run():
    async with Engine(grace=20.0) as engine:
        handle = await engine.start(PipelineBuilder("p").stage("s", sleeps).build())
        assert not handle.done
        handle.cancel("enough")
        result = await handle
        assert (result.run_id, result.cancel_reason) == (handle.run_id, "enough")
        assert handle.done
        assert handle.result() is result


@pytest.mark.parametrize("mode", list(FailureMode))
async def test_a_handle_stops_one_stage_and_its_mode_decides_about_the_rest(mode):
    graph = (
        PipelineBuilder("p")
        .stage("s", sleeps)
        .stage("behind", lambda s=0: "ran", executor="async")
        .stage("beside", lambda: "beside", executor="thread", after=["gate"])
        .stage("gate", lambda: 1, executor="async")
        .build()
    )
    async with Engine(grace=20.0) as engine:
        handle = await engine.start(graph, failure_mode=mode)
        handle.cancel("enough", stage="s")
        result = await handle
    assert result.outputs["s"].error_info.code == "SF-CANCELLED"
    assert result.status == "failed"
    behind = result.outputs["behind"].status
    assert str(behind) == {"fail_fast": "cancel", "continue_on_failure": "skip", "best_effort": "ok"}[mode]
    if mode != "fail_fast":
        assert result.data("beside") == "beside"


@pytest.mark.parametrize("lane", ["thread", "process"])
async def test_stopping_a_map_stops_its_items_and_starts_no_more(lane):
    graph = PipelineBuilder("p").map("m", item_until_asked, over="xs", executor=lane).build()
    async with Engine(processes=2, threads=4, grace=20.0) as engine:
        handle = await engine.start(graph, {"xs": list(range(50))}, failure_mode="continue_on_failure")
        await asyncio.sleep(0.1)
        handle.cancel("enough", stage="m")
        result = await asyncio.wait_for(asyncio.shield(handle._task), 20)
    assert result.outputs["m"].error == "stage 'm' was cancelled: enough"


def item_until_asked(x, ctx):
    return until_asked(ctx)


async def test_stopping_a_stage_that_waits_for_its_retry():
    clock = VirtualClock()

    def fails(ctx):
        raise ValueError

    retry = RetryConfig(3, 3_600_000, 3_600_000, jitter="none")
    graph = PipelineBuilder("p").stage("s", fails, executor="inline", retry=retry).stage("t", waits_for(clock)).build()
    async with Engine(clock=clock) as engine:
        handle = await engine.start(graph, failure_mode="continue_on_failure")
        while clock.now < 10:
            await asyncio.sleep(0)
        handle.cancel("enough", stage="s")
        result = await handle
    assert result.outputs["s"].error_info.code == "SF-CANCELLED"
    assert result.data("t") == 5000


def waits_for(clock):
    async def t():
        for _ in range(500):
            await clock.sleep(10)
        return 5000

    return t


async def test_an_unknown_stage_is_said_at_once():
    async with Engine() as engine:
        handle = await engine.start(PipelineBuilder("p").stage("s", sleeps).build())
        with pytest.raises(Exception, match="no stage 'z'"):
            handle.cancel("x", stage="z")
        handle.cancel()
        assert (await handle).cancelled


async def test_cancelling_the_caller_stops_the_run_first():
    async with Engine(grace=20.0) as engine:
        stopped, begun = [], asyncio.Event()

        async def stage():
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                stopped.append(True)

        caller = asyncio.ensure_future(engine.execute(PipelineBuilder("p").stage("s", stage).build()))
        await begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert stopped == [True]


# ---------------------------------------------------------------- cleanup

HOWS = ("return", "exception", "fail", "skip", "cancel", "raises cancel", "exit")


@pytest.mark.parametrize("how", HOWS)
def test_cleanup_runs_last_first_whatever_the_outcome(one, lane, how, tmp_path, sink):
    path = tmp_path / "order"
    one(with_cleanup, lane, {"how": how, "path": str(path)}, run={"event_sinks": [sink]})
    assert read(path) == "21"
    (failed,) = [event for event in sink if event.type == "stage.cleanup_failed"]
    assert failed.data == {"cleanup": "broken", "error": "OSError: cleanup"}


@pytest.mark.parametrize("how", ["return", "exception"])
def test_async_cleanup_is_awaited(one, lane, how, tmp_path):
    path = tmp_path / "order"
    one(with_cleanup_async, lane, {"how": how, "path": str(path)})
    assert read(path) == "21"


@pytest.mark.parametrize("lane", ["async", "thread", "process"])
def test_cleanup_has_run_when_a_cancelled_run_returns(one, lane, tmp_path):
    path, token = tmp_path / "order", CancellationToken()
    stage = with_cleanup_async if lane == "async" else with_cleanup
    run = {"token": token, "event_sinks": [CancelWhenReady(token)]}
    result = one(stage, lane, {"how": "asked", "path": str(path)}, run=run)
    assert result.cancel_reason == "enough"
    assert read(path) == "21"


def test_what_is_to_survive_a_lost_worker_runs_in_the_parent_once_per_attempt(one, tmp_path):
    path = tmp_path / "order"
    result = one(dies, "process", {"path": str(path)})
    assert result.outputs["s"].error_info.signal == signal.SIGKILL
    assert read(path) == "21" * 3  # the third death is final
    assert result.failures.failures[0].error_info.code == "SF-WORKER-DIED"


def test_what_is_to_survive_runs_when_a_timeout_kills_the_worker(tmp_path):
    path = tmp_path / "order"
    clock = VirtualClock()
    with Engine(processes=1, grace=1.0, clock=clock) as engine:
        graph = PipelineBuilder("one").stage("s", hangs_with_survivor, executor="process", timeout=5).build()
        result = engine.run(graph, {"path": str(path)}, event_sinks=[WhenReady(lambda: clock.advance(6))])
    assert result.outputs["s"].error_info.code == "SF-TIMEOUT"
    assert read(path) == "1"


def test_a_survivor_that_cannot_travel_is_refused_in_every_lane(one, lane):
    def stage(ctx):
        ctx.defer(lambda: None, survive=True)

    assert "defer(survive=True)" in one(stage, lane).outputs["s"].error


# ---------------------------------------------------------------- our own bugs


async def test_a_bug_of_ours_ends_its_run_and_no_other(monkeypatch):
    async with Engine(grace=20.0) as engine:

        async def stage(name):
            await asyncio.sleep(0.02)
            return {"name": name}

        graph = PipelineBuilder("p").stage("s", stage).build()
        state = engine._state()
        driver, real = state.driver, state.driver._ended

        def broken(running, outcome):
            if running.job.snapshot.inputs["name"] == "bad":
                raise AttributeError("a bug")
            return real(running, outcome)

        monkeypatch.setattr(driver, "_ended", broken)
        bad, good = await asyncio.gather(
            engine.execute(graph, {"name": "bad"}), engine.execute(graph, {"name": "good"}), return_exceptions=True
        )
        assert isinstance(bad, InvariantError)
        assert "a bug" in str(bad)
        assert good.data("s") == {"name": "good"}
        assert not driver.machine.tasks
        assert not driver.jobs


async def hanging_cleanup():
    await asyncio.sleep(60)


def with_hanging_cleanup(ctx, path):
    ctx.defer(write, path, "1")
    ctx.defer(hanging_cleanup)
    return "done"


def test_cleanups_share_the_grace_and_one_that_hangs_keeps_none_from_running(lane, tmp_path, sink):
    path = tmp_path / "order"
    graph = PipelineBuilder("one").stage("s", with_hanging_cleanup, executor=lane).build()
    with Engine(processes=1, grace=0.6) as engine:
        result = engine.run(graph, {"path": str(path)}, event_sinks=[sink])
    assert result.data("s") == "done"
    assert read(path) == "1"
    (failed,) = [event for event in sink if event.type == "stage.cleanup_failed"]
    assert failed.data == {"cleanup": "hanging_cleanup", "error": "Timeout"}
