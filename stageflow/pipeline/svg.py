"""The SVG picture: boxes with a stripe in the colour of their lane, smooth edges, a legend; light and dark by media
query.

Plain class rules and no variables, so that viewers with a small idea of CSS show it as well.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.layout import Layout, lay_out
from stageflow.pipeline.spec import Role

_HEIGHT: Final = 46.0
_MARGIN: Final = 28.0
_LEAST_WIDTH: Final = 112.0
_LONGEST: Final = 30  #: characters of a name that are shown
_WIDE: Final = 1500.0  #: pixels; a left-to-right picture wider than this is drawn top-down if that is narrower

#: lane -> (light, dark)
LANES: Final = {
    "async": ("#7c5cd6", "#a993f0"),
    "thread": ("#2f7ed8", "#6fb0f5"),
    "process": ("#d9622b", "#f2935f"),
    "inline": ("#6b7280", "#a3abb8"),
    "dask": ("#a8791a", "#e0b355"),
    "ray": ("#0e8f7e", "#4cc9b6"),
}
_EDGES: Final = {
    "stream": "elements",
    "fused": "elements, same worker",
    "all": "whole sequence",
    "value": "value",
    "order": "order only",
}


def draw_svg(
    graph: StageGraph, lanes: Sequence[str], subtitles: Sequence[str], kinds: Mapping[tuple[int, int], str]
) -> str:
    """The picture as SVG text. `kinds` says for (upstream, downstream) which of the five edges it is."""
    names = [_short(spec.name) for spec in graph.specs]
    widths = [
        max(_LEAST_WIDTH, 34 + max(_text_width(name, 13.5), _text_width(sub, 11)))
        for name, sub in zip(names, subtitles, strict=True)
    ]
    layout, down = _best_layout(graph, widths)
    title_width = _text_width(graph.name, 17) + 120
    legend = _legend(sorted(set(lanes), key=list(LANES).index), [k for k in _EDGES if k in set(kinds.values())])
    inner = layout.breadth if down else layout.length
    tall = layout.length if down else layout.breadth
    width = max(inner, title_width, legend[1]) + 2 * _MARGIN
    shift = (width - inner) / 2 if inner < width - 2 * _MARGIN else _MARGIN
    top = 66.0
    height = top + tall + 30 + 34 + _MARGIN / 2
    canvas = _Canvas(layout, down, shift, top)
    body = [canvas.edge(path, kinds[pair]) for pair, path in layout.routes.items()]
    body += [
        canvas.node(i, graph.specs[i].name, names[i], subtitles[i], lanes[i], graph.specs[i].role, widths[i])
        for i in range(len(graph.specs))
    ]
    count = f"{graph.stage_count} stage{'' if graph.stage_count == 1 else 's'}"
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
                f'height="{height:.0f}" role="img" aria-label="{_attribute(f"Pipeline {graph.name}, {count}")}">'
            ),
            f"<title>{_text(graph.name)}</title>",
            f"<style>{_style()}</style>",
            _markers(),
            f'<rect class="page" width="{width:.0f}" height="{height:.0f}" rx="10"/>',
            (
                f'<text class="title" x="{_MARGIN:.0f}" y="38">{_text(_short(graph.name, 60))}'
                f'<tspan class="count" dx="12">{count}</tspan></text>'
            ),
            *body,
            f'<g transform="translate({_MARGIN:.0f} {height - 30:.0f})">{legend[0]}</g>',
            "</svg>",
            "",
        ]
    )


def _best_layout(graph: StageGraph, widths: list[float]) -> tuple[Layout, bool]:
    """Left to right, unless that is wider than a screen and top-down is not."""
    heights = [_HEIGHT] * len(widths)
    across = lay_out(graph.deps, graph.depth, widths, heights, layer_gap=58, box_gap=22, line_gap=16)
    if across.length <= _WIDE:
        return across, False
    down = lay_out(graph.deps, graph.depth, heights, widths, layer_gap=44, box_gap=26, line_gap=18)
    return (down, True) if down.breadth < across.length else (across, False)


class _Canvas:
    """Turns the layout's two directions into x and y."""

    __slots__ = ("down", "layout", "left", "top")

    def __init__(self, layout: Layout, down: bool, left: float, top: float) -> None:
        self.layout = layout
        self.down = down
        self.left = left
        self.top = top

    def _point(self, along: float, across: float) -> tuple[float, float]:
        x, y = (across, along) if self.down else (along, across)
        return x + self.left, y + self.top

    def _ends(self, number: int) -> tuple[float, float]:
        """Where, along, lines reach and leave a box; a waypoint spans its whole layer."""
        box = self.layout.boxes[number]
        start, size = self.layout.layer_start[box.layer], self.layout.layer_size[box.layer]
        if box.stage < 0:
            return start, start + size
        middle = start + size / 2
        return middle - box.along / 2, middle + box.along / 2

    def edge(self, path: Sequence[int], kind: str) -> str:
        """One edge through its waypoints: bends only between layers."""
        boxes = self.layout.boxes
        at = self._ends(path[0])[1]
        across = boxes[path[0]].centre
        x, y = self._point(at, across)
        parts = [f"M{x:.1f} {y:.1f}"]
        for position, number in enumerate(path[1:], start=1):
            start, end = self._ends(number)
            last = position == len(path) - 1
            start -= 7 if last else 0  # room for the arrow's tip
            next_across = boxes[number].centre
            if abs(next_across - across) < 0.5:
                parts.append("L{:.1f} {:.1f}".format(*self._point(start, next_across)))
            else:
                bend = (start - at) * 0.5
                points = (
                    self._point(at + bend, across),
                    self._point(start - bend, next_across),
                    self._point(start, next_across),
                )
                parts.append("C" + " ".join(f"{px:.1f} {py:.1f}" for px, py in points))
            if not last and end > start:
                parts.append("L{:.1f} {:.1f}".format(*self._point(end, next_across)))
            at, across = end, next_across
        return f'<path class="edge {kind}" d="{" ".join(parts)}" marker-end="url(#tip-{kind})"/>'

    def node(self, i: int, full: str, name: str, sub: str, lane: str, role: Role, width: float) -> str:
        """One box. What runs once per element is drawn as a stack."""
        start, end = self._ends(i)
        x, y = self._point((start + end) / 2, self.layout.boxes[i].centre)
        x, y = x - width / 2, y - _HEIGHT / 2
        stack = ""
        if role in (Role.MAP, Role.SINK):
            stack = f'<rect class="box" x="5" y="5" width="{width:.1f}" height="{_HEIGHT:.0f}" rx="8"/>'
        dashed = " source" if role is Role.SOURCE else ""
        return (
            f'<g class="node {lane}{dashed}" transform="translate({x:.1f} {y:.1f})">'
            f"<title>{_text(full)}: {_text(sub)}, {_text(lane)} lane</title>{stack}"
            f'<rect class="box" width="{width:.1f}" height="{_HEIGHT:.0f}" rx="8"/>'
            f'<path class="stripe" d="M8 0H6a6 6 0 0 0-6 8V{_HEIGHT - 8:.0f}a6 6 0 0 0 6 8h2z"/>'
            f'<text class="name" x="20" y="20">{_text(name)}</text>'
            f'<text class="sub" x="20" y="36">{_text(sub)}</text></g>'
        )


