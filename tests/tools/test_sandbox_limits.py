"""The memory limit itself, in a process of its own, without an engine."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SCENE = """
import resource
import tempfile
from types import SimpleNamespace
from stageflow.tools.definitions import Tool, ToolDefinition, ToolInput
from stageflow.tools.sandbox import SandboxedCall, memory_limited

before = resource.getrlimit(resource.RLIMIT_AS)
small = large = None
with memory_limited(64 * 2**20):
    small = bytearray(8 * 2**20)
    try:
        large = bytearray(256 * 2**20)
    except MemoryError:
        pass
assert small is not None and large is None
assert resource.getrlimit(resource.RLIMIT_AS) == before
large = bytearray(256 * 2**20)

class Eater(Tool):
    definition = ToolDefinition(name="eat", action_type="eat")
    async def execute(self, input):
        return len(bytearray(input.payload))

folder = tempfile.mkdtemp()

def call(size, limit):
    marker = tempfile.mktemp(dir=folder)
    inputs = {"call": ToolInput(tool_name="eat", payload=size), "marker": marker}
    ctx = SimpleNamespace(snapshot=SimpleNamespace(inputs=inputs))
    return SandboxedCall(Eater(), limit).execute(ctx)

assert call(1000, 64 * 2**20) == 1000
assert call(300 * 2**20, None) == 300 * 2**20
try:
    call(300 * 2**20, 64 * 2**20)
except MemoryError:
    print("limited")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the present size")
def test_the_kernel_refuses_what_is_over_the_limit_and_only_inside() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCENE)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (shown.stdout.strip(), shown.stderr) == ("limited", "")
