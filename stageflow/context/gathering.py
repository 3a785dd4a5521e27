"""Values that cross in pieces: each piece is an argument of its own, in whatever form it already has, and the whole is
put together where the stage runs.

May import nothing of the engine but core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class InPieces:
    """Stands for a value among the arguments of a call: `make(table, pieces)` gives it, `count` pieces follow the other
    arguments. `make` crosses by reference, `table` by value."""

    __slots__ = ("count", "make", "table")

    def __init__(self, make: Callable[[Any, Sequence[Any]], Any], table: Any, count: int) -> None:
        self.make = make
        self.table = table
        self.count = count

    def __reduce__(self) -> tuple[Any, ...]:
        return InPieces, (self.make, self.table, self.count)


class Gathered:
    """A stage's program, called with the first `width` arguments once those in pieces have been put together."""

    __slots__ = ("program", "width")

    def __init__(self, program: Callable[..., Any], width: int) -> None:
        self.program = program
        self.width = width

    def __call__(self, port: Any, *args: Any) -> Any:
        """Run in a worker; whatever the program gives."""
        whole, at = [], self.width
        for value in args[: self.width]:
            if type(value) is InPieces:
                whole.append(value.make(value.table, args[at : at + value.count]))
                at += value.count
            else:
                whole.append(value)
        del args  # the pieces are the sequence's now, to let go of one by one
        return self.program(port, *whole)
