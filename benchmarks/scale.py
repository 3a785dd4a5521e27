"""What the scheduler alone can sustain, on machines of 64 to 1,024 cores that exist only on paper.

Service times are measured here and now; the scheduler's own time is measured as it runs and charged to the virtual
clock. May not import: any executor, any peer.
"""

from __future__ import annotations

import json
import time
from typing import Any, Final

import msgspec

from benchmarks.shapes import workflows
from benchmarks.simulated import Simulation, layout_of, lower_bound, stream_layout

CORES: Final = (64, 128, 256, 512, 1024)
#: at a smaller scale the workflows are generated here and not by wfcommons
OWN_BELOW: Final = 0.2


class StreamRow(msgspec.Struct):
    """One stream on one machine. Rates are items per second of virtual time."""

    cores: int
    items: int
    service_us: float
    rate: float
    ideal: float
    own_rate: float  #: items per CPU second of the scheduler: its ceiling
    own_share: float  #: of the virtual time during which the scheduler worked

    @property
    def busy(self) -> float:
        """Share of the cores that are kept busy."""
        return self.rate / self.ideal


class TaskRow(msgspec.Struct):
    """Independent plain stages of one length on one machine."""

    cores: int
    stages: int
    service_us: float
    rate: float
    ideal: float
    own_rate: float


class ShapeRow(msgspec.Struct):
    """One workflow on one machine: its schedule over the lower bound."""

    name: str
    tasks: int
    cores: int
    over_bound: float


class Scale(msgspec.Struct):
    """Everything the simulation found."""

    streams: list[StreamRow]
    tasks: list[TaskRow]
    shapes: list[ShapeRow]
    source: str
    seconds: float


def measured_service() -> float:
    """Seconds that it takes to decode a JSON record of about 4 KB and sum a column of it: the median of many."""
    record = json.dumps([{"id": number, "name": f"n{number}", "v": number / 7} for number in range(100)])
    times = []
    for _ in range(200):
        began = time.perf_counter()
        sum(row["v"] for row in json.loads(record))
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def measure(scale: float = 1.0) -> Scale:
    """Run every simulation. `scale` shrinks the streams; at 1 the longest has 10,000,000 items."""
    began = time.monotonic()
    service = measured_service()
    streams = [_stream(cores, max(20_000, int(1_000_000 * scale)), service) for cores in CORES]
    streams.append(_stream(CORES[0], max(50_000, int(10_000_000 * scale)), service))
    streams.append(_stream(CORES[-1], max(50_000, int(1_000_000 * scale)), service / 10))
    stages = max(2_000, int(50_000 * scale))
    tasks = [_tasks(cores, stages, 0.01) for cores in CORES]
    source, found = workflows(max(200, int(1000 * scale)), own=scale < OWN_BELOW)
    shapes = []
    for name, (deps, seconds) in found.items():
        for cores in (16, 64, 256):
            run = Simulation(layout_of(deps), cores, seconds.__getitem__).run()
            shapes.append(ShapeRow(name, len(deps), cores, run.now / lower_bound(deps, seconds, cores)))
    return Scale(streams, tasks, shapes, source, time.monotonic() - began)


def _stream(cores: int, items: int, service: float) -> StreamRow:
    run = Simulation(stream_layout(), cores, lambda stage: service, items=items, charge=True, ahead=2).run()
    if run.done_items != items:
        raise RuntimeError(f"{run.done_items} of {items} items were done")
    return StreamRow(
        cores,
        items,
        service * 1e6,
        items / run.now,
        cores / service,
        items / run.own_seconds,
        min(1.0, run.own_seconds / run.now),
    )


def _tasks(cores: int, stages: int, service: float) -> TaskRow:
    layout = layout_of([[] for _ in range(stages)])
    run = Simulation(layout, cores, lambda stage: service, charge=True, ahead=2).run()
    return TaskRow(cores, stages, service * 1e6, stages / run.now, cores / service, stages / run.own_seconds)


def as_dict(found: Scale) -> dict[str, Any]:
    """For JSON."""
    made: dict[str, Any] = msgspec.to_builtins(found)
    return made
