"""The worker's side of `futures.ProcessPoolExecutor`: many short calls of one function in one hand-off.

Loaded in workers: no asyncio, no concurrent.futures.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Generator
from typing import Any, Final

import msgspec

from stageflow.core.executor import Reply
from stageflow.core.failure import capture
from stageflow.core.output import ErrorInfo

REPORT_NS: Final = 1_000_000  #: finished results wait no longer than this for their fellows
LARGE: Final = 32 * 1024
SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes))

_WORDS: Final = frozenset((type(None), bool, int, float))

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

#: an item: a tuple of exact scalars, or the pickle of (args, kwargs), so that no two items share an object
Item = tuple[Any, ...] | bytes


def together(parts: list[Any]) -> list[Any] | bytes:
    """Items, or results that are no errors, as one message; as they are where only a pickle keeps them (a large number,
    half a surrogate pair).
    """
    try:
        return _encode(parts)
    except (TypeError, ValueError, OverflowError):
        return parts


def apart(parts: list[Any] | bytes) -> list[Any]:
    """What `together` was given; tuples have become lists."""
    if isinstance(parts, bytes):
        found: list[Any] = _decode(parts)
        return found
    return parts


class Chunk:
    """Runs a list of items; yields (index of the first, results) whenever a millisecond of results has gathered.

    A result is (value,) for exact scalars, its pickle for other small values, None for one that travels by itself
    (the Reply's value), or an ErrorInfo. Progress on the status page names the item that runs, for blame.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, port: Any, packed: list[Item] | bytes) -> Generator[Reply, None, Reply]:
        """The generator of parts; the last one is its return value."""
        items = apart(packed)
        function, clock = self.function, time.monotonic_ns
        results: list[Any] = []
        whole = True  # no result is an error
        first, last = 0, len(items) - 1
        port.progress(0.0, last + 1.0)
        at = port.progress_words()
        due = clock() + REPORT_NS
        for index, item in enumerate(items):
            at[0] = index
            try:
                if type(item) is bytes:
                    args, kwargs = pickle.loads(item)
                    value = function(*args, **kwargs)
                else:
                    value = function(*item)
            except BaseException as error:
                results.append(capture(error, lane="process", worker_pid=port.worker_pid, skip_frames=1))
                whole = False
                error.__traceback__ = None
                continue
            kind = type(value)
            if kind in _WORDS or (kind in SCALARS and len(value) < LARGE):
                results.append((value,))
            else:
                small = _small_pickle(value)
                if small is None:
                    if results:
                        yield Reply(together(results) if whole else results, meta=first)
                        results, whole = [], True
                    yield Reply(value, meta=-1 - index)
                    first = index + 1
                    value = None
                    continue
                results.append(small)
            value = None
            if clock() > due and index < last:
                yield Reply(together(results) if whole else results, meta=first)
                results, first, whole = [], index + 1, True
                due = clock() + REPORT_NS
        return Reply(together(results) if whole else results, meta=first)


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
    if kind is list or kind is tuple:
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
