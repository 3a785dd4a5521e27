"""`run`: anybody's graph, from the command line."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

import click
import msgspec

from stageflow.cli.inputs import read_inputs
from stageflow.cli.lines import WholeLines, closing_lines
from stageflow.cli.loading import load_graph
from stageflow.cli.options import as_config, engine_options, run_options, target_argument
from stageflow.cli.show import as_data, print_result, stopped
from stageflow.report.failed import FailedInput
from stageflow.report.terminal import CpuMeter
from stageflow.report.views import Views, view_options


@click.command(
    short_help="Run a graph and print what came out.",
    epilog="""\b
Examples:
  stageflow run shop.pipeline:graph --input day=friday --input limit=100
  stageflow run shop.py:graph --input-file inputs.json --input page=@page.html
  stageflow run shop.py:graph --json | jq .outputs.store.data
  stageflow run shop.py:graph --lane inline                  breakpoint() works anywhere
  stageflow run shop.py:graph --report run.html --trace run.json
""",
)
@target_argument
@click.option("--input", "-i", "pairs", multiple=True, metavar="NAME=VALUE", help="One input; @FILE reads its value.")
@click.option("--input-file", metavar="FILE", help="Inputs as a JSON object; - is standard input.")
@engine_options
@run_options
@view_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--traceback", is_flag=True, help="Print the whole traceback of each failure.")
def run(
    target: str, pairs: tuple[str, ...], input_file: str | None, as_json: bool, traceback: bool, **options: Any
) -> int:
    """Run MODULE:GRAPH once and print what came out.

    MODULE is a dotted name or a .py file. GRAPH is a graph, a builder, or a function without arguments that returns
    one; it may be left out if there is only one. A value is read as its stage declares it; where nothing is declared,
    as JSON if it is JSON, else as text.
    """
    graph = load_graph(target)
    inputs = read_inputs(graph, pairs, input_file)
    with Views.from_options(graph, options, FailedInput(snapshot=inputs, target=target)) as views:
        meter = CpuMeter()
        try:
            # what stages print must not come between the lines of a program's output, nor share a line
            printed = sys.stderr if as_json else sys.stdout
            lines = printed if printed.isatty() else WholeLines(printed)
            with redirect_stdout(lines), closing_lines(lines):
                result = graph.run(inputs, event_sinks=views.sinks, **as_config(options))
            code = 0 if result.success else 1
        except (KeyboardInterrupt, SystemExit) as interrupt:
            result, code = stopped(interrupt)
            if result is None:
                raise
        cpu = meter.split(result.stats)
        views.finish()
    if as_json:
        sys.stdout.write(msgspec.json.encode(as_data(graph, result)).decode() + "\n")
    else:
        print_result(graph, result, cpu, traceback=traceback)
    return code
