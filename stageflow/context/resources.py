"""Worker-scoped resources: one instance per process and name, made on first use, closed when the process ends in
order."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from stageflow.core.errors import DefinitionError

_lock = threading.RLock()
_made: dict[tuple[int, str], tuple[Any, Callable[[], Any] | None]] = {}
_registered = False


def obtain(scope: int, factories: Mapping[str, Callable[[], Any]], name: str) -> Any:
    """The resource `name` of the engine `scope` in this process. Thread-safe; a factory runs once.

    A factory may return a context manager: it is entered, and left at the end. Anything else with a `close` method is
    closed.

    Raises:
        DefinitionError: no factory has this name.
    """
    global _registered
    key = (scope, name)
    with _lock:
        found = _made.get(key)
        if found is not None:
            return found[0]
        if name not in factories:
            known = ", ".join(sorted(factories)) or "none"
            raise DefinitionError(
                f"no resource {name!r} is configured (known: {known})",
                hint=f"give the engine `resources={{{name!r}: factory}}`",
            )
        made = factories[name]()
        close: Callable[[], Any] | None
        if hasattr(made, "__enter__") and hasattr(made, "__exit__"):
            value = made.__enter__()
            manager = made

            def close() -> None:
                manager.__exit__(None, None, None)
        else:
            value = made
            close = getattr(made, "close", None)
        _made[key] = (value, close)
        if not _registered:
            _registered = True
            atexit.register(close_all)
        return value


def close_all(scope: int | None = None) -> None:
    """Close what this process made (for one engine, or all), last made first. Errors of one do not keep the others
    open."""
    with _lock:
        keys = [key for key in reversed(_made) if scope is None or key[0] == scope]
        closers = [_made.pop(key)[1] for key in keys]
    for close in closers:
        if close is not None:
            with contextlib.suppress(Exception):
                close()
