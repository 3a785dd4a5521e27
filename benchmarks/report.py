"""The table for people: on a terminal, and in the README between markers. Numbers come from the JSON, never by hand.

May not import: any peer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Outcome, Report
from benchmarks.scale import Scale
from benchmarks.stats import Interval


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    digits = 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.1f}"


def bar_text(row: Outcome) -> str:
    """The bar as it is written in the table."""
    if row.bar is None:
        return "-"
    return f"{'<=' if row.at_most else '>='} {number(row.bar)}"


def ratio_text(found: Interval | None, unit: str = "") -> str:
    """Median and interval."""
    if found is None:
        return "-"
    return f"{number(found.median)}{' ' + unit if unit else ''} ({number(found.low)} to {number(found.high)})"


def rows_of(reports: Iterable[Report]) -> list[Outcome]:
    """Every row, ordered by id."""
    rows = [row for report in reports for row in report.rows if not row.note.endswith("at this scale")]
    order = {letter: place for place, letter in enumerate("LTPSCEM")}
    return sorted(rows, key=lambda row: (order.get(row.id[0], 9), row.id, row.bar is None))


def table(reports: Iterable[Report]) -> str:
    """Markdown: one line per row."""
    lines = [
        "| id | measure | beside | ratio, 95 % interval | spread | bar | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows_of(reports):
        spread = f"{row.ratio.spread:.0%}" if row.ratio is not None and row.ratio.count > 1 else "-"
        verdict = f"{row.verdict}: {row.note}" if row.note else row.verdict
        if row.verdict == "missed":
            verdict = "**missed**"
        cells = (row.id, row.what, row.against, ratio_text(row.ratio, row.unit), spread, bar_text(row), verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plain_table(reports: Iterable[Report]) -> str:
    """The same for a terminal: columns aligned."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table(reports).splitlines()]
    rows = [row for place, row in enumerate(rows) if place != 1]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def machine_text(machine: Mapping[str, Any], seconds: float) -> str:
    """One paragraph about where and when."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Measured {machine['date']} on {machine['cores']} cores of {machine['cpu']}, {machine['system']}, "
        f"Python {machine['python']}; {versions}. The command took {seconds / 60:.0f} minutes."
    )


def metg_table(curves: Mapping[str, Sequence[Sequence[float]]], reports: Iterable[Report]) -> str:
    """METG(50 %) of each system by pattern, in microseconds."""
    found: dict[str, dict[str, float]] = {}
    for row in rows_of(reports):
        if row.id != "M1":
            continue
        for side, seconds in row.sides.items():
            pattern, _, system = side.partition("/")
            found.setdefault(pattern, {})[system] = seconds
    systems = list(dict.fromkeys(system for row in found.values() for system in row))
    lines = [f"| pattern | {' | '.join(f'{system}, us' for system in systems)} |", "|---" * (len(systems) + 1) + "|"]
    for pattern, by_system in found.items():
        cells = [number(by_system[system] * 1e6) if system in by_system else "-" for system in systems]
        lines.append(f"| {pattern} | {' | '.join(cells)} |")
    return "\n".join(lines)


def panels(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves by pattern, then by system."""
    made: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in curves.items():
        pattern, _, system = name.partition("/")
        made.setdefault(pattern, {})[system] = [(point[0], point[1]) for point in points]
    return made


def scale_tables(found: Scale) -> str:
    """The three tables of the simulation."""
    out = [
        "A stream in blocks (source and one map):",
        "",
        "| cores | items | us per item | items/s | of the cores' | scheduler busy | its ceiling, items/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found.streams:
        cells = (
            f"{row.cores:,}",
            f"{row.items:,}",
            number(row.service_us),
            f"{row.rate:,.0f}",
            f"{row.rate / row.ideal:.0%}",
            f"{row.own_share:.0%}",
            f"{row.own_rate:,.0f}",
        )
        out.append(f"| {' | '.join(cells)} |")
    out += [
        "",
        "Independent plain stages, one signal each:",
        "",
        "| cores | stages | ms per stage | stages/s | of the cores' | its ceiling, stages/s |",
        "|---|---|---|---|---|---|",
    ]
    for task in found.tasks:
        share = f"{task.rate / task.ideal:.0%}"
        out.append(
            f"| {task.cores:,} | {task.stages:,} | {number(task.service_us / 1000)} | {task.rate:,.0f} | {share} |"
            f" {task.own_rate:,.0f} |"
        )
    out += [
        "",
        f"Schedule length over max(critical path, work / cores); workflows from {found.source}:",
        "",
        "| workflow | tasks | cores | schedule over the bound |",
        "|---|---|---|---|",
    ]
    out += [f"| {shape.name} | {shape.tasks:,} | {shape.cores} | {shape.over_bound:.2f} |" for shape in found.shapes]
    return "\n".join(out)


def put(text: str, section: str, content: str) -> str:
    """`text` with what stands between the markers of `section` replaced. ValueError when the markers are missing."""
    pattern = re.compile(rf"(<!-- begin {section}[^>]*-->\n).*?(<!-- end {section} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"there are no markers for {section!r}")
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def write_readme(path: Path, sections: Mapping[str, str]) -> None:
    """Replace each section between its markers."""
    text = path.read_text()
    for section, content in sections.items():
        text = put(text, section, content)
    path.write_text(text)
