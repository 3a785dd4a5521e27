"""`plan` and `draw`: look at a graph without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from stageflow.cli.loading import load_graph
from stageflow.cli.options import as_config, engine_options, target_argument
from stageflow.report.terminal import jsonable


@click.command(
    short_help="Print where each stage would run, and why.",
    epilog="""\b
Examples:
  stageflow plan shop.pipeline:graph
  stageflow plan shop.py:graph --processes 4
  stageflow plan stageflow.demo.pipeline:graph --json
""",
)
@target_argument
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan(target: str, as_json: bool, **options: Any) -> None:
    """Print where each stage of MODULE:GRAPH would run, and why.

    Also the bindings that were made by name alone, the parameters that may be absent, and what bounds memory. Runs
    nothing.
    """
    made = load_graph(target).plan(as_config(options))
    if as_json:
        click.echo(msgspec.json.encode(jsonable(made.to_dict())))
    else:
        click.echo(str(made))


@click.command(
    short_help="Draw a graph: text, Mermaid, DOT or SVG.",
    epilog="""\b
Examples:
  stageflow draw shop.pipeline:graph
  stageflow draw shop.py:graph --format svg --output shop.svg
  stageflow draw shop.py:graph --format dot | dot -Tpng > shop.png
""",
)
@target_argument
@click.option(
    "--format",
    "-f",
    "style",
    type=click.Choice(["text", "mermaid", "dot", "svg"]),
    help="Default: text, or what the name of --output says.",
)
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="Write to this file instead of standard output.")
def draw(target: str, style: str | None, output: str | None) -> None:
    """Draw MODULE:GRAPH."""
    if style is None:
        style = {".svg": "svg", ".dot": "dot", ".gv": "dot", ".mmd": "mermaid"}.get(Path(output or "").suffix, "text")
    graph = load_graph(target)
    picture = graph.draw(style)  # type: ignore[arg-type]
    if output is None:
        click.echo(picture)
        return
    try:
        Path(output).write_text(picture.rstrip("\n") + "\n", "utf-8")
    except OSError as error:
        raise click.UsageError(f"{output!r} cannot be written: {error.strerror or error}") from error
    print(f"{output}: {len(graph)} stages", file=sys.stderr)
