"""Where the microseconds of a stage go: the profile of one completion, by room and by function.

A profiler slows short functions more than long ones, so shares are shown, of the time that was measured without it.

May not import: any peer.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.measures.common import engine_on_loop
from benchmarks.measures.scheduling import graph_of
from benchmarks.peers import ROOT

RUNS = 10
#: functions shown for each shape
MOST = 10


class Part(msgspec.Struct):
    """A function's or a room's share of the time, and its calls per stage."""

    name: str
    share: float
    us: float
    calls: float


class Where(msgspec.Struct):
    """One shape: us of CPU per stage as measured without the profiler, and its parts, greatest first."""

    shape: str
    us: float
    rooms: list[Part]
    functions: list[Part]


def look(shapes: tuple[str, ...] = ("chain 1,000", "fan-out 1,000")) -> list[Where]:
    """Profile each shape, nobody listening."""
    found = []
    with engine_on_loop(processes=1) as (runner, engine):
        for shape in shapes:
            graph = graph_of(shape)

            async def several(graph: Any = graph) -> None:
                for _ in range(RUNS):
                    (await engine.execute(graph)).raise_for_failure()

            runner.run(several())
            taken = []
            for _ in range(5):
                began = time.process_time()
                runner.run(several())
                taken.append(time.process_time() - began)
            stages = RUNS * len(graph)
            profile = cProfile.Profile()
            profile.enable()
            runner.run(several())
            profile.disable()
            found.append(_parts(shape, min(taken) / stages * 1e6, stages, pstats.Stats(profile)))
    return found


def _parts(shape: str, us: float, stages: int, stats: Any) -> Where:
    rooms: dict[str, list[float]] = {}
    functions: list[Part] = []
    total = sum(row[2] for row in stats.stats.values())
    for (file, _, name), row in stats.stats.items():
        calls, own = row[1], row[2]
        room = _room(file)
        kept = rooms.setdefault(room, [0.0, 0.0])
        kept[0] += own
        kept[1] += calls
        functions.append(Part(f"{room}: {name}", own / total, own / total * us, calls / stages))
    by_room = [Part(room, own / total, own / total * us, calls / stages) for room, (own, calls) in rooms.items()]
    greatest = sorted(functions, key=lambda part: -part.share)[:MOST]
    return Where(shape, us, sorted(by_room, key=lambda part: -part.share), greatest)


def _room(file: str) -> str:
    """The module of ours, or what it is that is not ours."""
    path = Path(file)
    for base in (ROOT, ROOT / "executors"):
        for package in ("stageflow", "stageflow_executors"):
            if path.is_relative_to(base / package):
                return ".".join(path.relative_to(base).with_suffix("").parts)
    if path.is_relative_to(ROOT / "benchmarks"):
        return "the stage itself"
    return "built-ins" if file.startswith(("~", "<")) else f"standard library {path.stem}"


def table(found: list[Where]) -> str:
    """Markdown, one table per shape."""
    out: list[str] = []
    for where in found:
        if out:
            out.append("")
        out += [
            f"{where.shape} stages, nobody listening: {where.us:.1f} us of CPU per stage.",
            "",
            "| room | share | us | calls per stage |",
            "|---|---|---|---|",
        ]
        out += [f"| {p.name} | {p.share:.0%} | {p.us:.2f} | {p.calls:.1f} |" for p in where.rooms if p.share >= 0.02]
        out += ["", "| function | share | us | calls per stage |", "|---|---|---|---|"]
        out += [f"| `{p.name}` | {p.share:.0%} | {p.us:.2f} | {p.calls:.1f} |" for p in where.functions]
    return "\n".join(out)
