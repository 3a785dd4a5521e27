"""One self-contained HTML page about an indexed tree: numbers, charts drawn as SVG, tables. It loads nothing.

Pure: modules in, text out. May not import the engine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from math import inf, log10
from typing import Final

import msgspec

from stageflow.demo.source import Module

_SIZES: Final = (0, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)
_ROWS: Final = 25


class Package(msgspec.Struct, frozen=True):
    """One installed distribution, as the package service describes it."""

    name: str
    version: str
    summary: str = ""
    requires: int = 0
    files: int = 0
    nbytes: int = 0


def render(modules: Sequence[Module], packages: Sequence[Package] | None, *, title: str, root: str, python: str) -> str:
    """The whole page. `packages` is None where they were not asked for."""
    good = [module for module in modules if not module.skipped]
    skipped = [module for module in modules if module.skipped]
    public = sum(module.public for module in good)
    documented = sum(module.documented for module in good)
    numbers = [
        ("modules", f"{len(good):,}"),
        ("lines", f"{sum(module.lines for module in good):,}"),
        ("functions", f"{sum(module.functions for module in good):,}"),
        ("classes", f"{sum(module.classes for module in good):,}"),
        ("documented", f"{documented / public:.0%}" if public else "-"),
        ("skipped", f"{len(skipped):,}"),
    ]
    imported = Counter(name for module in good for name in module.imports)
    parts = [
        f"<header><h1>{escape(title or root)}</h1><p>{escape(root)} · read by Python {escape(python)}</p>",
        '<div class="numbers">',
        *(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in numbers),
        "</div></header>",
        _figure("How long modules are", "lines per module", _histogram([module.lines for module in good])),
        _figure("Size and complexity", "each dot is a module; both axes are logarithmic", _scatter(good)),
        _figure("What is imported most", "modules that import it", _bars(imported.most_common(15))),
        _figure("Where the code is", "lines by top-level package", _bars(_by_package(good))),
        _section("Most complex functions", ("function", "module", "line", "complexity"), _worst(good)),
        _section(
            "Largest modules", ("module", "lines", "functions", "classes", "complexity", "documented"), _largest(good)
        ),
    ]
    if skipped:
        rows = [(module.path, module.skipped) for module in skipped]
        parts.append(_section(f"Skipped ({len(skipped)})", ("file", "why"), rows))
    if packages:
        found = [(p.name, p.version, p.files, p.nbytes // 1024, p.requires, p.summary) for p in packages]
        parts.append(
            _section("Installed packages", ("package", "version", "files", "KiB", "requires", "what it is"), found)
        )
    heading = escape(f"{title or root}: source index")
    return _PAGE.replace("@TITLE@", heading).replace("@BODY@", "\n".join(parts))


def _by_package(modules: Iterable[Module]) -> list[tuple[str, int]]:
    lines: dict[str, int] = defaultdict(int)
    for module in modules:
        package, slash, _ = module.path.partition("/")
        lines[package if slash else "(top level)"] += module.lines
    return sorted(lines.items(), key=lambda row: (-row[1], row[0]))[:15]


def _worst(modules: Iterable[Module]) -> list[tuple[object, ...]]:
    ranked = sorted((m for m in modules if m.worst), key=lambda m: (-m.worst_complexity, m.path))
    return [(m.worst, m.path, m.worst_line, m.worst_complexity) for m in ranked[:_ROWS]]


def _largest(modules: Iterable[Module]) -> list[tuple[object, ...]]:
    ranked = sorted(modules, key=lambda m: (-m.lines, m.path))[:_ROWS]
    return [(m.path, m.lines, m.functions, m.classes, m.complexity, f"{m.documented} of {m.public}") for m in ranked]


def _figure(title: str, note: str, drawing: str) -> str:
    return f"<figure><figcaption><h2>{escape(title)}</h2><p>{escape(note)}</p></figcaption>{drawing}</figure>"


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return (
        f"<section><h2>{escape(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="n" data-v="{value}">{value:,}</td>'
    return f"<td>{escape(str(value))}</td>"


def _histogram(values: Sequence[int]) -> str:
    """Counts between the bounds of `_SIZES`."""
    counts = [sum(low <= value < high for value in values) for low, high in pairwise((*_SIZES, inf))]
    top = max(counts, default=0) or 1
    step = 520 / len(counts)
    out = [_OPEN.format(height=250)]
    for row, count in enumerate(counts):
        tall, left = 190 * count / top, row * step
        out.append(_bar(left + 4, 205 - tall, step - 8, tall))
        out.append(_text(left + step / 2, 198 - tall, str(count or ""), "mid"))
        out.append(_text(left + 4, 224, str(_SIZES[row])))
    return "".join([*out, _line("axis", 0, 205, 520, 205), _text(516, 244, "from this many lines", "end"), "</svg>"])


def _scatter(modules: Iterable[Module]) -> str:
    """Lines against complexity, both logarithmic, the dot darker where many overlap."""
    shown = [module for module in modules if module.lines and module.complexity]
    right = max((log10(module.lines) for module in shown), default=1.0) or 1.0
    top = max((log10(module.complexity) for module in shown), default=1.0) or 1.0
    out = [_OPEN.format(height=250)]
    for power in range(1, int(right) + 1):
        x = 40 + 470 * power / right
        out += [_line("grid", x, 8, x, 215), _text(x, 230, f"{10**power:,}", "mid")]
    for power in range(1, int(top) + 1):
        y = 215 - 200 * power / top
        out += [_line("grid", 40, y, 512, y), _text(34, y + 4, f"{10**power:,}", "end")]
    for module in shown:
        x = 40 + 470 * log10(module.lines) / right
        y = 215 - 200 * log10(module.complexity) / top
        note = escape(f"{module.path}: {module.lines:,} lines, complexity {module.complexity:,}")
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{note}</title></circle>')
    out += [_line("axis", 40, 215, 512, 215), _line("axis", 40, 8, 40, 215)]
    return "".join([*out, _text(512, 246, "lines", "end"), _text(46, 16, "complexity"), "</svg>"])


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    """Horizontal bars, longest first."""
    top = max((value for _, value in rows), default=0) or 1
    out = [_OPEN.format(height=max(len(rows), 1) * 18 + 6)]
    for row, (name, value) in enumerate(rows):
        y, wide = row * 18 + 4, max(330 * value / top, 1)
        out += [_text(128, y + 11, name[:20], "end"), _bar(136, y, wide, 13), _text(142 + wide, y + 11, f"{value:,}")]
    return "".join([*out, "</svg>"])


_OPEN: Final = '<svg viewBox="0 0 520 {height}" role="img">'


def _text(x: float, y: float, text: str, style: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _bar(x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3"/>'


_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --paper: #fff; --back: #f5f6f8;
  --bar: #3b6fd4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #98a2b3; --line: #2b3240; --paper: #171c25; --back: #0f131a; --bar: #6d9bf1 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1160px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)) }
header, section { grid-column: 1 / -1 }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 0 0 .35rem; font-size: 1.05rem } p { margin: 0; color: var(--soft) }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: 1.1rem }
.numbers div, figure, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px }
.numbers div { flex: 1 1 120px; padding: .7rem 1rem }
.numbers b { display: block; font-size: 1.45rem } .numbers span { color: var(--soft) }
figure { margin: 0; padding: 1rem 1.1rem } figcaption { margin-bottom: .7rem } figcaption p { font-size: .85rem }
section { padding: 1rem 1.1rem; overflow-x: auto }
svg { width: 100%; height: auto; display: block } svg text { font-size: 11px; fill: var(--soft) }
.mid { text-anchor: middle } .end { text-anchor: end }
.bar { fill: var(--bar) } circle { fill: var(--bar); fill-opacity: .35 }
.axis { stroke: var(--soft); stroke-width: 1 } .grid { stroke: var(--line); stroke-width: 1 }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 600; cursor: pointer; border-bottom: 1px solid var(--line); white-space: nowrap }
tbody tr:hover { background: var(--back) } .n { font-variant-numeric: tabular-nums }
</style></head><body>
@BODY@
<script>
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.dataset.down = head.dataset.down === "1" ? "0" : "1";
  const key = row => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : +cell.dataset.v;
  };
  const sign = down === "1" ? -1 : 1;
  body.append(...[...body.rows].sort((a, b) => (key(a) < key(b) ? -sign : key(a) > key(b) ? sign : 0)));
};
</script></body></html>
"""
