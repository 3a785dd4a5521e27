"""The pictures of a report as inline SVG: the graph with its numbers, the timeline, and lines over time.

Text goes through `esc`; colours come from the page's classes, so that one picture serves light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from stageflow.observability.stats import StageStats
from stageflow.pipeline.layout import lay_out
from stageflow.report.fold import CELLS, Grid, ReportFold
from stageflow.report.text import duration, number, percent, plural, size

#: Beyond this a picture of the graph is a tangle; the table below it lists every stage.
MAX_NODES: Final = 80
_NODE_HEIGHT: Final = 62.0


def esc(text: object) -> str:
    """`text` for HTML content and quoted attributes; what may not stand in a page becomes a replacement character."""
    return escape(
        "".join(c if (c >= " " or c in "\n\t") and not "\ud800" <= c <= "\udfff" else "\ufffd" for c in str(text))
    )


def lane_class(lane: str) -> str:
    """A class name for a lane: only those the page knows, whatever the event said."""
    return lane if lane in ("async", "thread", "process", "inline", "dask", "ray") else "other"


# ---------------------------------------------------------------- the graph


def graph_svg(fold: ReportFold, stats: Mapping[str, StageStats]) -> str:
    """The graph with lane, counts and times on each box; empty when there are no stages or too many."""
    names = list(stats)
    if not names or len(names) > MAX_NODES:
        return ""
    index = {name: i for i, name in enumerate(names)}
    deps: list[list[int]] = [[] for _ in names]
    for a, b in fold.edges:
        if a in index and b in index and a != b and index[a] not in deps[index[b]]:
            deps[index[b]].append(index[a])
    depth = _depths(deps)
    if depth is None:
        return ""
    labels = [_box_lines(fold, stats[name]) for name in names]
    widths = [max(132.0, 26 + max(_width(_short(n), 13.5), *(_width(t, 11) for t in lines))) for n, lines in
              zip(names, labels, strict=True)]  # fmt: skip
    heights = [_NODE_HEIGHT] * len(names)
    gaps = {"layer_gap": 46.0, "box_gap": 18.0, "line_gap": 12.0}
    wide = lay_out(deps, depth, widths, heights, **gaps)
    down = wide.length > 1100
    layout = lay_out(deps, depth, heights, widths, **gaps) if down else wide
    width, height = (layout.breadth, layout.length) if down else (layout.length, layout.breadth)

    def point(along: float, across: float) -> tuple[float, float]:
        return (across, along) if down else (along, across)

    def ends(box_number: int) -> tuple[float, float]:
        box = layout.boxes[box_number]
        start, extent = layout.layer_start[box.layer], layout.layer_size[box.layer]
        if box.stage < 0:
            return start, start + extent
        middle = start + extent / 2
        return middle - box.along / 2, middle + box.along / 2

    parts = [_edge(path, layout, ends, point) for path in layout.routes.values()]
    busiest = max((s.busy_seconds for s in stats.values()), default=0.0) or 1.0
    for i, name in enumerate(names):
        start, end = ends(i)
        x, y = point((start + end) / 2, layout.boxes[i].centre)
        parts.append(_node(stats[name], labels[i], x - widths[i] / 2, y - _NODE_HEIGHT / 2, widths[i], busiest))
    return (
        f'<svg class="graph" viewBox="-8 -8 {width + 16:.0f} {height + 16:.0f}" width="{width + 16:.0f}"'
        f' height="{height + 16:.0f}" role="img" aria-label="The graph of stages with their counts and times">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0.5 7.5 4 0 7.5z"/></marker></defs>' + "".join(parts) + "</svg>"
    )


def _depths(deps: Sequence[Sequence[int]]) -> list[int] | None:
    """Longest path to each stage; None when the edges of the events are no DAG."""
    depth = [0] * len(deps)
    waiting = [len(d) for d in deps]
    after: list[list[int]] = [[] for _ in deps]
    for j, upstream in enumerate(deps):
        for i in upstream:
            after[i].append(j)
    ready = [i for i, n in enumerate(waiting) if not n]
    seen = 0
    while ready:
        i = ready.pop()
        seen += 1
        for j in after[i]:
            depth[j] = max(depth[j], depth[i] + 1)
            waiting[j] -= 1
            if not waiting[j]:
                ready.append(j)
    return depth if seen == len(deps) else None


def _box_lines(fold: ReportFold, s: StageStats) -> list[str]:
    shape = fold.shapes.get(s.stage, "")
    first = " · ".join(w for w in (shape if shape != "stage" else "", s.lane) if w)
    if s.status in ("skip", "pending"):
        second = "skipped" if s.status == "skip" else "not yet begun" if fold.status == "running" else "did not run"
    elif s.items_in > 1 or shape not in ("stage", ""):
        bad = f", {number(s.failed)} failed" if s.failed else ""
        second = f"{number(s.items_in)} → {number(s.items_out)}{bad} · {duration(s.p50_seconds)}"
    else:
        second = {"fail": "failed · ", "cancel": "cancelled · "}.get(s.status, "") + duration(s.wall_seconds)
    return [first, second]


def _edge(path: Sequence[int], layout: object, ends: object, point: object) -> str:
    boxes = layout.boxes  # type: ignore[attr-defined]
    at, across = ends(path[0])[1], boxes[path[0]].centre  # type: ignore[operator]
    x, y = point(at, across)  # type: ignore[operator]
    d = [f"M{x:.1f} {y:.1f}"]
    for position, box in enumerate(path[1:], start=1):
        start, end = ends(box)  # type: ignore[operator]
        last = position == len(path) - 1
        start -= 2 if last else 0
        to = boxes[box].centre
        bend = (start - at) / 2
        points = (point(at + bend, across), point(start - bend, to), point(start, to))  # type: ignore[operator]
        d.append("C" + " ".join(f"{px:.1f} {py:.1f}" for px, py in points))
        if not last:
            d.append("L{:.1f} {:.1f}".format(*point(end, to)))  # type: ignore[operator]
        at, across = end, to
    return f'<path class="edge" d="{"".join(d)}" marker-end="url(#tip)"/>'


def _node(s: StageStats, lines: list[str], x: float, y: float, width: float, busiest: float) -> str:
    state = s.status if s.status in ("ok", "fail", "skip", "cancel", "pending", "running") else "ok"
    if s.failed and state == "ok":
        state = "some"
    bar = (width - 24) * min(1.0, s.busy_seconds / busiest)
    tip = f"{s.stage}: {s.status}, {plural(s.items_in, 'item')}, busy {duration(s.busy_seconds)}"
    return (
        f'<g class="node {lane_class(s.lane)} {state}" transform="translate({x:.1f} {y:.1f})"><title>{esc(tip)}</title>'
        f'<rect class="box" width="{width:.1f}" height="{_NODE_HEIGHT:.0f}" rx="9"/>'
        f'<path class="stripe" d="M9 0H7a7 7 0 0 0-7 9V{_NODE_HEIGHT - 9:.0f}a7 7 0 0 0 7 9h2z"/>'
        f'<text class="name" x="17" y="19">{esc(_short(s.stage))}</text>'
        f'<text class="sub" x="17" y="34">{esc(lines[0])}</text><text class="sub" x="17" y="48">{esc(lines[1])}</text>'
        f'<rect class="track" x="17" y="54" width="{width - 24:.1f}" height="3" rx="1.5"/>'
        f'<rect class="bar" x="17" y="54" width="{bar:.1f}" height="3" rx="1.5"/></g>'
    )


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _width(text: str, font: float) -> float:
    return sum(1.0 if ord(c) > 0x2E80 else 0.36 if c in "iljtf .,:|'" else 0.62 for c in text) * font


# ---------------------------------------------------------------- over time


def timeline(fold: ReportFold, stats: Mapping[str, StageStats], span: float) -> str:
    """One row per stage and per worker: how much of each moment it was busy. `span` is the run's length in seconds."""
    rows = [(name, fold.busy.rows.get(name), lane_class(stats[name].lane)) for name in stats if name in fold.busy.rows]
    workers = [(name, cells, "process worker") for name, cells in list(fold.workers.rows.items())[:32]]
    if span <= 0 or not rows:
        return ""
    parts = [_strips(rows, fold.busy, span, "stage")]
    if workers:
        parts.append(_strips(workers, fold.workers, span, "worker"))
    return "".join(parts)


