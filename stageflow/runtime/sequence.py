"""`ItemSequence`: the kept items of a map, in order, decoded when they are looked at."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from stageflow.context.gathering import InPieces
from stageflow.context.owning import Copyable


class Elsewhere:
    """A list that a worker finds by itself: it crosses as where it lies, and `load` gets it."""

    __slots__ = ()

    def load(self) -> list[Any]:
        """The list."""
        raise NotImplementedError


class Values:
    """One list of items as a lane left it: plain, or encoded by an executor (`load` decodes)."""

    __slots__ = ("_count", "_payload", "_values", "kept", "nbytes", "on_disk", "paths")

    def __init__(self, values: list[Any] | None, payload: Any = None, nbytes: int = 0, count: int = -1) -> None:
        self._values = values
        self._payload = payload
        self._count = count
        self.nbytes = nbytes
        self.paths: list[tuple[int, ...]] | None = None  # of the items, where their index does not say it
        self.on_disk = False
        self.kept = False  # until the run ends: then what was decoded is not held beside the encoded form

    def __len__(self) -> int:
        return len(self.load()) if self._count < 0 else self._count

    @property
    def payload(self) -> Any:
        """The encoded form, or None."""
        return self._payload

    def form(self, crosses: bool) -> Any:
        """What a call gets: the encoded form where it crosses a process boundary and there is one, else the items."""
        if not crosses or self._payload is None:
            return self.load()
        if self.on_disk:
            elsewhere = self._payload.elsewhere()
            return self.load() if elsewhere is None else elsewhere
        return self._payload

    def load(self) -> list[Any]:
        """The items; decoded once while anybody holds this list (each time where it is kept)."""
        values = self._values
        if values is None:
            values = self._payload.load()
            if isinstance(values, Elsewhere):
                values = values.load()
            if not self.kept:
                self._values = values
        return values

    def to_disk(self, stored: Any) -> None:
        """The same items lie in `stored` now; the bytes in memory are given up."""
        self._count = len(self)
        self.on_disk = True
        self._payload, self._values = stored, None
        self.nbytes = 0

    def keep(self) -> None:
        """From now on hold one form only."""
        self.kept = True
        if self._payload is not None:
            self._values = None


class ItemSequence(Sequence[Any], Copyable):
    """Ordered, re-iterable, lazily decoded. `len`, indexing, slicing and iteration hold one decoded list at a time."""

    __slots__ = ("_cached", "_cached_number", "_copy_of", "_parts", "_sorted", "_starts")

    def __init__(self) -> None:
        self._parts: list[tuple[int, int, int, Values]] = []  # (lo, count, place in the list, list)
        self._starts: array[int] = array("q")
        self._sorted = True
        self._cached_number = -1
        self._cached: list[Any] = []
        self._copy_of: Callable[[Any], Any] | None = None

    def add(self, lo: int, count: int, at: int, values: Values) -> None:
        """Items with indices from `lo` on: `count` of them from place `at` of a list."""
        if count:
            values.keep()
            self._parts.append((lo, count, at, values))
            self._sorted = False

    def _settle(self) -> None:
        if self._sorted and len(self._starts) == len(self._parts):
            return
        self._parts.sort(key=lambda part: part[0])
        starts: array[int] = array("q")
        total = 0
        for part in self._parts:
            starts.append(total)
            total += part[1]
        self._starts = starts
        self._sorted = True
        self._cached_number = -1

    def __len__(self) -> int:
        self._settle()
        return self._starts[-1] + self._parts[-1][1] if self._parts else 0

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        length = len(self)
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(length))]
        if index < 0:
            index += length
        if not 0 <= index < length:
            raise IndexError("item index out of range")
        number = bisect_right(self._starts, index) - 1
        _, _, at, values = self._parts[number]
        if self._cached_number != number:
            self._cached = values.load()
            self._cached_number = number
        found = self._cached[at + index - self._starts[number]]
        return found if self._copy_of is None else self._copy_of(found)

    def __iter__(self) -> Iterator[Any]:
        self._settle()
        for _, count, at, values in self._parts:
            loaded = values.load()
            part = loaded[at : at + count] if (at or len(loaded) != count) else loaded
            yield from part if self._copy_of is None else map(self._copy_of, part)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ItemSequence | list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # crosses a process boundary as the items themselves; the reader sees the same type
        return _from_list, (list(self),)

    def copied(self, copy_of: Callable[[Any], Any]) -> ItemSequence:
        """The same items, each as `copy_of(item)` whenever it is looked at."""
        self._settle()
        made = ItemSequence()
        made._parts, made._starts, made._copy_of = self._parts, self._starts, copy_of
        return made

    def in_pieces(self, crosses: bool) -> tuple[InPieces, list[Any]]:
        """The sequence as a call takes it, and the lists it is made of, each in the form it has: what is encoded
        crosses as it is."""
        self._settle()
        places: dict[int, int] = {}
        pieces: list[Any] = []
        table: array[int] = array("q")
        for lo, count, at, values in self._parts:
            place = places.get(id(values))
            if place is None:
                place = places[id(values)] = len(pieces)
                pieces.append(values.form(crosses))
            table.extend((lo, count, at, place))
        return InPieces(_from_pieces, table, len(pieces)), pieces

    def __repr__(self) -> str:
        return f"<ItemSequence of {len(self)} items>"


def _from_pieces(table: array[int], pieces: Sequence[Any]) -> ItemSequence:
    made = ItemSequence()
    # what the lane has not decoded yet is decoded when it is looked at
    lists = [Values(piece) if isinstance(piece, list) else Values(None, piece) for piece in pieces]
    for row in range(0, len(table), 4):
        lo, count, at, place = table[row : row + 4]
        made.add(lo, count, at, lists[place])
    return made


def _from_list(items: list[Any]) -> ItemSequence:
    made = ItemSequence()
    made.add(0, len(items), 0, Values(items))
    return made
