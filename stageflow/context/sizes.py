"""What values weigh, as far as that can be told without encoding them.

May import the standard library only: workers load it.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

LOOKS: Final = 4096  # at parts of a value, at most, to tell what it weighs
LOOKS_A_LEVEL: Final = 32  # spent by each level of nesting: a value may contain itself


def sized(value: Any) -> int:
    """Bytes of a value as far as they can be told cheaply: nbytes or length of buffers and strings, else a guess.
    Raises nothing, whatever the value does when it is looked at."""
    try:
        return _sized(value, LOOKS)
    except Exception:
        return 64


def _sized(value: Any, looks: int) -> int:
    """Its parts share the `looks` that may be taken; behind the last they count as references."""
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(value, bytes | bytearray | str):
        return len(value)
    if isinstance(value, list | tuple | set | frozenset):
        if not value:
            return 56
        sample = list(value[:: len(value) // 8 + 1] if isinstance(value, list | tuple) else islice(value, 8))
        each = (looks - LOOKS_A_LEVEL) // len(sample)
        if each <= 0:
            return 56 + 8 * len(value)
        return 56 + len(value) * (8 + sum(_sized(one, each) for one in sample) // len(sample))
    if isinstance(value, dict):
        sample = list(islice(value.items(), 0, 4096, min(512, len(value) // 8 + 1)))  # the first are seldom typical
        each = (looks - LOOKS_A_LEVEL) // (2 * len(sample)) if sample else 0
        if each <= 0:
            return 64 + 16 * len(value)
        return 64 + len(value) * sum(_sized(k, each) + _sized(v, each) + 16 for k, v in sample) // len(sample)
    kind = type(value)
    if kind in _PLAIN:
        return 32
    fields = getattr(kind, "__struct_fields__", None)
    if fields is not None:
        each = (looks - LOOKS_A_LEVEL) // max(1, min(16, len(fields)))
        if each <= 0:
            return 48 + 8 * len(fields)
        return 48 + sum(_sized(getattr(value, name, None), each) for name in fields[:16])
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and not isinstance(value, type):
        return 64 + sum(_flat(one) for one in islice(held.values(), 16))
    return 64


def _flat(value: Any) -> int:
    """`sized` one level deep: objects may refer to each other in circles."""
    if isinstance(value, list | tuple | set | frozenset | dict):
        return 56 + 32 * len(value)
    return _sized(value, 0) if not hasattr(value, "__dict__") else 64


_PLAIN: Final = frozenset((int, float, bool, complex, type(None)))
