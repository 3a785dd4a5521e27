"""Index paths: an item of a flat-map is known by its parent's path and its number there, and so are its descendants.

The scheduler knows items by a dense index per stream; only the driver sees both ends of a block, so paths are kept
beside the lists of values, and only in pipelines that have a flat-map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from stageflow.context.pieces import bits
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import Role

Path = tuple[int, ...]


def nested_stages(graph: StageGraph, elements: Mapping[int, tuple[int, ...]]) -> frozenset[int]:
    """The stages whose items have paths of more than one number: those that read a flat-map, or descend from one."""
    found: set[int] = set()
    for i in graph.order:
        over = elements.get(i, ())
        if over and (over[0] in found or _is_flat(graph, over[0])):
            found.add(i)
    return frozenset(found)


def _is_flat(graph: StageGraph, i: int) -> bool:
    spec = graph.specs[i]
    return spec.role == Role.MAP and spec.is_generator


def of_segment(segment: Any, handles: Mapping[int, Any]) -> Iterator[tuple[int, Path]]:
    """(index, path) of each item of a segment as an action carries it."""
    lo, hi, mask, columns = segment
    indices = range(lo, hi) if mask < 0 else bits(mask, lo)
    handle, at = columns[0]
    held = handles.get(handle)
    paths = held.paths if held is not None else None
    if paths is None:
        return ((index, (index,)) for index in indices)
    if isinstance(at, int):
        return zip(indices, paths[at : at + len(indices)], strict=True)
    return ((index, paths[place]) for index, place in zip(indices, at, strict=True))


def of_block(segments: Any, handles: Mapping[int, Any]) -> dict[int, Path]:
    """The paths of all items of a block, by index."""
    return {index: path for segment in segments for index, path in of_segment(segment, handles)}


def of_results(known: dict[int, Path], done: Any) -> list[Path]:
    """The paths of the values that a part of a block has brought, in their order."""
    told = dict(done.flows)
    if told and not done.ranges:
        ((index, first),) = done.flows
        return [(*known[index], k) for k in range(first, first + done.counts[0])]
    failed = {failure.index for failure in done.failures}
    if done.counts is None:
        return [
            known[index]
            for lo, hi, mask in (*done.ranges, *((lo, hi, mask) for lo, hi, mask, _ in done.handed))
            for index in (bits(mask, lo) if mask >= 0 else range(lo, hi))
            if index in known
        ]
    asked = sorted(
        index for index in known if index not in failed and any(lo <= index < hi for lo, hi, _ in done.ranges)
    )
    return [
        (*known[index], told.get(index, 0) + k)
        for index, count in zip(asked, done.counts, strict=False)
        for k in range(count)
    ]


def located(failure: Any, path: Path) -> Any:
    """The same failure of an item, named by its path."""
    return msgspec.structs.replace(failure, path=path, info=msgspec.structs.replace(failure.info, item=path))