def _strips(rows: Sequence[tuple[str, dict[int, float] | None, str]], grid: Grid, span: float, what: str) -> str:
    out = [f'<div class="strips" role="img" aria-label="When each {what} was busy">']
    scale = 1000.0 / span
    for name, cells, css in rows:
        peak = max((cells or {}).values(), default=0.0) / grid.width
        full = max(1.0, peak)
        bars = []
        for cell, amount in sorted((cells or {}).items()):
            level = min(1.0, amount / grid.width / full)
            if level <= 0:
                continue
            x = cell * grid.width * scale
            wide = max(1.2, grid.width * scale + 0.15)
            tall = 4 + 14 * level
            bars.append(f'<rect x="{x:.1f}" y="{20 - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>')
        tip = f"{name}: at most {peak:.2g} at once"
        out.append(
            f'<div class="row" title="{esc(tip)}"><span class="label">{esc(name)}</span>'
            f'<svg class="strip {css}" viewBox="0 0 1000 20" preserveAspectRatio="none">{"".join(bars)}</svg></div>'
        )
    marks = "".join(f"<span>{esc(duration(span * k / 4) if k else '0')}</span>" for k in range(5))
    out.append(f'<div class="row axis"><span class="label"></span><span class="ticks">{marks}</span></div></div>')
    return "".join(out)


