"""The room's stage inside the real engine: beside other work, with failure modes, retries, cancellation."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from stageflow import (
    CancellationToken,
    ContextSnapshot,
    Engine,
    PipelineBuilder,
    RunIdentity,
    RunResult,
    StageContext,
    StageGraph,
    StageStatus,
)
from stageflow.observability.stats import RunStats
from stageflow.report.advice import verdict
from stageflow.tools import (
    ApprovalRequest,
    ApprovalService,
    ApprovalStage,
    InMemoryApprovals,
    SQLiteApprovals,
    ToolExecutor,
    ToolRegistry,
    tool,
)
from stageflow.tools.definitions import ToolInput


def plan(n: int) -> dict[str, int]:
    return {"n": n}


async def double(n: int) -> int:
    return n * 2


def act(plan: dict[str, int]) -> int:
    return plan["n"]


def graph_with(approvals: ApprovalService, **stage: Any) -> StageGraph:
    return (
        PipelineBuilder("guarded")
        .stage("plan", plan, executor="thread")
        .stage("approve", ApprovalStage(approvals, "may it act?", **stage), ["plan"])
        .stage("act", act, after=["approve"], executor="thread")
        .stage("beside", double)
        .build()
    )


async def asked(approvals: InMemoryApprovals | SQLiteApprovals, count: int = 1) -> list[ApprovalRequest]:
    while len(found := approvals.pending_requests()) < count:
        await asyncio.sleep(0.005)
    return found


async def start(graph: StageGraph, run_id: str = "run-1", **options: Any) -> asyncio.Task[RunResult]:
    snapshot = ContextSnapshot(run_id=RunIdentity(pipeline_run_id=run_id, user_id="ada"), inputs={"n": 3})
    return asyncio.create_task(graph.execute(snapshot=snapshot, **options))


async def test_it_waits_on_the_loop_and_the_rest_goes_on() -> None:
    approvals = InMemoryApprovals()
    async with Engine(threads=1, processes=1) as engine:
        graph = graph_with(approvals)
        runs = [await start(graph, f"run-{n}", engine=engine) for n in range(20)]
        requests = await asked(approvals, 20)
        other = await graph_of_thread_work().execute(inputs={"n": 1}, engine=engine)
        assert other.data("act") == 1, "the one thread is free while twenty runs wait"
        for request in requests:
            assert (request.requested_by, request.stage, request.to_dict()["arguments"]) == (
                "ada",
                "approve",
                {"plan": {"n": 3}},
            )
            approvals.approve(request.id, by="bob")
        for run in runs:
            result = await run
            assert (result.success, result.data("act"), result.data("beside")) == (True, 3, 6)
            assert result.data("approve")["decided_by"] == "bob"


def graph_of_thread_work() -> StageGraph:
    return (
        PipelineBuilder("threads").stage("plan", plan, executor="thread").stage("act", act, executor="thread").build()
    )


class Kept:
    """A sink that keeps the events and says when one of a type has come."""

    def __init__(self, until: str) -> None:
        self.events: list[Any] = []
        self.until = until
        self.came = asyncio.Event()

    def emit(self, event: Any) -> None:
        self.events.append(event)
        if event.type == self.until:
            self.came.set()


async def test_the_time_it_waits_is_accounted_to_the_approval() -> None:
    approvals = InMemoryApprovals()
    sink = Kept("engine.sample")
    run = await start(graph_with(approvals), event_sinks=[sink])
    (request,) = await asked(approvals)
    sink.came.clear()  # one may have come before it asked: the machine decides how long `plan` takes
    await sink.came.wait()
    approvals.approve(request.id)
    result = await run
    sample = [event for event in sink.events if event.type == "engine.sample"][-1]
    assert sample.data["waiting"]["approve"] == "an approval", "while it waits, the live view says for what"
    stats = result.stats["approve"]
    (begun,) = [event.time_unix_ns for event in sink.events if event.type == "stage.waiting"]
    (ended,) = [event.time_unix_ns for event in sink.events if event.type == "stage.waited"]
    assert begun <= sample.time_unix_ns <= ended
    assert stats.wait["approval"] == pytest.approx((ended - begun) / 1e9)
    assert stats.wait["approval"] <= stats.busy_seconds
    assert set(result.stats["act"].wait) <= {"upstream", "slot"}, "it waited for the stage, not for somebody's answer"
    # of a run that took no longer than the wait: how long the rest takes is the machine's affair
    said = verdict({"approve": stats}, RunStats(wall_seconds=stats.wait["approval"]))
    assert said == "approve is the bottleneck: it waited 100 % of the run for an approval."


async def test_items_that_wait_at_once_are_one_wait_of_their_stage() -> None:
    approvals = InMemoryApprovals()
    graph = (
        PipelineBuilder("items", inputs={"numbers": list})
        .map("approve", ApprovalStage(approvals, "each"), "numbers", concurrency=8)
        .build()
    )
    sink = Kept("stage.waiting")
    run = asyncio.create_task(graph.execute(inputs={"numbers": [1, 2, 3, 4]}, event_sinks=[sink]))
    requests = await asked(approvals, 4)
    for request in requests:
        await asyncio.sleep(0.02)
        approvals.approve(request.id)
    result = await run
    result.raise_for_failure()
    begun = [event.time_unix_ns for event in sink.events if event.type == "stage.waiting"]
    ended = [event.time_unix_ns for event in sink.events if event.type == "stage.waited"]
    assert (len(begun), len(ended)) == (4, 4)
    assert result.stats["approve"].wait["approval"] == pytest.approx((max(ended) - min(begun)) / 1e9)


async def test_a_tool_that_waits_for_its_approval_says_so_too() -> None:
    registry, approvals = ToolRegistry(), InMemoryApprovals()

    @tool("drop", registry=registry, requires_approval=True)
    def drop(call: ToolInput) -> int:
        return 1

    executor = ToolExecutor(registry, approvals)

    async def use(ctx: StageContext) -> Any:
        return (await executor.execute(ToolInput(tool_name="drop", payload={}), ctx=ctx)).data

    run = await start(PipelineBuilder("tools").stage("use", use).build())
    approvals.approve((await asked(approvals))[0].id)
    result = await run
    assert result.data("use") == 1
    assert result.stats["use"].wait["approval"] > 0


def queue_up(x: int, ctx: StageContext) -> int:
    with ctx.waiting("licence"):
        time.sleep(0.02)
    return x


@pytest.mark.parametrize("lane", ["inline", "thread", "process"])
async def test_any_stage_in_any_lane_may_say_what_it_waits_for(lane: str) -> None:
    graph = PipelineBuilder("words", inputs={"xs": list}).map("queue_up", queue_up, "xs", executor=lane).build()
    result = await graph.execute(inputs={"xs": [1, 2, 3]})
    result.raise_for_failure()
    stats = result.stats["queue_up"]
    assert 0.015 < stats.wait["licence"] <= stats.wall_seconds
    said = verdict(result.stats, RunStats(wall_seconds=stats.wait["licence"]))
    assert said.startswith("queue_up is the bottleneck: it waited 100 %") or "too short" in said
    assert verdict({"queue_up": stats}, RunStats(wall_seconds=16 * stats.wait["licence"])).count("licence") == 0, (
        "a sixteenth is no bottleneck"
    )


async def test_denied_keeps_the_rest_out() -> None:
    approvals = InMemoryApprovals()
    run = await start(graph_with(approvals))
    approvals.deny((await asked(approvals))[0].id, by="bob", reason="no")
    result = await run
    assert not result.success
    assert result.outputs["approve"].error == "denied by bob: no"
    assert result.outputs["approve"].data["status"] == "denied"
    assert "act" not in result.outputs or result.outputs["act"].status is not StageStatus.OK


async def test_a_withdrawn_question_cancels_the_run() -> None:
    approvals = InMemoryApprovals()
    run = await start(graph_with(approvals))
    approvals.cancel((await asked(approvals))[0].id, by="ops")
    result = await run
    assert (result.success, result.cancelled) == (False, True)
    assert "cancelled by ops" in str(result.cancel_reason)


async def test_nobody_decides() -> None:
    result = await (await start(graph_with(InMemoryApprovals(), timeout=0.05)))
    assert result.outputs["approve"].error == "nobody decided in time"


@pytest.mark.parametrize("durable", [False, True])
async def test_a_cancelled_run_stops_waiting(durable: bool, tmp_path: Path) -> None:
    approvals = SQLiteApprovals(tmp_path / "a.sqlite") if durable else InMemoryApprovals()
    token = CancellationToken()
    run = await start(graph_with(approvals), token=token)
    (request,) = await asked(approvals)
    token.cancel("enough")
    result = await run
    assert (result.cancelled, result.cancel_reason) == (True, "enough")
    assert approvals.pending_count == (1 if durable else 0)
    if durable:
        again = await start(graph_with(approvals))
        await asyncio.sleep(0)
        approvals.approve(request.id)
        assert (await again).data("act") == 3, "the next run of that id found the question"


async def test_a_stage_may_execute_tools_with_its_context() -> None:
    registry = ToolRegistry()

    @tool("add", registry=registry)
    def add(call: ToolInput) -> int:
        return int(call.payload["a"] + call.payload["b"])

    executor = ToolExecutor(registry)
    events: list[tuple[str, str | None, Any]] = []

    class Sink:
        def emit(self, event: Any) -> None:
            if event.type.startswith("tool."):
                events.append((event.type, event.stage, event.data["tool"]))

    async def use(n: int, ctx: StageContext) -> int:
        output = await executor.execute(ToolInput(tool_name="add", payload={"a": n, "b": 1}), ctx=ctx)
        return int(output.data)

    graph = PipelineBuilder("tools").stage("use", use).build()
    async with Engine(event_sinks=[Sink()], processes=1) as engine:
        result = await graph.execute(inputs={"n": 4}, engine=engine)
    assert result.data("use") == 5
    assert events == [(f"tool.{what}", "use", "add") for what in ("invoked", "started", "completed")]
