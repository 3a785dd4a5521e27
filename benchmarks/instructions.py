"""Instructions that the scheduler alone executes for one completion: a number that no neighbour on the machine moves.

`valgrind --tool=callgrind` runs `scripts/drive_machine.py`, which builds the same graphs every time, once with few runs
of a shape and once with more; the difference over the completions is the cost of one, free of the interpreter's start,
of every import and of building. Hash seeds are fixed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers import HERE, ROOT

#: shape -> completions of one run of it (stages; items of a stream in blocks)
SHAPES: Final = {"chain": 200, "fan-out": 200, "blocks": 20_000}
MORE_RUNS: Final = 5


class NoCounterError(Exception):
    """Instructions cannot be counted here, or not now."""


def available() -> None:
    """Raise NoCounterError where valgrind is missing."""
    if shutil.which("valgrind") is None:
        raise NoCounterError("valgrind is not installed")


def _count(runs: dict[str, int], slow: int) -> int:
    """Instructions of one process that makes these runs."""
    with tempfile.TemporaryDirectory(prefix="stageflow-callgrind-") as folder:
        out = Path(folder, "out")
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *_drive(runs, slow)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment(), cwd=ROOT)
        found = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.M) if out.exists() else None
        if done.returncode or found is None:
            raise NoCounterError(f"valgrind does not work here: {done.stderr.strip()[-200:]}")
        return int(found[1])


def per_completion(shapes: Sequence[str] = tuple(SHAPES), *, slow: int = 0) -> dict[str, float]:
    """Instructions for one completed stage of a shape, or for one item of "blocks".

    `slow` adds turns of a useless loop to every signal: for tests that want to see it noticed.
    """
    available()
    sources = _sources()
    once = dict.fromkeys(SHAPES, 1)
    # Once without counting, so that every module is compiled before.
    subprocess.run(_drive(once, 0), check=True, capture_output=True, timeout=120, env=_environment(), cwd=ROOT)
    few = _count(once, slow)
    found = {}
    for shape in shapes:
        many = _count({**once, shape: 1 + MORE_RUNS}, slow)
        found[shape] = (many - few) / (MORE_RUNS * SHAPES[shape])
    if _sources() != sources:
        raise NoCounterError("the sources changed while instructions were counted")
    return found


def _sources() -> list[tuple[str, int]]:
    """Every module of ours with the time of its last change: a count is a difference of runs of the same code."""
    files = [*(ROOT / "stageflow").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    return sorted((str(path), path.stat().st_mtime_ns) for path in files)


def _drive(runs: dict[str, int], slow: int) -> list[str]:
    script = HERE / "scripts" / "drive_machine.py"
    return [sys.executable, "-X", "utf8", str(script), str(slow), *(f"{name}={times}" for name, times in runs.items())]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": "0"}