def memory_chart(fold: ReportFold, span: float) -> str:
    """Resident memory and live values over time against the limit; empty without samples."""
    samples = fold.samples
    if len(samples) < 2 or span <= 0:
        return ""
    limit = fold.run.get("memory_limit") or 0
    top = max(max(s.rss for s in samples), max(s.live for s in samples), 1)
    show_limit = bool(limit) and limit <= 3 * top
    top = max(top, limit) if show_limit else top
    lines = [
        ("rss", "resident memory of the engine and its workers", [(s.at, float(s.rss)) for s in samples]),
        ("live", "live values", [(s.at, float(s.live)) for s in samples]),
    ]
    extra = ""
    if show_limit:
        y = 100 - 96 * limit / top
        extra = f'<line class="limit" x1="0" x2="1000" y1="{y:.1f}" y2="{y:.1f}"/>'
    legend = [(css, label) for css, label, _ in lines]
    if limit:
        legend.append(("limit", f"budget of values: {size(limit)}"))
    return _plot(lines, span, top, size(top), extra, legend, "Memory over time")


def throughput_chart(fold: ReportFold, stats: Mapping[str, StageStats], span: float) -> str:
    """Items that ended per second, for up to six stages with the most items; empty for runs of plain stages."""
    chosen = sorted((s for s in stats.values() if s.items_in > 1), key=lambda s: -s.items_in)[:6]
    order = [name for name in stats if any(s.stage == name for s in chosen)]
    grid = fold.done
    if span <= 0 or not order:
        return ""
    # Coarser cells than the timeline's: a rate over a hundredth of a second is noise.
    step = max(1, CELLS // 60)
    cells = max(1, int(span / (grid.width * step)) + 1)
    lines, top = [], 0.0
    for place, name in enumerate(order):
        sums = [0.0] * cells
        for cell, amount in grid.rows.get(name, {}).items():
            sums[min(cells - 1, cell // step)] += amount
        widths = [min(span, (k + 1) * grid.width * step) - k * grid.width * step for k in range(cells)]
        rates = [amount / max(w, grid.width * step / 4) for amount, w in zip(sums, widths, strict=True)]
        points = [((k + 0.5) * grid.width * step, value) for k, value in enumerate(rates)]
        points = [(0.0, rates[0]), *[(min(at, span), v) for at, v in points], (span, rates[-1])]
        top = max(top, *rates)
        lines.append((f"line{place}", name, points))
    if top <= 0:
        return ""
    legend = [(css, name) for css, name, _ in lines]
    return _plot(lines, span, top, f"{number(round(top, 1))}/s", "", legend, "Items that ended per second")


def _plot(
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    span: float,
    top: float,
    top_label: str,
    extra: str,
    legend: Sequence[tuple[str, str]],
    label: str,
) -> str:
    paths = []
    for css, _, points in lines:
        d = " ".join(f"{min(1.0, at / span) * 1000:.1f},{100 - 96 * value / top:.1f}" for at, value in points)
        paths.append(f'<polyline class="{css}" points="{d}"/>')
    marks = "".join(f"<span>{esc(duration(span * k / 4) if k else '0')}</span>" for k in range(5))
    keys = "".join(f'<span class="key {css}">{esc(text)}</span>' for css, text in legend)
    return (
        f'<div class="plot"><div class="top">{esc(top_label)}</div>'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{esc(label)}">'
        f'{extra}{"".join(paths)}</svg><div class="ticks">{marks}</div><div class="keys">{keys}</div></div>'
    )


# ---------------------------------------------------------------- in the table

_WAITS: Final = ("slot", "upstream", "downstream", "bytes", "memory", "token", "rate", "approval", "retry")


def wait_bar(s: StageStats) -> str:
    """The stage's waiting time split by reason, as one bar with a text for every reader."""
    total = sum(s.wait.values())
    if total <= 0:
        return ""
    ordered = sorted(s.wait.items(), key=lambda kv: -kv[1])
    text = ", ".join(f"{reason} {duration(seconds)}" for reason, seconds in ordered if seconds > 0)
    parts = "".join(
        f'<i class="w-{reason if reason in _WAITS else "other"}" style="width:{100 * seconds / total:.1f}%"></i>'
        for reason, seconds in ordered
        if seconds > 0
    )
    main, share = ordered[0][0], ordered[0][1] / total
    return f'<span class="waits" title="{esc(text)}">{parts}</span><small>{esc(main)} {percent(share)}</small>'
