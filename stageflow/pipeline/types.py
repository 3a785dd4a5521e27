"""The type check of an edge: can what the producer is annotated to return be what the consumer is annotated to take?

Only certain mismatches are reported. Whatever is unknown, partly unknown, or decided at run time is taken to fit.
"""

from __future__ import annotations

import collections.abc as abc
import types
import typing
from typing import Any, Final, Union, get_args, get_origin

from stageflow.core.kinds import Drop
from stageflow.core.output import StageOutput
from stageflow.pipeline.signatures import UNKNOWN

_AWAITABLES: Final = (abc.Awaitable, abc.Coroutine)
#: int is a float and a complex to every annotation reader (PEP 484), and buffers are interchangeable with bytes
_PROMOTED: Final = {
    int: (float, complex),
    float: (complex,),
    bytearray: (bytes,),
    memoryview: (bytes,),
    bytes: (memoryview,),
}


def element_of(annotation: Any) -> Any:
    """What one element of an iterable of this annotation is; UNKNOWN where it does not say."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is typing.Annotated:
        return element_of(arguments[0])
    if origin is Union or origin is types.UnionType:
        found = [element_of(one) for one in arguments if one is not type(None)]
        return found[0] if len(found) == 1 else UNKNOWN
    if not isinstance(origin, type) or not arguments:
        return UNKNOWN
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return arguments[0]
        return Union[arguments] if arguments != ((),) else UNKNOWN  # noqa: UP007 - built from a tuple
    if issubclass(origin, abc.Iterable | abc.AsyncIterable):
        return arguments[0]
    return UNKNOWN


def value_of(annotation: Any, *, is_generator: bool = False) -> Any:
    """What arrives of a return annotation: the awaited value; for a generator one of its elements."""
    if is_generator:
        return _unwrap(element_of(annotation))
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, _AWAITABLES):
        arguments = get_args(annotation)
        return _unwrap(arguments[-1]) if arguments else UNKNOWN
    return _unwrap(annotation)


def _unwrap(annotation: Any) -> Any:
    """A StageOutput may carry anything; DROP never arrives."""
    if annotation is StageOutput or annotation is None:
        return UNKNOWN
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _unwrap(get_args(annotation)[0])
    if origin is Union or origin is types.UnionType:
        arguments = get_args(annotation)
        if StageOutput in arguments:
            return UNKNOWN
        rest = tuple(one for one in arguments if one is not Drop)
        return Union[rest] if rest and len(rest) < len(arguments) else annotation  # noqa: UP007
    return annotation


def mismatch(given: Any, wanted: Any, *, depth: int = 0) -> bool:
    """True when no value of type `given` can be one of type `wanted`."""
    if depth > 8 or _says_nothing(given) or _says_nothing(wanted):
        return False
    given, wanted = _plain(given), _plain(wanted)
    if (members := _members(given)) is not None:
        return all(mismatch(one, wanted, depth=depth + 1) for one in members)
    if (members := _members(wanted)) is not None:
        return all(mismatch(given, one, depth=depth + 1) for one in members)
    if _says_nothing(given) or _says_nothing(wanted):
        return False
    if get_origin(given) is typing.Literal or get_origin(wanted) is typing.Literal:
        return _literal_mismatch(given, wanted, depth)
    left, right = get_origin(given) or given, get_origin(wanted) or wanted
    if not isinstance(left, type) or not isinstance(right, type):
        return False
    if _classes_exclude(left, right):
        return True
    return _arguments_exclude(given, wanted, left, right, depth)


def _says_nothing(annotation: Any) -> bool:
    return (
        annotation is UNKNOWN
        or annotation is Any
        or annotation is object
        or isinstance(annotation, str | typing.ForwardRef | typing.TypeVar | typing.ParamSpec)
        or annotation in (typing.NoReturn, typing.Never, typing.LiteralString)
    )


def _plain(annotation: Any) -> Any:
    while True:
        origin = get_origin(annotation)
        if origin in (typing.Annotated, typing.Final, typing.ClassVar, typing.Required, typing.NotRequired):
            annotation = get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):  # a NewType is checked as what it is made of
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__value__") and type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation


def _members(annotation: Any) -> tuple[Any, ...] | None:
    origin = get_origin(annotation)
    return get_args(annotation) if origin is Union or origin is types.UnionType else None


def _literal_mismatch(given: Any, wanted: Any, depth: int) -> bool:
    if get_origin(given) is typing.Literal and get_origin(wanted) is typing.Literal:
        return not set(get_args(given)) & set(get_args(wanted))
    if get_origin(given) is typing.Literal:
        return all(mismatch(type(one), wanted, depth=depth + 1) for one in get_args(given))
    return all(mismatch(given, type(one), depth=depth + 1) for one in get_args(wanted))


def _classes_exclude(left: type, right: type) -> bool:
    if left is right or right in _PROMOTED.get(left, ()):
        return False
    if typing.is_typeddict(left):
        left = dict
    if typing.is_typeddict(right):
        right = dict
    if getattr(left, "_is_protocol", False) or getattr(right, "_is_protocol", False):
        return False
    try:
        if issubclass(left, right) or issubclass(right, left):
            return False
    except TypeError:
        return False
    # A subclass of both may exist unless one is final in practice: builtins with a layout of their own cannot be
    # combined.
    return not _may_share_subclass(left, right)


def _may_share_subclass(left: type, right: type) -> bool:
    """False when no class can derive from both, or when it would be absurd that the value is an instance of both."""
    if _abstract(left) or _abstract(right):
        # an ABC such as Mapping: a concrete class that is not registered with it does not become one
        concrete, interface = (right, left) if _abstract(left) else (left, right)
        return _abstract(concrete) or not _closed(concrete) or _structural(interface)
    return False


def _abstract(cls: type) -> bool:
    return bool(getattr(cls, "__abstractmethods__", None)) or cls in (abc.Callable, abc.Hashable, abc.Sized)


def _structural(interface: type) -> bool:
    return interface in (abc.Callable, abc.Hashable, abc.Sized, abc.Awaitable)


def _closed(cls: type) -> bool:
    return cls.__module__ == "builtins"


def _arguments_exclude(given: Any, wanted: Any, left: type, right: type, depth: int) -> bool:
    """Compare type arguments where both say them and the containers are of one shape."""
    ours, theirs = get_args(given), get_args(wanted)
    if not ours or not theirs:
        return False
    if left is tuple and right is tuple:
        if Ellipsis in ours or Ellipsis in theirs:
            return mismatch(element_of(given), element_of(wanted), depth=depth + 1)
        return len(ours) != len(theirs) or any(
            mismatch(a, b, depth=depth + 1) for a, b in zip(ours, theirs, strict=True)
        )
    # An empty list is both list[int] and list[str]; but nobody who writes both means that.
    if issubclass(left, abc.Mapping) and issubclass(right, abc.Mapping) and len(ours) == len(theirs) == 2:
        return any(mismatch(a, b, depth=depth + 1) for a, b in zip(ours, theirs, strict=True))
    if issubclass(left, abc.Iterable) and issubclass(right, abc.Iterable) and len(theirs) == 1:
        return mismatch(element_of(given), theirs[0], depth=depth + 1)
    return False


def describe(annotation: Any) -> str:
    """An annotation as its author would write it."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__qualname__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")
