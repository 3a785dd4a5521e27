"""Sandboxed tools in the real process lane: answers, errors, limits, death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow import Engine
from stageflow.tools import (
    ProcessSandbox,
    SandboxLimits,
    ToolExecutionError,
    ToolExecutor,
    ToolInput,
    ToolOutput,
    ToolRegistry,
    tool,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(processes=1, grace=0.2) as made:
        yield made


LIMITS = SandboxLimits(timeout=20, memory_limit="256MiB")


def behave(call: ToolInput) -> Any:
    """Do what the payload says."""
    what, value = call.payload["do"], call.payload.get("value")
    if what == "pid":
        return ToolOutput.ok_with_undo(os.getpid(), {"who": value})
    if what == "raise":
        raise ValueError(value)
    if what == "eat":
        return len(bytearray(value))
    if what == "die":
        with open(value, "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(600)
    return value


async def coroutine(call: ToolInput) -> int:
    """An async tool."""
    return os.getpid()


def executor(engine: Engine, emitted: Any, function: Any = behave, limits: SandboxLimits = LIMITS) -> ToolExecutor:
    registry = ToolRegistry()
    tool("t", sandbox=limits, undoable=True, registry=registry)(function)
    return ToolExecutor(registry, sandbox=ProcessSandbox(engine), emit=emitted)


def call(**payload: Any) -> ToolInput:
    return ToolInput(tool_name="t", payload=payload)


async def test_it_runs_elsewhere_and_comes_back_whole(engine: Engine, emitted: Any) -> None:
    used = executor(engine, emitted)
    output = await used.execute(asked := call(do="pid", value="x"))
    assert output.data != os.getpid()
    assert output.undo_metadata == {"who": "x"}
    assert used.undo_store.get(asked.action_id) is not None
    assert emitted.names == ["tool.invoked", "tool.started", "tool.completed"]
    assert (await used.execute(call(do="echo", value=(1, {2: "x"})))).data == (1, {2: "x"})
    assert (await executor(engine, emitted, coroutine).execute(call())).data != os.getpid()


async def test_its_own_errors_arrive_as_they_are(engine: Engine, emitted: Any) -> None:
    with pytest.raises(ValueError, match="wrong number"):
        await executor(engine, emitted).execute(call(do="raise", value="wrong number"))
    assert emitted.last("tool.failed")["error_type"] == "ValueError"


async def test_too_much_memory_is_refused_and_the_next_call_has_all_of_it(engine: Engine, emitted: Any) -> None:
    used = executor(engine, emitted)
    with pytest.raises(ToolExecutionError) as caught:
        await used.execute(call(do="eat", value=600 * 2**20))
    assert (caught.value.fields["reason"], caught.value.fields["memory_limit"]) == ("memory", "256MiB")
    assert (await used.execute(call(do="eat", value=100 * 2**20))).data == 100 * 2**20


async def test_a_tool_that_kills_its_process_fails_alone_and_ran_once(
    engine: Engine, emitted: Any, tmp_path: Path
) -> None:
    used = executor(engine, emitted)
    trace = tmp_path / "trace"
    with pytest.raises(ToolExecutionError) as caught:
        await used.execute(call(do="die", value=str(trace)))
    assert trace.read_text() == "x"
    assert caught.value.fields["reason"] == "worker_died"
    assert emitted.names[-1] == "tool.failed"
    assert (await used.execute(call(do="echo", value=1))).data == 1


async def test_a_tool_that_hangs_is_killed(engine: Engine, emitted: Any) -> None:
    limits = SandboxLimits(timeout=0.3, memory_limit=None)
    with pytest.raises(ToolExecutionError) as caught:
        await executor(engine, emitted, limits=limits).execute(call(do="hang"))
    assert (caught.value.fields["reason"], caught.value.fields["timeout"]) == ("timeout", 0.3)
    assert (await executor(engine, emitted).execute(call(do="echo", value=2))).data == 2
