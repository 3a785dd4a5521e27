"""Options that several commands share, and what they mean to the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from stageflow.core.kinds import FailureMode, Lane
from stageflow.runtime.config import ENVIRONMENT

#: the lanes that every stage can be forced into from outside; clusters need an address and a configuration
LANES: Final = (Lane.INLINE, Lane.ASYNC, Lane.THREAD, Lane.PROCESS)


def _complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Python files and folders below what was typed; the graph's name is the user's."""
    folder = Path(incomplete).parent if os.sep in incomplete else Path()
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    files = [f"{path}:" for path in found if path.suffix == ".py"]
    folders = [f"{path}{os.sep}" for path in found if path.is_dir() and not path.name.startswith((".", "__"))]
    return [CompletionItem(text) for text in files + folders if text.startswith(incomplete)]


target_argument = click.argument("target", metavar="MODULE:GRAPH", shell_complete=_complete_target)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--lane --processes --threads --memory-limit`: how the engine is set up."""
    for option in (
        click.option("--memory-limit", metavar="SIZE", help="Bytes (512MB, 4GiB) or a share of the machine (0.5)."),
        click.option("--threads", type=click.IntRange(min=1), help="Threads for blocking stages."),
        click.option("--processes", "-p", type=click.IntRange(min=1), help="Workers. Default: one per usable core."),
        click.option(
            "--lane",
            type=click.Choice([str(lane) for lane in LANES]),
            help="Run every stage there. inline: in one thread, so that a debugger works.",
        ),
    ):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--failure-mode --timeout`: how this run goes."""
    for option in (
        click.option(
            "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="For the whole run."
        ),
        click.option(
            "--failure-mode",
            type=click.Choice([str(mode) for mode in FailureMode]),
            help="What a failed stage does to the rest.",
        ),
    ):
        command = option(command)
    return command


def as_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The given ones, by the names the engine has for them. An option wins over its environment variable."""
    config = {name: value for name, value in options.items() if value is not None}
    for variable, name in ENVIRONMENT.items():
        if name in config:
            os.environ.pop(variable, None)
    limit = config.get("memory_limit")
    if isinstance(limit, str) and limit.replace(".", "", 1).isdigit():
        config["memory_limit"] = float(limit) if "." in limit else int(limit)
    return config
