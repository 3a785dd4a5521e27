"""Efficiency curves as a picture, written by hand: no plotting library is worth a dependency here.

May not import: stageflow, any peer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

COLOURS: Final = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed")
_WIDTH, _HEIGHT, _GAP, _TOP = 250, 170, 46, 54


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    title: str,
    x: str = "task length",
    y: str = "efficiency",
    columns: int = 3,
) -> str:
    """Small multiples: panel -> line -> (seconds, share in 0..1). The x axis is logarithmic, 10 us to 100 ms."""
    lines = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(lines)}
    rows = -(-len(panels) // columns)
    wide = columns * (_WIDTH + _GAP) + _GAP
    high = rows * (_HEIGHT + _GAP) + _TOP + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}">',
        "<style>text{font-family:system-ui,sans-serif;font-size:11px}</style>",
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>',
        f'<text x="{_GAP}" y="20" font-weight="600">{escape(title)}</text>',
    ]
    for i, name in enumerate(lines):
        at = _GAP + i * 150
        out.append(f'<line x1="{at}" y1="34" x2="{at + 18}" y2="34" stroke="{colour[name]}" stroke-width="2"/>')
        out.append(f'<text x="{at + 24}" y="38">{escape(name)}</text>')
    for number, (panel, found) in enumerate(panels.items()):
        left = _GAP + (number % columns) * (_WIDTH + _GAP)
        top = _TOP + 14 + (number // columns) * (_HEIGHT + _GAP)
        out += _panel(panel, found, left, top, colour, x, y)
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _panel(
    name: str,
    found: Mapping[str, Sequence[tuple[float, float]]],
    left: float,
    top: float,
    colour: Mapping[str, str],
    x: str,
    y: str,
) -> list[str]:
    bottom = top + _HEIGHT

    def across(seconds: float) -> float:
        return left + (math.log10(min(max(seconds, 1e-5), 0.1)) + 5) / 4 * _WIDTH

    def up(share: float) -> float:
        return bottom - min(max(share, 0.0), 1.1) / 1.1 * _HEIGHT

    out = [f'<text x="{left}" y="{top - 5}" font-weight="600">{escape(name)}</text>']
    for mark in (0.0, 0.5, 1.0):
        dash = ' stroke-dasharray="4 3"' if mark == 0.5 else ""
        out.append(
            f'<line x1="{left}" y1="{up(mark):.1f}" x2="{left + _WIDTH}" y2="{up(mark):.1f}" stroke="#d1d5db"{dash}/>'
        )
        out.append(f'<text x="{left - 5}" y="{up(mark) + 4:.1f}" text-anchor="end" fill="#6b7280">{mark:.0%}</text>')
    for seconds, label in ((1e-5, "10 us"), (1e-4, "100 us"), (1e-3, "1 ms"), (1e-2, "10 ms"), (0.1, "100 ms")):
        at = across(seconds)
        out.append(f'<line x1="{at:.1f}" y1="{bottom}" x2="{at:.1f}" y2="{bottom + 4}" stroke="#9ca3af"/>')
        out.append(f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle" fill="#6b7280">{label}</text>')
    for line, points in found.items():
        path = " ".join(f"{across(seconds):.1f},{up(share):.1f}" for seconds, share in sorted(points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour[line]}" stroke-width="2"/>')
    out.append(f"<title>{escape(f'{name}: {y} over {x}')}</title>")
    return out
