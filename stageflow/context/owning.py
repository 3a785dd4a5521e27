"""What a stage may change of its inputs. They are borrowed: arrays are handed over read-only in every lane, and what
cannot be handed over so must be left alone. `writable=` and `isolate=` give a stage copies of its own.

May import core only.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

#: arguments beyond which a mask of them does not fit a message: then all are meant
_MOST: Final = 48


def _array_class() -> Any:
    """`numpy.ndarray` where numpy is loaded: else there are no arrays."""
    return getattr(sys.modules.get("numpy"), "ndarray", None)


def read_only(value: Any) -> Any:
    """An array as a view that cannot be written through; everything else as it is."""
    array = _array_class()
    if array is None or not isinstance(value, array) or not value.flags.writeable:
        return value
    view = value.view()
    view.flags.writeable = False
    return view


def read_only_items(values: list[Any]) -> list[Any]:
    """The same of each item; the list itself where there is no array in it."""
    array = _array_class()
    if array is None or not any(issubclass(kind, array) for kind in set(map(type, values))):
        return values
    return [read_only(value) for value in values]


def private(value: Any, *, crossed: bool = False) -> Any:
    """A copy of the buffers in `value`: of an array, a bytearray, and those in lists, tuples and dicts. Objects of
    other classes are left as they are. What has `crossed` to this process is a copy already: only arrays that are
    read-only all the same are copied."""
    kind = type(value)
    if kind is list:
        return [private(one, crossed=crossed) for one in value]
    if kind is tuple:
        return tuple([private(one, crossed=crossed) for one in value])
    if kind is dict:
        return {key: private(one, crossed=crossed) for key, one in value.items()}
    if kind is bytearray:
        return value if crossed else bytearray(value)
    array = _array_class()
    if array is None or not isinstance(value, array) or (crossed and value.flags.writeable):
        return value
    return value.copy()


class Copyable:
    """A sequence that is decoded when it is looked at, and can be copied so."""

    __slots__ = ()

    def copied(self, copy_of: Callable[[Any], Any]) -> Any:
        """The same, giving `copy_of(item)` for each item."""
        raise NotImplementedError


class Owning(msgspec.Struct, frozen=True):
    """Which inputs of a stage are its own: those in `slots` and, if `elements`, the elements of the stream it goes
    over. `whole`: copies of everything in them; else of buffers only, since nothing else arrives read-only."""

    slots: tuple[int, ...]
    elements: bool
    whole: bool

    def mask(self, first: int, slots: int) -> int:
        """The arguments of a call that a process lane gives as private writable pages, as bits: `slots` values stand
        from argument `first` on, elements behind them."""
        if first + slots > _MOST:
            return -1
        found = -1 << (first + slots) if self.elements else 0
        for slot in self.slots:
            found |= 1 << (first + slot)
        return found

    def values(self, values: tuple[Any, ...], *, crossed: bool = False) -> tuple[Any, ...]:
        """The values of a call's slots, with copies of those that are the stage's own."""
        own = self.slots
        if not own:
            return values
        return tuple(self._copied(value, crossed) if slot in own else value for slot, value in enumerate(values))

    def element(self, element: Any, *, crossed: bool = False) -> Any:
        """An element, or a batch of them."""
        return self._copied(element, crossed) if self.elements else element

    def snapshot(self, snapshot: Any) -> Any:
        """What `ctx.snapshot` shows: a copy where everything is the stage's own."""
        return copy.deepcopy(snapshot) if self.whole else snapshot

    def _copied(self, value: Any, crossed: bool) -> Any:
        if value is msgspec.UNSET:
            return value
        copy_of = copy.deepcopy if self.whole and not crossed else partial(private, crossed=crossed)
        return value.copied(copy_of) if isinstance(value, Copyable) else copy_of(value)
