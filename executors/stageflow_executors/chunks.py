"""The worker's side of `futures.ProcessPoolExecutor`: many short calls of one function in one hand-off.

Loaded in workers: no asyncio, no concurrent.futures.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Generator
from typing import Any, Final

from stageflow.core.executor import Reply
from stageflow.core.failure import capture
from stageflow.core.output import ErrorInfo

REPORT_NS: Final = 1_000_000  #: finished results wait no longer than this for their fellows
LARGE: Final = 32 * 1024
SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes))

_WORDS: Final = frozenset((type(None), bool, int, float))

#: an item: a tuple of exact scalars, or the pickle of (args, kwargs), so that no two items share an object
Item = tuple[Any, ...] | bytes


class Chunk:
    """Runs a list of items; yields (index of the first, results) whenever a millisecond of results has gathered.

    A result is (value,) for exact scalars, its pickle for other small values, None for one that travels by itself
    (the Reply's value), or an ErrorInfo. Progress on the status page names the item that runs, for blame.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, port: Any, items: list[Item]) -> Generator[Reply, None, Reply]:
        """The generator of parts; the last one is its return value."""
        function = self.function
        progress, clock = port.progress, time.monotonic_ns
        results: list[Any] = []
        first = 0
        total = float(len(items))
        due = clock() + REPORT_NS
        for index, item in enumerate(items):
            progress(float(index), total)
            try:
                if type(item) is bytes:
                    args, kwargs = pickle.loads(item)
                    value = function(*args, **kwargs)
                else:
                    value = function(*item)
            except BaseException as error:
                results.append(capture(error, lane="process", worker_pid=port.worker_pid, skip_frames=1))
                error.__traceback__ = None
                continue
            if type(value) in SCALARS and (type(value) not in (str, bytes) or len(value) < LARGE):
                results.append((value,))
            else:
                small = _small_pickle(value)
                if small is None:
                    if results:
                        yield Reply(results, meta=first)
                        results = []
                    yield Reply(value, meta=-1 - index)
                    first = index + 1
                    value = None
                    continue
                results.append(small)
            value = None
            if clock() > due and index + 1 < len(items):
                yield Reply(results, meta=first)
                results, first = [], index + 1
                due = clock() + REPORT_NS
        return Reply(results, meta=first)


def _small_pickle(value: Any) -> bytes | None:
    """None if the value is large, has buffers, or does not pickle: then it goes through the codec by itself."""
    if getattr(value, "nbytes", 0) > 1024:
        return None
    try:
        buffers: list[Any] = []
        data = pickle.dumps(value, 5, buffer_callback=buffers.append)
    except Exception:
        return None
    return None if buffers or len(data) > LARGE else data


def read(result: Any) -> tuple[bool, Any]:
    """(succeeded, value or ErrorInfo) of one result."""
    kind = type(result)
    if kind is tuple:
        return True, result[0]
    if kind is bytes:
        return True, pickle.loads(result)
    assert isinstance(result, ErrorInfo)
    return False, result


def pack(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Item | None:
    """The item for a call; None if it must go through the codec by itself."""
    if not kwargs and (_WORDS.issuperset(map(type, args)) or _are_small(args)):
        return args
    return _small_pickle((args, kwargs))


def _are_small(args: tuple[Any, ...]) -> bool:
    return all(type(arg) in SCALARS and (type(arg) not in (str, bytes) or len(arg) < LARGE) for arg in args)
