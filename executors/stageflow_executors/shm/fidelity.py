"""Is a value the same behind the codec? `STAGEFLOW_CHECK_FIDELITY=1` asks it of every value, at once, on both sides.

May import `stageflow.core` and this package only.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any, Final

from stageflow.core.errors import StageflowError
from stageflow_executors.shm import codec

#: slow: for those who look for a value that changes on its way
CHECK: Final = os.environ.get("STAGEFLOW_CHECK_FIDELITY") == "1"


def same(first: Any, second: Any) -> bool:
    """Is `second` a faithful copy of `first`, types included, as far as can be told?"""
    if type(first) is not type(second):
        return False
    if type(first) is getattr(sys.modules.get("numpy"), "ndarray", None) and not first.dtype.hasobject:
        alike: bool = (first.dtype, first.shape) == (second.dtype, second.shape)
        return alike and first.tobytes() == second.tobytes()
    if type(first) is memoryview:
        return (first.format, first.shape, first.tobytes()) == (second.format, second.shape, second.tobytes())
    try:
        if type(first).__module__ == "pyarrow.lib" and hasattr(first, "to_pylist"):
            kinds = [getattr(value, "schema", getattr(value, "type", None)) for value in (first, second)]
            first, second = first.to_pylist(), second.to_pylist()
            return kinds[0] == kinds[1] and pickle.dumps(first, 5) == pickle.dumps(second, 5)
        a, b = pickle.dumps(first, 5), pickle.dumps(second, 5)
    except Exception:
        return True
    if a == b:
        return True
    try:
        equal = first == second
        return bool(equal if isinstance(equal, bool) else equal.all())
    except Exception:
        return True


def check(value: Any, encoded: codec.Encoded, reader: codec.Reader) -> None:
    """Decode what has just been encoded. Raises StageflowError if it is not what it was."""
    again = codec.decode(encoded, reader)
    if not same(value, again):
        raise StageflowError(
            f"a {type(value).__name__} changed on its way through the codec: {value!r:.200} -> {again!r:.200}"
        )
