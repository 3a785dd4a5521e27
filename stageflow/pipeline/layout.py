"""Where the boxes of a drawing go: layers by longest path, order by barycentres, places by least squares.

Works in two directions without knowing which is up: `along` grows with depth, `across` within a layer. Deterministic;
no recursion. Edges that pass layers get a waypoint in each of them, so that they go round boxes and not through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import msgspec

_SWEEPS: Final = 12
_PLACING: Final = 24
#: how much more a straight line of waypoints counts than a centred box
_STRAIGHT: Final = 6.0


class Box(msgspec.Struct):
    """A stage, or (`stage` < 0) the waypoint of an edge. Extents and centre in pixels."""

    stage: int
    layer: int
    along: float
    across: float
    centre: float = 0.0
    before: list[int] = []
    after: list[int] = []


class Layout(msgspec.Struct, frozen=True):
    """Boxes (the stages first), the start and size of every layer, and for every edge its boxes in order."""

    boxes: list[Box]
    layer_start: list[float]
    layer_size: list[float]
    routes: dict[tuple[int, int], list[int]]
    length: float
    breadth: float


def lay_out(
    deps: Sequence[Sequence[int]],
    depth: Sequence[int],
    along: Sequence[float],
    across: Sequence[float],
    *,
    layer_gap: float,
    box_gap: float,
    line_gap: float,
) -> Layout:
    """Place every stage. `along` and `across` are the sizes of its box in the two directions."""
    boxes = [Box(i, depth[i], along[i], across[i], before=[], after=[]) for i in range(len(deps))]
    routes: dict[tuple[int, int], list[int]] = {}
    for j, upstream in enumerate(deps):
        for i in upstream:
            routes[i, j] = _route(boxes, i, j)
    layers: list[list[int]] = [[] for _ in range(max(depth, default=-1) + 1)]
    for number, box in enumerate(boxes):
        layers[box.layer].append(number)
    layers = _ordered(boxes, layers)
    gaps = [[_gap(boxes[a], boxes[b], box_gap, line_gap) for a, b in _pairs(layer)] for layer in layers]
    _place(boxes, layers, gaps)
    low = min((box.centre - box.across / 2 for box in boxes), default=0.0)
    high = max((box.centre + box.across / 2 for box in boxes), default=0.0)
    for box in boxes:
        box.centre -= low
    sizes = [max(boxes[number].along for number in layer) for layer in layers]
    starts, at = [], 0.0
    for position, size in enumerate(sizes):
        starts.append(at)
        at += size + layer_gap + _congestion(boxes, layers, position)
    return Layout(boxes, starts, sizes, routes, starts[-1] + sizes[-1] if sizes else 0.0, high - low)


def _route(boxes: list[Box], i: int, j: int) -> list[int]:
    """Link two boxes, through a new waypoint in every layer between them."""
    path = [i]
    for layer in range(boxes[i].layer + 1, boxes[j].layer):
        boxes.append(Box(-1, layer, 0.0, 0.0, before=[], after=[]))
        path.append(len(boxes) - 1)
    path.append(j)
    for a, b in _pairs(path):
        boxes[a].after.append(b)
        boxes[b].before.append(a)
    return path


def _pairs(items: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(items))


def _gap(a: Box, b: Box, box_gap: float, line_gap: float) -> float:
    """Least distance between two neighbours' centres."""
    between = box_gap if a.stage >= 0 and b.stage >= 0 else line_gap
    return (a.across + b.across) / 2 + between


def _congestion(boxes: list[Box], layers: list[list[int]], position: int) -> float:
    """More room where many edges run steeply between two layers."""
    steep = sum(abs(boxes[a].centre - boxes[b].centre) > 60 for a in layers[position] for b in boxes[a].after)
    return min(60.0, 3.0 * steep)


def _ordered(boxes: list[Box], layers: list[list[int]]) -> list[list[int]]:
    """Sort each layer by the mean place of its neighbours, forth and back, and keep the best order seen."""
    best, fewest = [list(layer) for layer in layers], _crossings(boxes, layers)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        down = sweep % 2 == 0
        place = {number: float(k) for layer in layers for k, number in enumerate(layer)}
        for layer in layers if down else reversed(layers):
            wish = {}
            for number in layer:
                near = boxes[number].before if down else boxes[number].after
                wish[number] = sum(place[one] for one in near) / len(near) if near else place[number]
            layer.sort(key=wish.__getitem__)
            for k, number in enumerate(layer):
                place[number] = float(k)
        count = _crossings(boxes, layers)
        if count < fewest:
            best, fewest = [list(layer) for layer in layers], count
    return best


def _crossings(boxes: list[Box], layers: list[list[int]]) -> int:
    """How many pairs of edges cross, counted with a Fenwick tree: edges x log(layer), not edges squared."""
    total = 0
    for upper, lower in pairwise(layers):
        place = {number: k for k, number in enumerate(lower)}
        ends = [end for number in upper for end in sorted(place[b] for b in boxes[number].after)]
        tree = [0] * (len(lower) + 1)
        for seen, end in enumerate(ends):
            at, not_above = end + 1, 0
            while at:
                not_above += tree[at]
                at &= at - 1
            total += seen - not_above
            at = end + 1
            while at <= len(lower):
                tree[at] += 1
                at += at & -at
    return total


def _place(boxes: list[Box], layers: list[list[int]], gaps: list[list[float]]) -> None:
    """Pull every box towards its neighbours, keeping the order and the gaps of its layer."""
    for layer, gap in zip(layers, gaps, strict=True):
        at = 0.0
        for k, number in enumerate(layer):
            at += gap[k - 1] if k else 0.0
            boxes[number].centre = at
        for number in layer:
            boxes[number].centre -= at / 2
    order = range(len(layers))
    for sweep in range(_PLACING):
        for position in order if sweep % 2 == 0 else reversed(order):
            wishes, weights = [], []
            for number in layers[position]:
                wish, weight = _wish(boxes, number, sweep)
                wishes.append(wish)
                weights.append(weight)
            for number, centre in zip(layers[position], _spread(wishes, weights, gaps[position]), strict=True):
                boxes[number].centre = centre


def _wish(boxes: list[Box], number: int, sweep: int) -> tuple[float, float]:
    """Where a box would like its centre, and how much. One side at a time: else chains become staircases."""
    box = boxes[number]
    near = (box.before or box.after) if sweep % 2 == 0 else (box.after or box.before)
    if not near:
        return box.centre, 0.1
    line = box.stage < 0
    total = weight = 0.0
    for other in near:
        pull = _STRAIGHT if line and boxes[other].stage < 0 else 1.0
        total += pull * boxes[other].centre
        weight += pull
    return total / weight, _STRAIGHT if line else 1.0


def _spread(wishes: list[float], weights: list[float], gaps: list[float]) -> list[float]:
    """The places nearest to the wishes (least squares) with at least these gaps: pooling of neighbours that collide."""
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, float, int]] = []  # (mean, weight, how many)
    for wish, weight, offset in zip(wishes, weights, offsets, strict=True):
        mean, total, count = wish - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, heavy, many = pools.pop()
            mean = (mean * total + other * heavy) / (total + heavy)
            total += heavy
            count += many
        pools.append((mean, total, count))
    placed: list[float] = []
    for mean, _, count in pools:
        first = len(placed)
        placed.extend([mean + offset for offset in offsets[first : first + count]])
    return placed
