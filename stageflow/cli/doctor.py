"""`doctor`: what this machine offers, what is in effect and who said so, and how fast work crosses to a worker."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import click
import msgspec

from stageflow.cli.machine import Machine, survey
from stageflow.report.terminal import console, jsonable, seconds, size
from stageflow.runtime.config import ENVIRONMENT, EngineConfig

_LANE: Final = "stageflow_executors.processes.pool:ProcessExecutor"
_ROUND_TRIPS: Final = 300
_COPY_BYTES: Final = 32 << 20
_PATIENCE: Final = 20.0  # seconds for all measurements; a machine on which that is too short has other troubles


class Setting(msgspec.Struct, frozen=True):
    """One value of the configuration, and who said so."""

    name: str
    value: Any
    source: str


class Speed(msgspec.Struct, frozen=True):
    """What was measured with one worker, in seconds and bytes per second."""

    start: float
    round_trip: float
    copy_rate: float


@click.command(
    short_help="Print what this machine offers, and what is in effect.",
    epilog="""\b
Examples:
  stageflow doctor
  stageflow doctor --json | jq .speed.round_trip
  STAGEFLOW_PROCESSES=2 stageflow doctor
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--measure/--no-measure", default=True, help="Start a worker and time it (under a second).")
def doctor(as_json: bool, measure: bool) -> int:
    """Print cores, limits, memory, the configuration in effect and where each value came from, and measured speed.

    Exit code 1 if no worker could be started.
    """
    machine = survey()
    settings = effective_settings(os.environ)
    speed: Speed | None = None
    problem: str | None = None
    if measure:
        try:
            speed = asyncio.run(asyncio.wait_for(measure_worker(), _PATIENCE))
        except Exception as error:
            problem = f"no worker could be measured: {type(error).__name__}: {error}"
    if as_json:
        facts = {"machine": machine, "settings": settings, "speed": speed, "problem": problem}
        click.echo(msgspec.json.encode(jsonable(facts)))
    else:
        _print(machine, settings, speed, problem)
    return 1 if problem else 0


def effective_settings(environment: Mapping[str, str]) -> list[Setting]:
    """Every field of the configuration a new engine would have here; DefinitionError for a value that cannot be."""
    config = EngineConfig.from_environment(environment)
    variables = {name: variable for variable, name in ENVIRONMENT.items() if environment.get(variable)}
    found = []
    for name in config.__struct_fields__:
        source = f"environment ({variables[name]})" if name in variables else "default"
        found.append(Setting(name, getattr(config, name), source))
    return found


async def measure_worker() -> Speed:
    """Start one worker, send it small calls one after the other, then a large value."""
    module, _, name = _LANE.partition(":")
    executor = getattr(import_module(module), name)
    began = time.perf_counter()
    async with executor(max_workers=1) as pool:
        await pool.submit(_nothing)
        started = time.perf_counter() - began
        trips = [await _timed(pool, _nothing) for _ in range(_ROUND_TRIPS)]
        data = bytes(_COPY_BYTES)
        copies = [await _timed(pool, len, data) for _ in range(4)]
    return Speed(started, statistics.median(trips), _COPY_BYTES / min(copies))


async def _timed(pool: Any, function: Any, *args: Any) -> float:
    began = time.perf_counter()
    await pool.submit(function, *args)
    return time.perf_counter() - began


def _nothing() -> None:
    """What the measured round trip runs."""


def _print(machine: Machine, settings: list[Setting], speed: Speed | None, problem: str | None) -> None:
    from rich.table import Table

    out = console(sys.stdout)

    def section(title: str, rows: list[tuple[str, ...]]) -> None:
        table = Table.grid(padding=(0, 2))
        for row in rows:
            table.add_row("", *row)
        out.print(title, style="bold")
        out.print(table)

    group = machine.cgroup
    quota = f"{group.cpus:g} cores" if group.cpus is not None else "no limit"
    limit = size(group.memory) if group.memory is not None else "no limit"
    used = f", {size(group.memory_used)} used" if group.memory_used is not None else ""
    section(
        "machine",
        [
            ("system", machine.system),
            ("python", machine.python),
            ("cores", f"{machine.cores}, {machine.usable_by_affinity} usable by affinity"),
            ("cgroup", f"version {group.version}" if group.version else "none"),
            ("  cpu", quota),
            ("  memory", limit + used),
            ("  processes", f"{group.pids:,}" if group.pids is not None else "no limit"),
            ("memory", f"{size(machine.memory)}, {size(machine.memory_available)} available"),
            ("shared memory", machine.shared_memory),
            ("open files", f"{machine.open_files:,}" if machine.open_files else "unknown"),
        ],
    )
    section("configuration", [(one.name, _shown(one, machine), one.source) for one in settings])
    if speed is not None:
        section(
            "measured with one worker",
            [
                ("start", seconds(speed.start)),
                ("round trip", seconds(speed.round_trip)),
                ("copy rate", f"{size(speed.copy_rate)}/s"),
            ],
        )
    if problem is not None:
        console(sys.stderr).print(problem, style="red")


def _shown(setting: Setting, machine: Machine) -> str:
    """The value, and what it comes to on this machine where it does not say so itself."""
    name, value = setting.name, setting.value
    if name == "processes" and value is None:
        return f"{machine.usable_cores} (the usable cores)"
    if name == "memory_limit" and isinstance(value, float):
        return f"{value:g} ({size(value * machine.usable_memory)})"
    if name == "start_method" and value is None:
        return "spawn" if sys.platform == "win32" else "forkserver"
    if value is None or value == () or value == {}:
        return "-"
    return str(value) if isinstance(value, str | int | float) else repr(value)
