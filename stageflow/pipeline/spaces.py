"""Which streams of elements run in step: index spaces, element-wise joins and barriers.

Two streams share a space when an index path means the same element in both: a 1:1 map (DROP allowed) stays in the space
of its `over`; a source, a generator map and a subdivided value start a new one. Two maps over one value or one input
share theirs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from stageflow.pipeline.policies import asks_for_worker
from stageflow.pipeline.spec import Role, StageSpec

Joined = dict[int, tuple[int, ...]]


def lay_spaces(
    specs: Sequence[StageSpec], deps: Sequence[tuple[int, ...]], order: Sequence[int]
) -> tuple[array[int], Joined, Joined, bytes]:
    """(space of each stage's elements or -1, joins, barriers, 1 for each stream) of an acyclic graph."""
    space = array("i", [-1]) * len(specs)
    streams = bytearray(len(specs))
    joins: Joined = {}
    barriers: Joined = {}
    spaces: dict[tuple[str, int | str], int] = {}
    for i in order:
        spec = specs[i]
        role = spec.role
        within = -1
        if role >= Role.MAP:
            within = _entered(spec, space, spaces)
        if role is Role.SOURCE or role is Role.MAP:
            streams[i] = 1
            starts = role is Role.SOURCE or spec.is_generator
            space[i] = spaces.setdefault(("out", i), len(spaces)) if starts else within
        if deps[i] and any(streams[j] for j in deps[i]):
            beside, whole = _read_streams(spec, i, deps[i], space, streams, within)
            if beside:
                joins[i] = beside
            if whole:
                barriers[i] = whole
    return space, joins, barriers, bytes(streams)


def _entered(spec: StageSpec, space: array[int], spaces: dict[tuple[str, int | str], int]) -> int:
    """The space of the elements that a map, reduce or sink takes."""
    if spec.over_input is not None:
        return spaces.setdefault(("input", spec.over_input), len(spaces))
    if spec.over < 0:
        return -1
    if space[spec.over] >= 0:
        return space[spec.over]
    return spaces.setdefault(("value", spec.over), len(spaces))


def _read_streams(
    spec: StageSpec, i: int, deps: tuple[int, ...], space: array[int], streams: bytearray, within: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bound = {b.ref for b in spec.bindings if b.source == "stage"}
    # an object, or a function with a context, may read all that it declares
    reads_all = spec.form in ("object", "class") or spec.wants_ctx
    beside: list[int] = []
    whole: list[int] = []
    for j in deps:
        if not streams[j] or j == spec.over:
            continue
        if j in bound and spec.role in (Role.MAP, Role.SINK) and within >= 0 and space[j] == within:
            beside.append(j)
        elif j in bound or reads_all:
            whole.append(j)
    return tuple(beside), tuple(whole)


def flows_early(spec: StageSpec) -> bool:
    """Whether values of a flat-map's item may leave before its generator has ended: nobody waits for all at once."""
    policies = spec.policies
    around = policies.idempotency is not None or not all(asks_for_worker(one) for one in policies.interceptors)
    return spec.is_generator and not around
