"""Runs one tool call in a worker process of the engine, with a time limit and a memory limit.

This contains accidents (a tool that hangs, crashes its interpreter or eats memory), not enemies: the worker has the
rights of this process. Files, network and environment are as open as they are here.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from stageflow.core.kinds import StageKind
from stageflow.tools.definitions import SandboxLimits, Tool, ToolInput
from stageflow.tools.errors import ToolExecutionError

if TYPE_CHECKING:
    from stageflow.context.stage_context import StageContext
    from stageflow.pipeline.graph import StageGraph

__all__ = ["ProcessSandbox"]

GRAPHS_KEPT: Final = 64
STAGE: Final = "tool"
REASONS: Final = {"StageTimeoutError": "timeout", "MemoryError": "memory", "WorkerDiedError": "worker_died"}
HINTS: Final = {
    "timeout": "raise SandboxLimits(timeout=...) if the tool needs longer",
    "memory": "raise SandboxLimits(memory_limit=...) if the tool needs more",
    "worker_died": "the tool ended its process: run it alone to see why",
}


class SandboxedCall:
    """The stage that runs in the worker: one tool under one memory limit; the call is the run's input.

    The engine runs a stage again whose worker died. A tool acts for somebody, so it must not: the file `marker`, made
    before the tool begins, keeps a second run from starting.
    """

    kind = StageKind.WORK

    def __init__(self, tool: Tool, memory_bytes: int | None) -> None:
        self.tool = tool
        self.memory_bytes = memory_bytes

    def execute(self, ctx: StageContext) -> Any:
        """Execute the call, once; an awaitable result is awaited on a loop of its own."""
        call, marker = ctx.snapshot.inputs["call"], ctx.snapshot.inputs["marker"]
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            raise ToolExecutionError(
                f"tool {self.tool.name!r} took its sandbox process down; it was not run again",
                hint=HINTS["worker_died"],
                name=self.tool.name,
                reason="worker_died",
            ) from None
        with memory_limited(self.memory_bytes):
            result = self.tool.execute(call)
            if inspect.isawaitable(result):
                return asyncio.run(_awaited(result))
            return result


async def _awaited(result: Any) -> Any:
    return await result


@contextlib.contextmanager
def memory_limited(extra_bytes: int | None) -> Iterator[None]:
    """Let this process map at most `extra_bytes` more address space inside the block; beyond it is MemoryError.

    Nothing happens where the kernel has no such limit or does not tell the present size (Windows, macOS).
    """
    if extra_bytes is None or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = mapped + extra_bytes
    for other in (soft, hard):
        if other != resource.RLIM_INFINITY:
            wanted = min(wanted, other)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class ProcessSandbox:
    """Runs tools in the process lane of `engine` (by default the process-wide one).

    The tool must be importable in a worker or shippable to it; changes it makes to itself there stay there. A call over
    its time limit is killed with everything it started. A call runs at most once, also when its worker dies.
    """

    def __init__(self, engine: Any = None) -> None:
        self._engine = engine
        self._graphs: OrderedDict[tuple[int, SandboxLimits], tuple[Tool, StageGraph]] = OrderedDict()

    async def run(self, tool: Tool, call: ToolInput, limits: SandboxLimits) -> Any:
        """What `tool.execute(call)` returned there; what it raised is raised here.

        Raises:
            ToolExecutionError: `reason` is `timeout`, `memory`, `worker_died`, or what else kept it from running.
        """
        with tempfile.TemporaryDirectory(prefix="stageflow-sandbox-") as folder:
            inputs = {"call": call, "marker": os.path.join(folder, "begun")}
            result = await self._graph(tool, limits).execute(inputs=inputs, engine=self._engine)
        output = result.outputs.get(STAGE)
        if result.success and output is not None:
            return output.data
        info = result.error_info
        kind = "" if info is None else info.type.rpartition(".")[2]
        reason = REASONS.get(kind)
        if reason is None:
            cause = _cause_of(result)
            if cause is not None:
                raise cause
        message = (info.message if info is not None else None) or result.error or "the sandbox gave no result"
        raise ToolExecutionError(
            f"tool {tool.name!r} in the sandbox: {message}",
            hint=HINTS.get(reason or ""),
            name=tool.name,
            reason=reason or message,
            error_type=kind,
            timeout=limits.timeout,
            memory_limit=limits.memory_limit,
        )

    def _graph(self, tool: Tool, limits: SandboxLimits) -> StageGraph:
        """One graph per tool and limits: a worker then gets the tool once, not with every call."""
        key = (id(tool), limits)
        known = self._graphs.get(key)
        if known is None:
            from stageflow.pipeline.builder import PipelineBuilder  # here: the worker needs none of it
            from stageflow.pipeline.policies import parse_size

            memory = None if limits.memory_limit is None else parse_size(limits.memory_limit)
            builder = PipelineBuilder(f"sandbox of {tool.name}")
            builder.stage(STAGE, SandboxedCall(tool, memory), executor="process", timeout=limits.timeout)
            known = self._graphs[key] = (tool, builder.build())
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
        return known[1]


def _cause_of(result: Any) -> BaseException | None:
    """The tool's own exception, where it could travel."""
    try:
        result.raise_for_failure()
    except Exception as error:
        return error.__cause__
    return None
