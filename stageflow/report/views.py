"""What watches a run from the command line: progress, trace, report, metrics, live page; each loaded on use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import click
import msgspec

from stageflow.events.event import Event
from stageflow.events.sinks import EventSink
from stageflow.pipeline.graph import StageGraph
from stageflow.report.failed import FailedInput

#: seconds that the live page stays up after the run for a browser that looks at it
_LINGER: Final = 3.0
#: stages up to which the graph is drawn into a report; beyond, nobody can read it and drawing takes seconds
_MAX_DRAWN: Final = 400


def view_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--progress --report --trace --save-failed --metrics-port --ui`: which views to attach."""
    for option in (
        click.option("--save-failed", metavar="DIR", help="Save each failure to a file, for `stageflow replay`."),
        click.option("--ui", is_flag=True, help="Serve a live page on loopback; its address is printed."),
        click.option("--metrics-port", type=click.IntRange(0, 65535), help="Serve Prometheus metrics on loopback."),
        click.option("--trace", metavar="FILE", help="Write a Chrome trace (.json, .json.gz) for ui.perfetto.dev."),
        click.option("--report", metavar="FILE", help="Write one HTML page about the run."),
        progress_option,
    ):
        command = option(command)
    return command


progress_option = click.option(
    "--progress/--no-progress", default=None, help="Default: where standard error is a terminal."
)


class Views:
    """The sinks of one run, as a context manager: leaving it closes what is open, whatever happened."""

    def __init__(self) -> None:
        self.sinks: list[EventSink] = []
        self._open = ExitStack()
        self._progress: Any = None
        self._report: Callable[[], None] | None = None

    @classmethod
    def from_options(cls, graph: StageGraph, options: dict[str, Any], given: FailedInput) -> Self:
        """Take our options out of `options`; what cannot be had (a file, a port) is a UsageError, before anything runs.

        An option that is not there was not given. `given` is what is known of the input of any attempt of this run.
        """
        names = ("progress", "report", "trace", "save_failed", "metrics_port", "ui")
        wanted = {name: options.pop(name, None) for name in names}
        views = cls()
        try:
            views._attach(graph, wanted, given)
        except BaseException:
            views._open.close()
            raise
        return views

    def _attach(self, graph: StageGraph, wanted: Mapping[str, Any], given: FailedInput) -> None:
        if wanted["progress"] or (wanted["progress"] is None and sys.stderr.isatty()):
            self.show_progress()
        saved = self._save_failed(wanted["save_failed"], given) if wanted["save_failed"] else None
        drawing = graph.draw("svg") if (wanted["report"] or wanted["ui"]) and len(graph) <= _MAX_DRAWN else None
        if wanted["report"]:
            self._write_report(wanted["report"], drawing, saved)
        if wanted["trace"]:
            from stageflow.observability.trace import TraceSink

            _check_writable("--trace", wanted["trace"])
            self.sinks.append(self._open.enter_context(closing(TraceSink(wanted["trace"]))))
        if wanted["metrics_port"] is not None:
            self._serve_metrics(wanted["metrics_port"])
        if wanted["ui"]:
            from stageflow.report.live import LivePage

            page = LivePage(graph=drawing, saved=saved)
            self._open.callback(page.close, linger=_LINGER)
            self.sinks.append(page)
            click.echo(f"live page: {page.url}", err=True)

    def _save_failed(self, folder: str, given: FailedInput) -> Callable[[Event], Path | None]:
        """Save failures below `folder`; what names the file of one to the views that come after."""
        from stageflow.report.failed import FailedItemSink
        from stageflow.runtime.failing import attempt_values

        _check_writable("--save-failed", str(Path(folder, ".writable")))

        def fetch(event: Event) -> FailedInput | None:
            values = attempt_values(event)
            return None if values is None else msgspec.structs.replace(given, values=values)

        sink = FailedItemSink(folder, fetch=fetch)
        self.sinks.append(sink)
        return sink.path_of

    def show_progress(self) -> None:
        """Show the run on standard error."""
        from stageflow.report.progress import ProgressSink

        self._progress = self._open.enter_context(closing(ProgressSink()))
        self.sinks.append(self._progress)

    def _write_report(self, path: str, drawing: str | None, saved: Callable[[Event], Any] | None) -> None:
        from stageflow.report.fold import ReportFold
        from stageflow.report.html import write_report

        _check_writable("--report", path)
        fold = ReportFold(saved)
        self.sinks.append(fold)

        def write() -> None:
            try:
                write_report(path, fold, graph=drawing)
            except OSError as error:  # a full disk: the run is over, and its results are still to be told
                click.echo(f"the report cannot be written to {path}: {error.strerror or error}", err=True)
            else:
                click.echo(f"report: {path}", err=True)

        self._report = write

    def _serve_metrics(self, port: int) -> None:
        from stageflow.observability.prometheus import MetricsServer, PrometheusSink

        sink = PrometheusSink()
        try:
            server = MetricsServer(sink, port=port)
        except OSError as error:
            raise click.UsageError(f"--metrics-port {port} cannot be served: {error.strerror or error}") from error
        self._open.enter_context(closing(server))
        self.sinks.append(sink)
        click.echo(f"metrics: {server.url}", err=True)

    def finish(self) -> None:
        """The run has ended: give the terminal back, and write what is to be written."""
        if self._progress is not None:
            self._progress.close()
        if self._report is not None:
            self._report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def _check_writable(option: str, path: str) -> None:
    """Say now, not after an hour of work, that a file cannot be written."""
    target = Path(path)
    existed = target.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab"):
            pass
        if not existed:
            target.unlink()
    except OSError as error:
        raise click.UsageError(f"{option} {path!r} cannot be written: {error.strerror or error}") from error
