"""What a block of items is made of, and what it says when it comes back: plain records that cross between processes.

May import core only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from stageflow.core.output import ErrorInfo


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A run of items of one block: indices [lo, hi) of which `mask` says who is there (bit 0 = lo; -1 = all).

    `columns` has one entry per element-wise parameter, the first is the map's `over`: (argument number, first
    position) when the
    surviving items lie next to each other in that argument's list, else (argument number, positions).
    """

    lo: int
    hi: int
    mask: int
    columns: tuple[tuple[int, int | tuple[int, ...]], ...]
    paths: tuple[tuple[int, ...], ...] | None = None
    skip: int = 0  #: (flat-map, of a single item) values that an earlier attempt has told of

    def count(self) -> int:
        """How many items are there."""
        return self.hi - self.lo if self.mask < 0 else self.mask.bit_count()

    def indices(self) -> Sequence[int]:
        """Their indices, ascending."""
        if self.mask < 0:
            return range(self.lo, self.hi)
        return bits(self.mask, self.lo)

    def column(self, number: int, args: Sequence[Any]) -> Sequence[Any]:
        """The values of one element-wise parameter."""
        arg, start = self.columns[number]
        values: Sequence[Any] = args[arg]
        if isinstance(start, int):
            count = self.count()
            return values if start == 0 and len(values) == count else values[start : start + count]
        return [values[position] for position in start]

    def path(self, number: int, index: int) -> tuple[int, ...]:
        """The index path of the item at place `number` with index `index`."""
        return (index,) if self.paths is None else self.paths[number]


def batch_of(pieces: Sequence[Piece], args: Sequence[Any]) -> tuple[list[list[Any]], list[int], list[tuple[int, ...]]]:
    """All items of several pieces: their values, one list per column, their indices and their paths."""
    columns: list[list[Any]] = [[] for _ in range(max((len(piece.columns) for piece in pieces), default=1))]
    indices: list[int] = []
    paths: list[tuple[int, ...]] = []
    for piece in pieces:
        for number, column in enumerate(columns):
            column.extend(piece.column(number, args))
        for place, index in enumerate(piece.indices()):
            indices.append(index)
            paths.append(piece.path(place, index))
    return columns, indices, paths


def bits(mask: int, lo: int = 0) -> list[int]:
    """Positions of the set bits, ascending, plus `lo`."""
    found = []
    while mask:
        low = mask & -mask
        found.append(lo + low.bit_length() - 1)
        mask ^= low
    return found


def weight(value: Any) -> int:
    """Bytes of one value as far as they can be told at once: buffers and strings, else 0."""
    kind = type(value)
    if kind is int or kind is float or kind is dict or kind is list:
        return 0
    if kind is bytes or kind is str or kind is bytearray:
        return len(value)
    try:
        nbytes = getattr(value, "nbytes", 0)
    except Exception:  # a `__getattr__` that raises what it likes
        return 0
    return nbytes if type(nbytes) is int else 0


def mask_to_wire(mask: int) -> int | bytes:
    """A mask as it crosses: whole numbers above 63 bits do not fit a frame."""
    return mask if mask < 1 << 63 else mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def mask_from_wire(mask: int | bytes) -> int:
    """The mask again."""
    return mask if isinstance(mask, int) else int.from_bytes(mask, "little")


class ItemFailure(msgspec.Struct, frozen=True, array_like=True):
    """One item that did not come through. `status` is FAIL, RETRY or CANCEL."""

    index: int
    status: str
    info: ErrorInfo
    path: tuple[int, ...]
    member: int = 0  #: which stage of a region


class Done(msgspec.Struct, frozen=True, array_like=True):
    """What one part of a block says: which indices were finished, who of them survived, who failed, who was not run.

    `ranges` are (lo, hi, mask): all indices in [lo, hi) that were asked for are finished; `mask` has the survivors
    (-1 = every index).
    `counts` (flat-map) has the number of items each input item gave, in order. `inner` (region) has (ok, dropped,
    failed, seconds, CPU seconds) of each of its stages. `flows` (flat-map) has (index, values told of before) of items
    whose values leave in several parts; a part without ranges is of such an item, which has not ended yet. Its
    generator stands still behind a part that `asks`, until it is let go on.
    `handed` (region) has (lo, hi, mask, member): items that this stage of the region has not done for good. What it is
    given for them lies behind the results, in this order; they are in none of the `ranges`.
    `outside` (brief items of threads) has the seconds in which no thread of the process ran; -1: nobody looked.
    """

    ranges: tuple[tuple[int, int, Any], ...]
    failures: tuple[ItemFailure, ...] = ()
    unrun: tuple[tuple[int, int], ...] = ()
    counts: tuple[int, ...] | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    inner: tuple[tuple[int, int, int, float, float], ...] | None = None
    flows: tuple[tuple[int, int], ...] = ()
    asks: bool = False
    outside: float = -1.0
    handed: tuple[tuple[int, int, Any, int], ...] = ()


def given_back(done: Done) -> int:
    """How many of a part's values are what stages of a region were given."""
    return sum(hi - lo if mask == -1 else mask_from_wire(mask).bit_count() for lo, hi, mask, _ in done.handed)


def mask_of(indices: Any, lo: int, hi: int) -> int:
    """The mask of [lo, hi) of which these indices are there."""
    mask = 0
    for index in indices:
        mask |= 1 << (index - lo)
    return -1 if mask == (1 << (hi - lo)) - 1 else mask


def ranges_without(lo: int, hi: int, points: Any) -> list[tuple[int, int]]:
    """[lo, hi) cut at the points, which are left out."""
    inside = sorted(point for point in points if lo <= point < hi)
    if not inside:
        return [(lo, hi)]
    found: list[tuple[int, int]] = []
    for point in inside:
        if lo < point:
            found.append((lo, point))
        lo = point + 1
    if lo < hi:
        found.append((lo, hi))
    return found
