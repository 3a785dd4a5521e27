"""Draws a graph as text, as Mermaid or DOT source, or as an SVG picture. Names are data: each format escapes them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import StageKind
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.names import did_you_mean
from stageflow.pipeline.placement import place
from stageflow.pipeline.regions import find_regions
from stageflow.pipeline.spec import Role, StageSpec
from stageflow.pipeline.svg import draw_svg

#: nobody can read a picture of more, and every edge past a layer needs a waypoint in it
MOST_IN_A_PICTURE: Final = 2_000

_LANE_COLOURS: Final = {
    "async": "#7c5cd6",
    "thread": "#2f7ed8",
    "process": "#d9622b",
    "inline": "#6b7280",
    "dask": "#b7791f",
    "ray": "#0e8f7e",
}


def draw(graph: StageGraph, format: str = "text") -> str:
    """`graph` in one of the formats text, mermaid, dot, svg. DefinitionError for any other."""
    drawer = _DRAWERS.get(format)
    if drawer is None:
        hint = did_you_mean(str(format), _DRAWERS, what="Formats")
        raise DefinitionError(f"a graph cannot be drawn as {format!r}", hint=hint, format=format)
    return drawer(graph)


def lanes_of(graph: StageGraph) -> list[str]:
    """The lane of each stage under the placement table alone."""
    return [str(place(spec).lane) for spec in graph.specs]


def subtitle(graph: StageGraph, i: int) -> str:
    """The second line of a stage's box."""
    spec = graph.specs[i]
    if spec.form == "graph":
        words = "subpipeline"
    elif spec.role is Role.TASK:
        words = str(spec.kind)
    else:
        words = f"{spec.role.name.lower()} · {spec.kind}"
    return f"{words} · when {graph.routes[i][1]}" if i in graph.routes else words


def edge_kind(graph: StageGraph, i: int, j: int) -> str:
    """How stage j depends on stage i: "stream" of elements, "all" of them at once, "value", or "order" only."""
    spec: StageSpec = graph.specs[j]
    if graph.streams[i] and (spec.over == i or i in graph.joins.get(j, ())):
        return "stream"
    if i in graph.barriers.get(j, ()):
        return "all"
    return "value" if graph.reads(j, i) else "order"


def edge_kinds(graph: StageGraph, lanes: list[str]) -> dict[tuple[int, int], str]:
    """(upstream, downstream) -> how the one depends on the other, and "fused" where elements stay in one worker."""
    kinds = {(j, i): edge_kind(graph, j, i) for i in range(len(graph.specs)) for j in graph.deps[i]}
    for members in find_regions(graph, lanes).values():
        kinds.update(dict.fromkeys(pairwise(members), "fused"))
    return kinds


# ---------------------------------------------------------------- text


def draw_text(graph: StageGraph) -> str:
    """One line per stage in execution order: what it is and what comes before it."""
    lanes = lanes_of(graph)
    width = max((len(spec.name) + min(graph.depth[i], 12) * 2 for i, spec in enumerate(graph.specs)), default=0)
    lines = [f"{graph.name} ({graph.stage_count} stages)"]
    marks = {"stream": "*", "fused": "+", "all": "[*]", "value": "", "order": "~"}
    kinds = edge_kinds(graph, lanes)
    for i in graph.order:
        spec = graph.specs[i]
        label = "  " * min(graph.depth[i], 12) + spec.name
        sources = ", ".join(graph.specs[j].name + marks[kinds[j, i]] for j in graph.deps[i])
        if not sources and spec.over_input is not None:
            sources = f"input {spec.over_input}*"
        tail = f"  <- {sources}" if sources else ""
        lines.append(f"  {label.ljust(width)}  {lanes[i]:<8}{subtitle(graph, i)}{tail}")
    legend = [
        ("stream", "* element by element"),
        ("fused", "+ element by element in the same worker"),
        ("all", "[*] the whole sequence"),
        ("order", "~ order only"),
    ]
    drawn = set(kinds.values())
    if said := [words for kind, words in legend if kind in drawn]:
        lines.append(f"  ({', '.join(said)})")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- mermaid


