"""Byte codes that the engine executes for one completion: a number that neither load nor machine moves, only the code
and the version of Python.

The whole path is counted, from the loop's callback to the sink, which `instructions` cannot do: under valgrind what
wakes up by the clock wakes up fifty times as often. What it does not see is work inside C.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from benchmarks.peers import HERE, ROOT

#: what is part of the gate: one stage of a graph, or one item of a stream in blocks in the scheduler alone
SHAPES: Final = ("engine chain", "engine chain, sink", "engine fan-out", "engine fan-out, sink", "blocks")
FLOORS: Final = ("floor chain", "floor fan-out")


def per_completion(shapes: Sequence[str] = SHAPES, *, slow: int = 0) -> dict[str, float]:
    """Byte codes for one completed stage of a shape, or for one item of "blocks".

    `slow` adds turns of a useless loop to every turn of the scheduler: for tests that want to see it noticed.
    """
    command = [sys.executable, str(HERE / "scripts" / "count_bytecodes.py"), str(slow), *shapes]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, float]) -> str:
    """Markdown: each shape of the engine beside the least it can cost."""
    lines = ["| per stage | byte codes | the floor's | times |", "|---|---|---|---|"]
    for shape in SHAPES:
        kind, _, rest = shape.partition(" ")
        if kind == "engine":
            least = found[f"floor {rest.partition(',')[0]}"]
            lines.append(f"| {rest} | {found[shape]:,.0f} | {least:,.0f} | {found[shape] / least:.1f} |")
    return "\n".join(lines)
