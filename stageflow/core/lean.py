"""Imports msgspec without `typing_extensions`, which takes a quarter off it.

msgspec takes three names from there if it is installed, and from `typing` if it is not. From Python 3.11 on both give
the same (`tests/core/test_lean.py` compares them), and `typing_extensions` costs every start of an engine and of a fork
server some milliseconds. It can be imported as ever by everybody else, also meanwhile by other threads.

May import the standard library and msgspec only.
"""

from __future__ import annotations

import sys
from _thread import get_ident
from importlib import import_module

_LEFT_OUT = "typing_extensions"


class _Without:
    """A finder that says, in one thread, that a module is not installed."""

    def __init__(self) -> None:
        self.thread = get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """None: others may find it. Raises ModuleNotFoundError."""
        if name == _LEFT_OUT and get_ident() == self.thread:
            raise ModuleNotFoundError(f"{name} is left out here", name=name)


def _import() -> None:
    if "msgspec" in sys.modules or _LEFT_OUT in sys.modules:
        return
    without = _Without()
    sys.meta_path.insert(0, without)
    try:
        import_module("msgspec")
    finally:
        sys.meta_path.remove(without)


_import()
