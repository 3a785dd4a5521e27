"""What watches a run from the command line: progress, trace, report, metrics, live page; each loaded on use."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import click

from stageflow.events.sinks import EventSink
from stageflow.pipeline.graph import StageGraph


def view_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--progress`: which views to attach."""
    for option in (
        click.option("--progress/--no-progress", default=None, help="Default: where standard error is a terminal."),
    ):
        command = option(command)
    return command


class Views:
    """The sinks of one run. Leaving it closes what is still open, whatever happened."""

    def __init__(self) -> None:
        self.sinks: list[EventSink] = []

    @classmethod
    def from_options(cls, graph: StageGraph, options: dict[str, Any]) -> Self:
        """Take our options out of `options`."""
        options.pop("progress")
        return cls()

    def finish(self, result: Any) -> None:
        """The run has ended: write what is to be written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