def _mermaid_text(text: str) -> str:
    """Inside a quoted Mermaid label everything but the characters below is literal."""
    escapes = {
        '"': "#quot;",
        "#": "#35;",
        "<": "#lt;",
        ">": "#gt;",
        "&": "#amp;",
        "`": "#96;",
        "\\": "#92;",
        ";": "#59;",
    }
    return "".join(escapes.get(letter, letter) for letter in text)


_MERMAID_SHAPES: Final = {
    Role.TASK: ('["', '"]'),
    Role.SOURCE: ('(["', '"])'),
    Role.MAP: ('[["', '"]]'),
    Role.REDUCE: ('[/"', '"\\]'),
    Role.SINK: ('[("', '")]'),
}


def draw_mermaid(graph: StageGraph) -> str:
    """Mermaid flowchart source. Nodes are numbered; a name appears only as a quoted label."""
    lanes = lanes_of(graph)
    lines = ["flowchart LR"]
    for i, spec in enumerate(graph.specs):
        left, right = _MERMAID_SHAPES[spec.role]
        if spec.kind is StageKind.ROUTE and spec.role is Role.TASK:
            left, right = '{"', '"}'
        label = f"{_mermaid_text(spec.name)}<br/><small>{_mermaid_text(subtitle(graph, i))}</small>"
        lines.append(f"    s{i}{left}{label}{right}:::{lanes[i]}")
    arrows = {"stream": "==>", "fused": "==>|same worker|", "all": "==>|all|", "value": "-->", "order": "-.->"}
    for (j, i), kind in edge_kinds(graph, lanes).items():
        lines.append(f"    s{j} {arrows[kind]} s{i}")
    for lane in dict.fromkeys(lanes):
        colour = _LANE_COLOURS.get(lane, "#6b7280")
        lines.append(f"    classDef {lane} stroke:{colour},stroke-width:2px")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- dot


def _dot_text(text: str) -> str:
    """A quoted DOT string: only the quote ends it, and a backslash begins an escape."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_DOT_SHAPES: Final = {
    Role.TASK: "box",
    Role.SOURCE: "cds",
    Role.MAP: "box3d",
    Role.REDUCE: "invtrapezium",
    Role.SINK: "cylinder",
}


def draw_dot(graph: StageGraph) -> str:
    """Graphviz source. Nodes are numbered; a name appears only as a quoted label."""
    lanes = lanes_of(graph)
    lines = [
        f"digraph {_dot_text(graph.name)} {{",
        "    rankdir=LR;",
        '    node [fontname="Helvetica", style="rounded,filled", fillcolor="white"];',
    ]
    for i, spec in enumerate(graph.specs):
        shape = "diamond" if spec.kind is StageKind.ROUTE and spec.role is Role.TASK else _DOT_SHAPES[spec.role]
        label = _dot_text(spec.name)[:-1] + "\\n" + _dot_text(subtitle(graph, i))[1:]
        colour = _LANE_COLOURS.get(lanes[i], "#6b7280")
        tip = _dot_text(f"{lanes[i]} lane")
        lines.append(f'    s{i} [label={label}, shape={shape}, color="{colour}", penwidth=2, tooltip={tip}];')
    styles = {
        "stream": " [penwidth=2.5]",
        "fused": f' [penwidth=5, arrowhead=none, color="{_LANE_COLOURS["process"]}", tooltip="same worker"]',
        "all": " [penwidth=2.5, arrowhead=box]",
        "value": "",
        "order": " [style=dashed]",
    }
    for (j, i), kind in edge_kinds(graph, lanes).items():
        lines.append(f"    s{j} -> s{i}{styles[kind]};")
    return "\n".join(lines) + "\n}\n"


def _svg(graph: StageGraph) -> str:
    if graph.stage_count > MOST_IN_A_PICTURE:
        raise DefinitionError(
            f"pipeline {graph.name!r} has {graph.stage_count} stages, too many for a picture",
            hint=f"Pictures go up to {MOST_IN_A_PICTURE} stages; draw as text or dot, or draw a subpipeline.",
        )
    titles = [subtitle(graph, i) for i in range(len(graph.specs))]
    lanes = lanes_of(graph)
    return draw_svg(graph, lanes, titles, edge_kinds(graph, lanes))


_DRAWERS: Final[dict[str, Callable[[StageGraph], str]]] = {
    "text": draw_text,
    "mermaid": draw_mermaid,
    "dot": draw_dot,
    "svg": _svg,
}
