"""The engine of this process for runs that name none."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading

from stageflow.core.errors import DefinitionError
from stageflow.runtime.engine import Engine

_default: Engine | None = None
_default_lock = threading.Lock()


def default_engine() -> Engine:
    """The engine of this process for runs that name none; made on first use, closed at exit."""
    global _default
    with _default_lock:
        if _default is None or _default.closed or _default._pid != os.getpid():
            _default = Engine()
        return _default


def close_default_engine() -> None:
    """Close the default engine; the next run makes a new one."""
    global _default
    with _default_lock:
        engine, _default = _default, None
    if engine is not None:
        with contextlib.suppress(DefinitionError):
            engine.close()


def _forget_default() -> None:
    global _default, _default_lock
    _default = None
    _default_lock = threading.Lock()


atexit.register(close_default_engine)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_default)
