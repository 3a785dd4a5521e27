"""The stage that waits for a human: its four outcomes, its keys, and what survives the death of its process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow.context.identity import RunIdentity
from stageflow.context.snapshot import ContextSnapshot
from stageflow.core.kinds import StageKind, StageStatus
from stageflow.tools.approval import Approvals, InMemoryApprovals
from stageflow.tools.approval_sqlite import SQLiteApprovals
from stageflow.tools.approval_stage import ApprovalStage


@pytest.fixture
def service(manual_time: Any) -> InMemoryApprovals:
    return InMemoryApprovals(clock=manual_time, wall=manual_time, sleep=manual_time.sleep)


async def started(stage: ApprovalStage, ctx: Any) -> asyncio.Task[Any]:
    task = asyncio.create_task(stage.execute(ctx))
    for _ in range(20):
        await asyncio.sleep(0)
    return task


async def test_it_asks_with_everything_and_goes_on(service: Approvals, bare_context: Callable[..., Any]) -> None:
    snapshot = ContextSnapshot(run_id=RunIdentity(user_id="ada"))
    ctx = bare_context({"plan": {"delete": ["a", "b"]}}, snapshot)
    stage = ApprovalStage(service, "two files would go", action="cleanup", timeout=60)
    assert stage.kind is StageKind.GUARD
    task = await started(stage, ctx)
    (asked,) = service.pending_requests()
    assert (asked.tool, asked.message, asked.requested_by) == ("cleanup", "two files would go", "ada")
    assert (asked.run_id, asked.stage, asked.key) == ("run-1", "approve", "run-1/approve")
    assert asked.to_dict()["arguments"] == {"plan": {"delete": ["a", "b"]}}
    service.approve(asked.id, by="bob", reason="fine")
    output = await task
    assert output.status is StageStatus.OK
    assert output.data == {
        "approved": True, "request_id": asked.id, "decided_by": "bob", "reason": "fine", "status": "approved",
    }  # fmt: skip
    assert ctx.emit.names == ["approval.requested", "approval.decided"]


async def test_denied_fails_with_data(service: Approvals, bare_context: Callable[..., Any]) -> None:
    ctx = bare_context()
    task = await started(ApprovalStage(service, "why"), ctx)
    service.deny(service.pending_requests()[0].id, by="bob", reason="not today")
    output = await task
    assert (output.status, output.error) == (StageStatus.FAIL, "denied by bob: not today")
    assert (output.data["status"], output.data["approved"], output.retryable) == ("denied", False, False)


async def test_timed_out_fails_and_says_so(
    service: Approvals, bare_context: Callable[..., Any], manual_time: Any
) -> None:
    ctx = bare_context()
    task = await started(ApprovalStage(service, "why", timeout=10), ctx)
    await manual_time.advance(10)
    output = await task
    assert (output.status, output.error) == (StageStatus.FAIL, "nobody decided in time")
    assert output.data["status"] == "timed_out"
    assert ctx.emit.names == ["approval.requested"]


async def test_withdrawn_ends_the_run(service: Approvals, bare_context: Callable[..., Any]) -> None:
    task = await started(ApprovalStage(service, "why"), bare_context())
    service.cancel(service.pending_requests()[0].id, by="ops")
    output = await task
    assert (output.status, output.cancel_reason) == (StageStatus.CANCEL, "approval cancelled by ops")


async def test_a_retry_finds_its_question_and_other_items_ask_their_own(
    service: Approvals, bare_context: Callable[..., Any]
) -> None:
    stage = ApprovalStage(service, lambda ctx: f"item {ctx.item}", arguments=lambda ctx: {"item": ctx.item})
    first = await started(stage, bare_context(item=(1,)))
    again = await started(stage, bare_context(item=(1,)))
    other = await started(stage, bare_context(item=(2,)))
    one, two = service.pending_requests()
    assert (one.key, two.key) == ("run-1/approve/1", "run-1/approve/2")
    assert one.message == "item (1,)"
    service.approve(one.id)
    service.deny(two.id)
    assert (await first).data == (await again).data
    assert (await other).is_failure


async def test_a_fixed_key_serves_another_run(service: Approvals, bare_context: Callable[..., Any]) -> None:
    stage = ApprovalStage(service, "why", key="nightly")
    first = await started(stage, bare_context(run_id="run-1"))
    service.approve(service.pending_requests()[0].id)
    await first
    ctx = bare_context(run_id="run-2")
    assert (await stage.execute(ctx)).data["approved"] is True
    assert ctx.emit.last("approval.requested")["found"] is True
    computed = ApprovalStage(service, "why", key=lambda ctx: f"of-{ctx.run_id}")
    task = await started(computed, bare_context(run_id="run-3"))
    assert service.pending_requests()[0].key == "of-run-3"
    task.cancel()


async def test_a_cancelled_run_withdraws_unless_the_service_is_durable(
    service: Approvals, bare_context: Callable[..., Any], tmp_path: Path, manual_time: Any
) -> None:
    durable = SQLiteApprovals(tmp_path / "a.sqlite", wall=manual_time, sleep=manual_time.sleep)
    for used, left in ((service, 0), (durable, 1)):
        task = await started(ApprovalStage(used, "why"), bare_context())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert used.pending_count == left


WAITER = """
import asyncio, sys
from contextlib import nullcontext
from types import SimpleNamespace
from stageflow.context.snapshot import ContextSnapshot
from stageflow.tools.approval_sqlite import SQLiteApprovals
from stageflow.tools.approval_stage import ApprovalStage

def emit(type, data):
    if type == "approval.requested":
        print(data["request_id"], flush=True)

ctx = SimpleNamespace(
    inputs={"n": 1}, snapshot=ContextSnapshot(), run_id="run-1", stage_name="gate", item=None, emit=emit,
    waiting=lambda reason: nullcontext(),
)
stage = ApprovalStage(SQLiteApprovals(sys.argv[1], poll_interval=0.02), "why", timeout=None)
output = asyncio.run(stage.execute(ctx))
print(output.status, output.data["decided_by"], flush=True)
"""


def test_a_killed_process_finds_its_question_and_the_answer_of_another(tmp_path: Path) -> None:
    path = tmp_path / "approvals.sqlite"
    waiter = [sys.executable, "-c", textwrap.dedent(WAITER), str(path)]
    first = subprocess.Popen(waiter, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    request_id = first.stdout.readline().strip()
    os.kill(first.pid, signal.SIGKILL)
    first.wait(30)
    first.stdout.close()
    assert first.returncode == -signal.SIGKILL
    assert [one.id for one in SQLiteApprovals(path).pending_requests()] == [request_id]

    second = subprocess.Popen(waiter, stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert second.stdout.readline().strip() == request_id
    code = "import sys; from stageflow.tools.commands import approvals; approvals(sys.argv[1:])"
    decide = [sys.executable, "-c", code, "--store", str(path), "approve", request_id[:8], "--by", "ada"]
    subprocess.run(decide, check=True, timeout=30, capture_output=True)
    assert second.communicate(timeout=30)[0].strip() == "ok ada"

    third = subprocess.run(waiter, check=True, timeout=30, capture_output=True, text=True)
    assert third.stdout.split() == [request_id, "ok", "ada"]