def _legend(lanes: Sequence[str], kinds: Sequence[str]) -> tuple[str, float]:
    parts, x = [], 0.0
    for lane in lanes:
        parts.append(
            f'<g class="{lane}"><rect class="stripe" x="{x:.0f}" y="-9" width="11" height="11" rx="3"/></g>'
            f'<text class="sub" x="{x + 17:.0f}" y="1">{lane}</text>'
        )
        x += 17 + _text_width(lane, 11) + 22
    if lanes and kinds:
        x += 6
    for kind in kinds:
        parts.append(
            f'<path class="edge {kind}" d="M{x:.0f} -3H{x + 22:.0f}" marker-end="url(#tip-{kind})"/>'
            f'<text class="sub" x="{x + 36:.0f}" y="1">{_EDGES[kind]}</text>'
        )
        x += 36 + _text_width(_EDGES[kind], 11) + 22
    return "".join(parts), x


def _markers() -> str:
    tips = "".join(
        f'<marker id="tip-{kind}" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="tip" d="M0 .5 8 4 0 7.5z"/></marker>'
        for kind in _EDGES
        if kind != "all"
    )
    bar = (
        '<marker id="tip-all" viewBox="0 0 8 10" refX="1" refY="5" markerWidth="8" markerHeight="10" '
        'markerUnits="userSpaceOnUse" orient="auto"><path class="tip" d="M0 1.5 6 5 0 8.5zM6 0h2v10H6z"/></marker>'
    )
    return f"<defs>{tips}{bar}</defs>"


def _style() -> str:
    light = [
        ".page{fill:#fbfbfd}",
        "text{font-family:ui-sans-serif,system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1d2433}",
        ".title{font-size:17px;font-weight:600}",
        ".count{font-size:12px;font-weight:400;fill:#6b7485}",
        ".name{font-size:13.5px;font-weight:600}",
        ".sub{font-size:11px;fill:#6b7485}",
        ".box{fill:#fff;stroke:#d5dae3;stroke-width:1.2}",
        ".source .box{stroke-dasharray:5 3}",
        ".edge{fill:none;stroke:#98a2b3;stroke-width:1.5}",
        ".edge.stream,.edge.all{stroke-width:2.6}",
        f".edge.fused{{stroke-width:6;stroke:{LANES['process'][0]};stroke-opacity:.55}}",
        ".edge.order{stroke-dasharray:5 4}",
        ".tip{fill:#7d8799}",
        *(f".{lane} .stripe{{fill:{colour}}}" for lane, (colour, _) in LANES.items()),
    ]
    dark = [
        ".page{fill:#14171f}",
        "text{fill:#e8ebf2}",
        ".count,.sub{fill:#98a2b5}",
        ".box{fill:#1f2430;stroke:#394152}",
        ".edge{stroke:#69758a}",
        f".edge.fused{{stroke:{LANES['process'][1]}}}",
        ".tip{fill:#8a96ab}",
        *(f".{lane} .stripe{{fill:{colour}}}" for lane, (_, colour) in LANES.items()),
    ]
    return "".join(light) + "@media(prefers-color-scheme:dark){" + "".join(dark) + "}"


def _short(name: str, limit: int = _LONGEST) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _text_width(text: str, size: float) -> float:
    """Pixels, roughly: there is no font to ask."""
    units = 0.0
    for letter in text:
        if unicodedata.east_asian_width(letter) in "WF":
            units += 1.0
        elif letter in "iljtfI.,:;|!'()[] ·":
            units += 0.34
        elif letter in "mwMW@%":
            units += 0.88
        else:
            units += 0.66 if letter.isupper() else 0.57
    return units * size


def _text(text: str) -> str:
    """Escaped for element content; characters that XML cannot hold become a replacement character."""
    return escape(
        "".join(c if c >= " " and not "\ud800" <= c <= "\udfff" and c not in "\ufffe\uffff" else "\ufffd" for c in text)
    )


def _attribute(text: str) -> str:
    return _text(text).replace('"', "&quot;")
