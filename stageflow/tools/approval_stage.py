"""A pipeline stage that waits for a human.

It is a coroutine, so it holds no worker and no thread while it waits. With a durable service (`SQLiteApprovals`) a
process that is killed while it waits finds the same question again when the run is resumed, or the answer that came
meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from stageflow.core.kinds import StageKind
from stageflow.core.output import StageOutput
from stageflow.tools.approval import ApprovalRequest, ApprovalService, ApprovalStatus
from stageflow.tools.executor import decision_event

if TYPE_CHECKING:
    from stageflow.context.stage_context import StageContext

__all__ = ["ApprovalStage"]


class ApprovalStage:
    """A GUARD stage: goes on when somebody approves, fails when somebody denies or nobody decides in time.

    - `message`: why it asks; text, or a function of the context.
    - `arguments`: what is shown and approved, a function of the context; by default the values of its dependencies.
    - `timeout` in seconds from the question (None: for ever). A retry or a resumed run does not start it anew.
    - `key`: names the question; text, or a function of the context. By default run, stage and item, so that retries and
      a resumed run find their question. A fixed key finds it from other runs too. An answer never serves other
      arguments.

    Approved: OK with `approved`, `request_id`, `decided_by`, `reason`. Denied or timed out: FAIL with the same data and
    `status`. Withdrawn by somebody: CANCEL, which ends the run. When the run itself is cancelled, a durable service
    keeps the question open for the next run; another one withdraws it.
    """

    kind = StageKind.GUARD

    def __init__(
        self,
        approvals: ApprovalService,
        message: str | Callable[[StageContext], str],
        *,
        action: str | None = None,
        arguments: Callable[[StageContext], Mapping[str, Any]] | None = None,
        timeout: float | None = 300.0,
        key: str | Callable[[StageContext], str] | None = None,
    ) -> None:
        self.approvals = approvals
        self.message = message
        self.action = action
        self.arguments = arguments
        self.timeout = timeout
        self.key = key

    async def execute(self, ctx: StageContext) -> StageOutput:
        """Ask, or find what was asked before, and wait."""
        asked = self.approvals.request(
            self.action or ctx.stage_name,
            self.message(ctx) if callable(self.message) else self.message,
            timeout=self.timeout,
            arguments=dict(ctx.inputs) if self.arguments is None else self.arguments(ctx),
            requested_by=ctx.snapshot.user_id,
            run_id=ctx.run_id,
            stage=ctx.stage_name,
            key=self._key_of(ctx),
        )
        ctx.emit(
            "approval.requested",
            {
                "tool": asked.tool,
                "message": asked.message,
                "request_id": asked.id,
                "expires_at": asked.expires_at,
                "found": asked.run_id != ctx.run_id or asked.status is not ApprovalStatus.PENDING,
            },
        )
        try:
            with ctx.waiting("approval"):
                ended = await self.approvals.wait(asked.id)
        except asyncio.CancelledError:
            if not self.approvals.durable:
                self.approvals.cancel(asked.id, reason="the run was cancelled")
            raise
        if ended.status.is_decision:
            ctx.emit("approval.decided", {"tool": ended.tool, **decision_event(ended)})
        return _output(ended)

    def _key_of(self, ctx: StageContext) -> str:
        if self.key is not None:
            return self.key(ctx) if callable(self.key) else self.key
        path = "" if ctx.item is None else "/" + ".".join(str(index) for index in ctx.item)
        return f"{ctx.run_id}/{ctx.stage_name}{path}"


def _output(ended: ApprovalRequest) -> StageOutput:
    """The stage's outcome for a request that is over."""
    data = {**decision_event(ended), "status": ended.status.value}
    by = f" by {ended.decided_by}" if ended.decided_by else ""
    why = f": {ended.reason}" if ended.reason else ""
    if ended.status is ApprovalStatus.APPROVED:
        return StageOutput.ok(data)
    if ended.status is ApprovalStatus.DENIED:
        return StageOutput.fail(f"denied{by}{why}", data=data)
    if ended.status is ApprovalStatus.TIMED_OUT:
        return StageOutput.fail("nobody decided in time", data=data)
    return StageOutput.cancel(f"approval cancelled{by}{why}")
